// SPDX-License-Identifier: Apache-2.0
// The operator's listener: what it shows and does, and that nobody else gets it to.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "services/common/clock.h"
#include "services/router/openai_api_fixture.h"
#include "services/router/status_page.h"

namespace millrace::router {
namespace {

using ::testing::HasSubstr;

TEST_F(OpenAiApiTest, OperatorListenerShowsMetricsAndStatus) {
  EXPECT_EQ(AskChat().status, 200);
  EXPECT_EQ(AskChat(R"(,"n":0)").status, 400);
  const std::string metrics = AskOperator(Get("/metrics")).body;
  EXPECT_THAT(metrics, HasSubstr(R"(millrace_http_requests_total{code="200",route="/v1/chat/completions"} 1)"));
  EXPECT_THAT(metrics, HasSubstr(R"(millrace_http_requests_total{code="400",route="/v1/chat/completions"} 1)"));
  EXPECT_THAT(metrics, HasSubstr("millrace_time_to_first_token_seconds_count{model=\"demo\"} 1"));
  EXPECT_THAT(metrics, HasSubstr("millrace_inter_token_seconds_bucket"));
  EXPECT_THAT(metrics, HasSubstr("millrace_requests_running{role=\"router\"} 0"));
  EXPECT_THAT(metrics, HasSubstr("millrace_requests_waiting{role=\"router\"} 0"));
  EXPECT_EQ(Parse(AskOperator(Get("/")).body)["cluster"]["workers"], "<4>");
  EXPECT_EQ(AskOperator(Get("/v1/models")).status, 404);
}

TEST_F(OpenAiApiTest, TheStatusPageIsTheOperatorsAndComesWithAStrictPolicy) {
  TestReply page = AskOperator(Get("/", "Accept: text/html\r\n"));
  EXPECT_THAT(page.body, HasSubstr("<!doctype html>"));
  EXPECT_EQ(page.headers["vary"], "Accept");
  for (const EmbeddedFile& file : StatusPageFiles()) {
    TestReply reply = AskOperator(Get(std::string(file.path)));
    EXPECT_EQ(reply.status, 200) << file.path;
    EXPECT_EQ(reply.body, file.content) << file.path;
    EXPECT_EQ(reply.headers["content-type"], file.content_type) << file.path;
    EXPECT_EQ(reply.headers["x-content-type-options"], "nosniff") << file.path;
    EXPECT_THAT(reply.headers["content-security-policy"], HasSubstr("default-src 'none'; script-src 'self'"));
    EXPECT_EQ(Ask(Get(std::string(file.path))).status, 404) << file.path << " on the public port";
    EXPECT_EQ(AskOperator(Post(std::string(file.path), "{}")).status, 405) << file.path;
  }
  EXPECT_EQ(AskOperator(Get("/page/../page/page.js")).status, 404);
}

TEST_F(OpenAiApiTest, ARequestIsExplainedToTheOperatorAlone) {
  auto trace = traces_.Begin("req/1 x", "POST /v1/completions", "", MonotonicNow());
  trace->Begin(Phase::kQueue, MonotonicNow());
  EXPECT_EQ(Parse(AskOperator(Get("/requests/req%2F1%20x")).body)["state"], "running");
  trace->Close(MonotonicNow(), absl::StatusCode::kOk, 200);
  const Json explained = Parse(AskOperator(Get("/requests/req%2F1%20x")).body);
  EXPECT_EQ(explained["request_id"], "req/1 x");
  EXPECT_EQ(explained["phases"][0]["name"], "queue");
  const Json list = Parse(AskOperator(Get("/requests")).body);
  ASSERT_EQ(list["requests"].size(), 1u);
  EXPECT_EQ(list["requests"][0]["http_status"], 200);
  EXPECT_EQ(CodeOf(AskOperator(Get("/requests/other"))), "request_not_found");
  EXPECT_EQ(AskOperator(Get("/requests/%zz")).status, 404);
  EXPECT_EQ(AskOperator(Post("/requests/other", "{}")).status, 405);
  EXPECT_EQ(Ask(Get("/requests")).status, 404);
  EXPECT_EQ(Ask(Get("/requests/req%2F1%20x")).status, 404);
}

TEST_F(OpenAiApiTest, ThePagesPromptIsAnsweredOnItsOwnOriginAndOnNoOther) {
  TestReply reply = AskOperator(Post("/v1/chat/completions", Chat(), "Origin: http://a\r\n"));
  EXPECT_EQ(reply.status, 200);
  EXPECT_EQ(reply.headers.count("access-control-allow-origin"), 0u);
  reply = AskOperator(Post("/v1/chat/completions", Chat(), "Origin: http://elsewhere\r\n"));
  EXPECT_EQ(reply.status, 403);
  EXPECT_EQ(CodeOf(reply), "foreign_origin");
  // What a page elsewhere can send without asking first is no request of ours.
  EXPECT_EQ(AskOperator("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n"
                        "Content-Length: 2\r\n\r\n{}")
                .status,
            415);
  EXPECT_EQ(AskOperator("OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n").status, 405);
}

// A page whose name its owner points at this port is of one origin with it: only the name tells them apart.
TEST_F(OpenAiApiTest, TheOperatorsPortAnswersToAddressesLoopbackAndConfiguredNamesOnly) {
  const auto ask = [&](const std::string& host, const std::string& headers = "") {
    return AskOperator(absl::StrCat("GET / HTTP/1.1\r\nHost: ", host, "\r\n", headers, "\r\n"));
  };
  for (const char* host : {"127.0.0.1", "127.0.0.1:8081", "10.1.2.3:8081", "[::1]:8081", "[fd00::7]", "localhost:9",
                           "LocalHost", "localhost.:8081", "ui.localhost:8081", "a", "A:8081"}) {
    EXPECT_EQ(ask(host).status, 200) << host;
  }
  for (const char* host :
       {"evil.example", "evil.example:8081", "127.0.0.1.evil.example", "localhost.evil.example", "evil-localhost",
        "a.evil.example", "2130706433", "0x7f.1", "[evil]", "[::1", "a:b", ":8081"}) {
    const TestReply reply = ask(host);
    EXPECT_EQ(reply.status, 421) << host;
    EXPECT_EQ(CodeOf(reply), "unknown_host") << host;
  }
  EXPECT_THAT(ask("evil.example").body, HasSubstr("'evil.example': use an address, localhost, or a name that "
                                                  "router.operator_hosts lists"));
  for (const char* origin : {"http://127.0.0.1:8081", "https://127.0.0.1:8081", "https://a", "http://A:9999"}) {
    EXPECT_EQ(ask("127.0.0.1:8081", absl::StrCat("Origin: ", origin, "\r\n")).status, 200) << origin;
  }
  for (const char* origin : {"null", "http://evil.example", "http://127.0.0.1:9999", "http://127.0.0.1",
                             "http://127.0.0.1:8081.evil.example", "file://127.0.0.1:8081", ""}) {
    EXPECT_EQ(ask("127.0.0.1:8081", absl::StrCat("Origin: ", origin, "\r\n")).status, 403) << origin;
  }
  // Every verb and page; not what probes ask, which says nothing and changes nothing.
  for (const char* path : {"/metrics", "/requests", "/page/page.js", "/nothing"}) {
    EXPECT_EQ(AskOperator(absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: evil.example\r\n\r\n")).status, 421) << path;
  }
  EXPECT_EQ(AskOperator("POST /workers/decode-0/drain HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n"
                        "Content-Type: application/json\r\n\r\n{}")
                .status,
            421);
  EXPECT_EQ(drained_, "");
  for (const char* path : {"/healthz", "/readyz"}) {
    EXPECT_EQ(AskOperator(absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: probe.example\r\n\r\n")).status, 200) << path;
  }
  EXPECT_EQ(Ask("GET /v1/models HTTP/1.1\r\nHost: any.example\r\nOrigin: http://other.example\r\n\r\n").status, 200)
      << "the public port is anybody's";
}

TEST_F(OpenAiApiTest, TheOperatorAndNobodyElseDrainsAWorkerByName) {
  EXPECT_EQ(AskOperator(Post("/workers/decode-0/drain", "{}")).status, 202);
  EXPECT_EQ(drained_, "decode-0");
  drained_.clear();
  const TestReply unknown = AskOperator(Post("/workers/decode-9/drain", "{}"));
  EXPECT_EQ(unknown.status, 404);
  EXPECT_EQ(CodeOf(unknown), "worker_not_found");
  EXPECT_EQ(AskOperator(Get("/workers/decode-0/drain")).status, 405);
  EXPECT_EQ(AskOperator(Post("/workers//drain", "{}")).status, 404);
  EXPECT_EQ(AskOperator("POST /workers/decode-0/drain HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n"
                        "Content-Length: 0\r\n\r\n")
                .status,
            415)
      << "what a web page may send without asking";
  EXPECT_EQ(Ask(Post("/workers/decode-0/drain", "{}")).status, 404) << "not on the public port";
  EXPECT_EQ(drained_, "");
}

}  // namespace
}  // namespace millrace::router
