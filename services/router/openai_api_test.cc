// SPDX-License-Identifier: Apache-2.0
// The routes of the public listener, and what every request passes before its fields are looked at.
#include "services/router/openai_api.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "services/router/openai_api_fixture.h"

namespace millrace::router {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST_F(OpenAiApiTest, RoutesAreExact) {
  EXPECT_EQ(Ask(Get("/healthz")).status, 200);
  EXPECT_EQ(Ask(Get("/v1/models")).status, 200);
  EXPECT_EQ(Ask(Get("/v1/models?api-version=1")).status, 200);
  EXPECT_EQ(Ask(Get("http://a/v1/models")).status, 200);
  for (const char* path : {"/", "/v1", "/v1/", "/v1/../admin", "/v1/%2e%2e/admin", "/v1/chat%00", "//v1//chat",
                           "/v1/models/..%2f..", "/v1/models/%00", "/metrics", "/debug", "/pause", "/invocations",
                           "/v1/chat/completions/", "/V1/models", "/healthz/"}) {
    EXPECT_EQ(Ask(Get(path)).status, 404) << path;
  }
  TestReply reply = Ask(Get("/v1/chat/completions"));
  EXPECT_EQ(reply.status, 405);
  EXPECT_EQ(reply.headers["allow"], "POST");
  for (const char* method : {"POST", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"}) {
    reply = Ask(absl::StrCat(method, " /v1/models HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"));
    EXPECT_EQ(reply.status, 405) << method;
    EXPECT_EQ(reply.headers["allow"], "GET") << method;
  }
  EXPECT_THAT((std::vector<int>{404, 405}), ::testing::Contains(Ask("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n").status));
}

TEST_F(OpenAiApiTest, ModelsAreListedAndFoundByName) {
  const Json list = Parse(Ask(Get("/v1/models")).body);
  EXPECT_EQ(list["object"], "list");
  EXPECT_EQ(list["data"][0]["id"], "demo/model");
  EXPECT_EQ(Parse(Ask(Get("/v1/models/demo/model")).body)["id"], "demo/model");
  EXPECT_EQ(Parse(Ask(Get("/v1/models/demo%2Fmodel")).body)["id"], "demo/model");
  EXPECT_EQ(CodeOf(Ask(Get("/v1/models/other"))), "model_not_found");
}

TEST_F(OpenAiApiTest, ReadinessFollowsTheClusterAndTheDrain) {
  EXPECT_EQ(Ask(Get("/readyz")).status, 200);
  generations_->SetReady(absl::UnavailableError("no decode worker at 10.0.0.7"));
  TestReply reply = Ask(Get("/readyz"));
  EXPECT_EQ(reply.status, 503);
  EXPECT_THAT(reply.body, Not(HasSubstr("10.0.0.7")));
  EXPECT_THAT(AskOperator(Get("/")).body, HasSubstr("10.0.0.7"));
  generations_->SetReady(absl::OkStatus());
  api_->BeginDrain();
  EXPECT_EQ(CodeOf(Ask(Get("/readyz"))), "draining");
  EXPECT_EQ(CodeOf(AskChat()), "draining");
  EXPECT_EQ(Ask(Get("/healthz")).status, 200);
}

TEST_F(OpenAiApiTest, MediaTypesOtherThanJsonAreRefused) {
  const auto ask = [&](const std::string& headers) {
    const std::string body = Chat();
    return Ask(absl::StrCat("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: ", body.size(), "\r\n",
                            headers, "\r\n", body))
        .status;
  };
  EXPECT_EQ(ask(""), 415);
  EXPECT_EQ(ask("Content-Type: text/plain\r\n"), 415);
  EXPECT_EQ(ask("Content-Type: application/json; charset=utf-16\r\n"), 415);
  EXPECT_EQ(ask("Content-Type: application/json\r\nContent-Encoding: gzip\r\n"), 415);
  EXPECT_EQ(ask("content-type: Application/JSON; charset=UTF-8\r\n"), 200);
}

TEST_F(OpenAiApiTest, BodiesThatAreNoJsonObjectAreRefusedWithTheByte) {
  const auto code = [&](const std::string& body) { return CodeOf(Ask(Post("/v1/chat/completions", body))); };
  EXPECT_EQ(code(""), "invalid_json");
  EXPECT_EQ(code("  "), "invalid_json");
  for (const char* body : {"null", "[]", "\"x\"", "1"}) EXPECT_EQ(code(body), "expected_object") << body;
  EXPECT_EQ(code(Chat() + "x"), "invalid_json");
  EXPECT_EQ(code("\xEF\xBB\xBF" + Chat()), "invalid_json");
  EXPECT_EQ(code(Chat(R"(,"model":"x")")), "duplicate_key");
  const std::string whole = Chat();
  TestClient client(public_->port());
  for (size_t length = 0; length < whole.size(); ++length) {
    client.Send(Post("/v1/chat/completions", whole.substr(0, length)));
    const TestReply reply = client.Read();
    ASSERT_EQ(CodeOf(reply), "invalid_json") << length;
    ASSERT_THAT(reply.body, HasSubstr(absl::StrCat("at byte ", length, "."))) << length;
  }
}

TEST_F(OpenAiApiTest, RequestHeadersAreChecked) {
  for (const char* timeout : {"0", "-1", "1000000000000", "1e12", "soon", "1.5", "99999999999999999999"}) {
    EXPECT_EQ(AskChat("", absl::StrCat("x-request-timeout-ms: ", timeout, "\r\n")).status, 400) << timeout;
  }
  EXPECT_EQ(AskChat("", "x-request-timeout-ms: 5000\r\n").status, 200);
  EXPECT_EQ(AskChat("", "x-request-timeout-ms: 4000000\r\n").status, 200);
  EXPECT_LE(generations_->requests().back().deadline, std::chrono::steady_clock::now() + std::chrono::seconds(3600));
  EXPECT_EQ(AskChat("", absl::StrCat("x-request-id: ", std::string(1024, 'i'), "\r\n")).status, 400);
  EXPECT_EQ(AskChat("", "x-request-id: a b\r\n").status, 400);
  EXPECT_EQ(AskChat("", "x-request-id: mine-7\r\n").headers["x-request-id"], "mine-7");
  EXPECT_EQ(Parse(AskChat(R"(,"n":0)", "x-request-id: mine-8\r\n").body)["error"]["request_id"], "mine-8");
}

TEST_F(OpenAiApiTest, ARequestIdIsUsedOnceAtATime) {
  generations_->SetScript({.text = "x", .hold_after = 0});
  TestClient first(public_->port());
  first.Send(Post("/v1/chat/completions", Chat(), "x-request-id: same\r\n"));
  ASSERT_TRUE(Eventually([&] { return generations_->running() == 1; }));
  const TestReply reply = AskChat("", "x-request-id: same\r\n");
  EXPECT_EQ(reply.status, 409);
  EXPECT_EQ(CodeOf(reply), "duplicate_request_id");
  generations_->Release();
  EXPECT_EQ(first.Read().status, 200);
  ASSERT_TRUE(Quiet());
  EXPECT_EQ(AskChat("", "x-request-id: same\r\n").status, 200);
}

TEST_F(OpenAiApiTest, RequestsInFlightAreLimited) {
  ApiLimits limits;
  limits.max_requests = 2;
  StartServers(limits);
  generations_->SetScript({.text = "x", .hold_after = 0});
  TestClient one(public_->port()), two(public_->port());
  one.Send(Post("/v1/chat/completions", Chat()));
  two.Send(Post("/v1/chat/completions", Chat()));
  ASSERT_TRUE(Eventually([&] { return generations_->running() == 2; }));
  TestReply reply = AskChat();
  EXPECT_EQ(reply.status, 429);
  EXPECT_THAT(RenderMetrics(*registry_), HasSubstr("millrace_router_refusals_total{code=\"overloaded\"} 1\n"));
  EXPECT_EQ(reply.headers["retry-after"], "1");
  generations_->Release();
  EXPECT_EQ(one.Read().status, 200);
  EXPECT_EQ(two.Read().status, 200);
}

TEST_F(OpenAiApiTest, LongBodiesAreParsedAsideAndAnsweredAlike) {
  const std::string padded = absl::StrCat(R"(,"frobnicate":")", std::string(100'000, 'p'), "\"");
  TestReply reply = AskChat(padded);
  EXPECT_EQ(reply.status, 200);
  EXPECT_EQ(reply.headers["x-ignored-params"], "frobnicate");
  EXPECT_EQ(CodeOf(AskChat(padded + R"(,"n":0)")), "invalid_value");
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, ARequestSplitAnywhereIsAnsweredAlike) {
  const std::string request = Post("/v1/chat/completions", Chat());
  TestClient client(public_->port());
  for (size_t split = 1; split < request.size(); ++split) {
    client.Send(request.substr(0, split));
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    client.Send(request.substr(split));
    const TestReply reply = client.Read();
    ASSERT_EQ(reply.status, 200) << split;
    ASSERT_EQ(Parse(reply.body)["choices"][0]["message"]["content"], "Hello world") << split;
  }
}

}  // namespace
}  // namespace millrace::router
