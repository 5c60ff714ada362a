// SPDX-License-Identifier: Apache-2.0
// The OpenAI surface through real sockets, over a scripted engine: what is refused and how, and what replies and
// streams look like whatever happens while they are made.
#include "services/router/openai_api.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/router/fake_generation_service.h"
#include "services/router/http_test_client.h"
#include "services/router/json_reader.h"
#include "services/router/status_page.h"

namespace millrace::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kContext = 2048;

class OpenAiApiTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto tokenizer = text::Tokenizer::Load("deploy/demo/model/tokenizer.json", 1536);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = tokenizer->release();
  }

  void SetUp() override { StartServers(); }

  void StartServers(ApiLimits api_limits = {}, HttpLimits http_limits = {}) {
    public_.reset();
    operator_.reset();
    api_.reset();
    metrics_.reset();
    registry_ = std::make_shared<prometheus::Registry>();
    metrics_ = std::make_unique<HttpMetrics>(*registry_, "demo");
    generations_ = std::make_unique<FakeGenerationService>(*tokenizer_);
    generations_->SetScript({.text = "Hello world"});
    OpenAiApiOptions options;
    options.model = {.id = "demo/model",
                     .created_unix_s = 1700000000,
                     .context_length = kContext,
                     .vocab_size = 1536,
                     .tokenizer = tokenizer_,
                     .max_tokens_limit = max_tokens_limit_,
                     .default_max_tokens = default_max_tokens_};
    options.limits = api_limits;
    options.generations = generations_.get();
    options.registry = registry_.get();
    options.metrics = metrics_.get();
    options.traces = &traces_;
    options.status = [] { return Json{{"workers", "<4>"}}; };
    options.drain_worker = [this](const std::string& name) {
      if (name != "decode-0") return absl::NotFoundError("secret words");
      drained_ = name;
      return absl::OkStatus();
    };
    api_ = std::make_unique<OpenAiApi>(options);
    public_ = *HttpServer::Start({.limits = http_limits, .metrics = metrics_.get()}, api_->PublicHandler());
    operator_ = *HttpServer::Start({.threads = 1}, api_->OperatorHandler());
  }

  static std::string Post(const std::string& path, const std::string& body, const std::string& headers = "") {
    return absl::StrCat("POST ", path,
                        " HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: ", body.size(),
                        "\r\n", headers, "\r\n", body);
  }
  static std::string Get(const std::string& path, const std::string& headers = "") {
    return absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: a\r\n", headers, "\r\n");
  }

  TestReply Ask(const std::string& bytes) {
    TestClient client(public_->port());
    client.Send(bytes);
    return client.Read();
  }
  TestReply AskOperator(const std::string& bytes) {
    TestClient client(operator_->port());
    client.Send(bytes);
    return client.Read();
  }

  // A chat request with these members besides model and messages.
  static std::string Chat(const std::string& members = "") {
    return absl::StrCat(R"({"model":"demo/model","messages":[{"role":"user","content":"Hi"}])", members, "}");
  }
  TestReply AskChat(const std::string& members = "", const std::string& headers = "") {
    return Ask(Post("/v1/chat/completions", Chat(members), headers));
  }
  TestReply AskCompletion(const std::string& members) {
    return Ask(Post("/v1/completions", absl::StrCat(R"({"model":"demo/model")", members, "}")));
  }

  static Json Parse(const std::string& text) { return Json::parse(text, nullptr, false); }
  static std::string CodeOf(const TestReply& reply) {
    const Json json = Parse(reply.body);
    return json.is_object() && json.contains("error") ? json["error"]["code"].get<std::string>() : reply.body;
  }
  static std::string ParamOf(const TestReply& reply) {
    const Json json = Parse(reply.body);
    return json.is_object() && json.contains("error") && json["error"]["param"].is_string()
               ? json["error"]["param"].get<std::string>()
               : "";
  }

  // The data of a stream's events; comments are left out.
  static std::vector<std::string> Events(const std::string& body) {
    std::vector<std::string> events;
    for (size_t at = 0, end = 0; (end = body.find("\n\n", at)) != std::string::npos; at = end + 2) {
      if (body.compare(at, 6, "data: ") == 0) events.push_back(body.substr(at + 6, end - at - 6));
    }
    return events;
  }

  // A member of every delta of choice `index`, joined.
  static std::string Joined(const std::vector<std::string>& events, const char* member, int index = 0) {
    std::string text;
    for (const auto& event : events) {
      const Json json = Parse(event);
      if (!json.is_object() || !json.contains("choices")) continue;
      for (const auto& choice : json["choices"]) {
        if (choice["index"] != index) continue;
        const Json& from = choice.contains("delta") ? choice["delta"] : choice;
        if (from.contains(member) && from[member].is_string()) text += from[member].get<std::string>();
      }
    }
    return text;
  }

  static std::string FinishReason(const std::vector<std::string>& events, int index = 0) {
    std::string reason;
    for (const auto& event : events) {
      const Json json = Parse(event);
      if (!json.is_object() || !json.contains("choices")) continue;
      for (const auto& choice : json["choices"]) {
        if (choice["index"] == index && choice["finish_reason"].is_string()) reason += choice["finish_reason"];
      }
    }
    return reason;
  }

  size_t TokenCount(const std::string& text) const {
    return tokenizer_->Encode(text, text::SpecialTokens::kMatch)->size();
  }

  template <typename Condition>
  static bool Eventually(Condition condition) {
    for (int i = 0; i < 5000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }

  // Nothing of any request is left.
  bool Quiet() {
    return Eventually([&] { return generations_->running() == 0 && api_->num_requests() == 0; });
  }

  std::string drained_;                                    // the worker that was asked to drain
  int32_t max_tokens_limit_ = 0, default_max_tokens_ = 0;  // of the model, when the servers start
  static text::Tokenizer* tokenizer_;
  TraceLog traces_{{}};
  std::shared_ptr<prometheus::Registry> registry_;
  std::unique_ptr<HttpMetrics> metrics_;
  std::unique_ptr<FakeGenerationService> generations_;
  std::unique_ptr<OpenAiApi> api_;
  std::unique_ptr<HttpServer> public_, operator_;
};

text::Tokenizer* OpenAiApiTest::tokenizer_ = nullptr;

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
  TestReply reply = AskOperator(Post("/v1/chat/completions", Chat(), "Origin: http://elsewhere\r\n"));
  EXPECT_EQ(reply.status, 200);
  EXPECT_EQ(reply.headers.count("access-control-allow-origin"), 0u);
  // What a page elsewhere can send without asking first is no request of ours.
  EXPECT_EQ(AskOperator("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n"
                        "Content-Length: 2\r\n\r\n{}")
                .status,
            415);
  EXPECT_EQ(AskOperator("OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n").status, 405);
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

TEST_F(OpenAiApiTest, ChatFieldsOutOfRangeAreRefusedByName) {
  struct Case {
    std::string members;
    std::string param;
    std::string code;
  };
  std::string many_messages, many_tools, many_stops, many_bias;
  for (int i = 0; i < 1025; ++i) absl::StrAppend(&many_bias, i ? "," : "", "\"", i, "\":1");
  for (int i = 0; i < 129; ++i) {
    absl::StrAppend(&many_tools, i ? "," : "", R"({"type":"function","function":{"name":"f)", i, "\"}}");
  }
  const auto tool = [](const std::string& function) {
    return R"(,"tools":[{"type":"function","function":)" + function + "}]";
  };
  std::string deep = "1";
  for (int i = 0; i < 17; ++i) deep = "{\"a\":" + deep + "}";
  const Case cases[] = {
      {R"(,"max_tokens":0)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":-1)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":2147483648)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":1.5)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":"10")", "max_tokens", "invalid_type"},
      {R"(,"max_tokens":5,"max_completion_tokens":6)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":2048)", "", "context_length_exceeded"},
      {R"(,"temperature":-0.1)", "temperature", "invalid_value"},
      {R"(,"temperature":2.1)", "temperature", "invalid_value"},
      {R"(,"temperature":"hot")", "temperature", "invalid_type"},
      {R"(,"temperature":NaN)", "", "invalid_number"},
      {R"(,"temperature":1e999)", "", "invalid_number"},
      {R"(,"top_p":0)", "top_p", "invalid_value"},
      {R"(,"top_p":1.0001)", "top_p", "invalid_value"},
      {R"(,"top_p":-1)", "top_p", "invalid_value"},
      {R"(,"top_k":-2)", "top_k", "invalid_value"},
      {R"(,"top_k":2147483648)", "top_k", "invalid_value"},
      {R"(,"min_p":2)", "min_p", "invalid_value"},
      {R"(,"n":0)", "n", "invalid_value"},
      {R"(,"n":9)", "n", "invalid_value"},
      {R"(,"n":1000000)", "n", "invalid_value"},
      {R"(,"stop":["a","b","c","d","e"])", "stop", "too_many_items"},
      {R"(,"stop":"")", "stop", "invalid_value"},
      {R"(,"stop":[""])", "stop[0]", "invalid_value"},
      {R"(,"stop":")" + std::string(257, 's') + "\"", "stop", "invalid_value"},
      {R"(,"stop":5)", "stop", "invalid_type"},
      {R"(,"stop":["a",5])", "stop[1]", "invalid_type"},
      {R"(,"logit_bias":{"1536":1})", "logit_bias['1536']", "invalid_token_id"},
      {R"(,"logit_bias":{"-1":1})", "logit_bias['-1']", "invalid_token_id"},
      {R"(,"logit_bias":{"x":1})", "logit_bias['x']", "invalid_token_id"},
      {R"(,"logit_bias":{"5":101})", "logit_bias['5']", "invalid_value"},
      {R"(,"logit_bias":{"5":-101})", "logit_bias['5']", "invalid_value"},
      {R"(,"logit_bias":{"5":"1"})", "logit_bias['5']", "invalid_type"},
      {R"(,"logit_bias":[1])", "logit_bias", "invalid_type"},
      {",\"logit_bias\":{" + many_bias + "}", "logit_bias", "too_many_items"},
      {R"(,"logprobs":true,"top_logprobs":21)", "top_logprobs", "invalid_value"},
      {R"(,"logprobs":true,"top_logprobs":-1)", "top_logprobs", "invalid_value"},
      {R"(,"top_logprobs":2)", "top_logprobs", "invalid_value"},
      {R"(,"logprobs":1)", "logprobs", "invalid_type"},
      {R"(,"seed":9223372036854775808)", "seed", "invalid_value"},
      {R"(,"seed":-9223372036854775809)", "seed", "invalid_value"},
      {R"(,"seed":1.5)", "seed", "invalid_value"},
      {R"(,"frequency_penalty":2.01)", "frequency_penalty", "invalid_value"},
      {R"(,"presence_penalty":-2.01)", "presence_penalty", "invalid_value"},
      {R"(,"response_format":{"type":"yaml"})", "response_format.type", "invalid_value"},
      {R"(,"response_format":{"type":"json_schema","json_schema":{"schema":{"$ref":"#"}}})", "response_format",
       "invalid_schema"},
      {R"(,"response_format":"json")", "response_format", "invalid_type"},
      {R"(,"reasoning_effort":"ultra")", "reasoning_effort", "invalid_value"},
      {R"(,"reasoning_effort":3)", "reasoning_effort", "invalid_value"},
      {R"(,"thinking":{"type":"sometimes"})", "thinking.type", "invalid_value"},
      {R"(,"chat_template_kwargs":{"thinking":"yes"})", "chat_template_kwargs.thinking", "invalid_value"},
      {",\"tools\":[" + many_tools + "]", "tools", "too_many_items"},
      {R"(,"tools":{})", "tools", "invalid_type"},
      {R"(,"tools":[{"type":"retrieval"}])", "tools[0].type", "invalid_value"},
      {tool("{}"), "tools[0].function.name", "missing_field"},
      {tool(R"({"name":"a<b"})"), "tools[0].function.name", "invalid_value"},
      {tool(R"({"name":"a\nb"})"), "tools[0].function.name", "invalid_value"},
      {tool(R"({"name":"f","parameters":[]})"), "tools[0].function.parameters", "invalid_type"},
      {tool(R"({"name":"f","parameters":)" + deep + "}"), "tools[0].function.parameters", "invalid_schema"},
      {tool(R"({"name":"f","parameters":{"x":")" + std::string(65 << 10, 'd') + "\"}}"), "tools[0].function.parameters",
       "invalid_schema"},
      {R"(,"tools":[{"type":"function","function":{"name":"f"}},{"type":"function","function":{"name":"f"}}])",
       "tools[1].function.name", "duplicate_tool"},
      {R"(,"tool_choice":"required")", "tool_choice", "unsupported_parameter"},
      {R"(,"tool_choice":"perhaps")", "tool_choice", "invalid_value"},
      {R"(,"stream_options":{"include_usage":true})", "stream_options", "invalid_value"},
      {R"(,"stream":1)", "stream", "invalid_type"},
      {R"(,"stream":true,"stream_options":{"include_usage":true,"include_usage":true})", "", "duplicate_key"},
      {R"(,"user":")" + std::string(1 << 20, 'u') + "\"", "user", "string_too_long"},
      {R"(,"metadata":{"a":")" + std::string(1 << 20, 'u') + "\"}", "metadata['a']", "string_too_long"},
      {R"(,"cache_salt":"")", "cache_salt", "invalid_value"},
      {R"(,"cache_salt":5)", "cache_salt", "invalid_type"},
      {R"(,"audio":{})", "audio", "unsupported_parameter"},
      {R"(,"prediction":{"type":"content"})", "prediction", "unsupported_parameter"},
      {R"(,"prompt_embeds":"x")", "prompt_embeds", "unsupported_parameter"},
      {R"(,"modalities":["text","audio"])", "modalities", "unsupported_parameter"},
      {R"(,"min_tokens":20,"max_tokens":10)", "min_tokens", "invalid_value"},
  };
  TestClient client(public_->port());
  for (const auto& test : cases) {
    client.Send(Post("/v1/chat/completions", Chat(test.members)));
    const TestReply reply = client.Read();
    EXPECT_EQ(reply.status, 400) << test.members.substr(0, 100);
    EXPECT_EQ(CodeOf(reply), test.code) << test.members.substr(0, 100) << reply.body;
    EXPECT_EQ(ParamOf(reply), test.param) << test.members.substr(0, 100);
  }
  EXPECT_TRUE(generations_->requests().empty());
  EXPECT_THAT(Ask(Post("/v1/chat/completions", Chat(R"(,"reasoning_effort":"ultra")"))).body,
              HasSubstr("none, minimal, low, medium, high, xhigh or max"));
}

TEST_F(OpenAiApiTest, ModelAndMessagesAreCheckedBeforeAnythingElse) {
  struct Case {
    std::string body;
    int status;
    std::string param;
    std::string code;
  };
  const auto with = [](const std::string& messages) {
    return absl::StrCat(R"({"model":"demo/model","messages":)", messages, "}");
  };
  std::string many = "[";
  for (int i = 0; i < 4097; ++i) absl::StrAppend(&many, i ? "," : "", R"({"role":"user","content":"a"})");
  const std::string messages = R"("messages":[{"role":"user","content":"Hi"}])";
  const Case cases[] = {
      {"{" + messages + "}", 400, "model", "missing_field"},
      {R"({"model":"",)" + messages + "}", 400, "model", "invalid_value"},
      {R"({"model":5,)" + messages + "}", 400, "model", "invalid_type"},
      {R"({"model":")" + std::string(1 << 20, 'm') + "\"," + messages + "}", 400, "model", "string_too_long"},
      {R"({"model":"gpt",)" + messages + "}", 404, "model", "model_not_found"},
      {R"({"model":"demo/model"})", 400, "messages", "missing_field"},
      {with("null"), 400, "messages", "missing_field"},
      {with("[]"), 400, "messages", "invalid_value"},
      {with("{}"), 400, "messages", "invalid_type"},
      {with(many + "]"), 400, "messages", "too_many_items"},
      {with(R"(["x"])"), 400, "messages[0]", "invalid_type"},
      {with(R"([{"content":"x"}])"), 400, "messages[0].role", "missing_field"},
      {with(R"([{"role":"wizard","content":"x"}])"), 400, "messages[0].role", "invalid_value"},
      {with(R"([{"role":"user"}])"), 400, "messages[0].content", "missing_field"},
      {with(R"([{"role":"user","content":null}])"), 400, "messages[0].content", "missing_field"},
      {with(R"([{"role":"user","content":5}])"), 400, "messages[0].content", "invalid_type"},
      {with(R"([{"role":"assistant"}])"), 400, "messages[0].content", "missing_field"},
      {with(R"([{"role":"user","content":"a"},{"role":"tool","content":"x"}])"), 400, "messages[1].tool_call_id",
       "missing_field"},
      {with(R"([{"role":"assistant","tool_calls":{}}])"), 400, "messages[0].tool_calls", "invalid_type"},
      {with(R"([{"role":"assistant","tool_calls":[{"function":{"name":"f"}}]}])"), 400,
       "messages[0].tool_calls[0].function.arguments", "invalid_type"},
      {with(R"([{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://127.0.0.1/"}}]}])"), 400,
       "messages[0].content[0].type", "unsupported_content"},
      {with(R"([{"role":"user","content":[{"type":"input_audio"}]}])"), 400, "messages[0].content[0].type",
       "unsupported_content"},
      {with(R"([{"role":"user","content":[{"type":"text"}]}])"), 400, "messages[0].content[0].text", "invalid_type"},
  };
  for (const auto& test : cases) {
    const TestReply reply = Ask(Post("/v1/chat/completions", test.body));
    EXPECT_EQ(reply.status, test.status) << test.body.substr(0, 100);
    EXPECT_EQ(CodeOf(reply), test.code) << test.body.substr(0, 100);
    EXPECT_EQ(ParamOf(reply), test.param) << test.body.substr(0, 100);
  }
}

TEST_F(OpenAiApiTest, CompletionPromptsAreChecked) {
  struct Case {
    std::string members;
    std::string param;
    std::string code;
  };
  const Case cases[] = {
      {"", "prompt", "missing_field"},
      {R"(,"prompt":"")", "prompt", "empty_prompt"},
      {R"(,"prompt":[])", "prompt", "empty_prompt"},
      {R"(,"prompt":[1,-1])", "prompt[1]", "invalid_token_id"},
      {R"(,"prompt":[1536])", "prompt[0]", "invalid_token_id"},
      {R"(,"prompt":[2147483648])", "prompt[0]", "invalid_token_id"},
      {R"(,"prompt":[9223372036854775808])", "prompt[0]", "invalid_token_id"},
      {R"(,"prompt":[1.5])", "prompt[0]", "invalid_token_id"},
      {R"(,"prompt":[1,"a"])", "prompt[1]", "invalid_token_id"},
      {R"(,"prompt":{})", "prompt", "invalid_type"},
      {R"(,"prompt":"a","n":3,"best_of":2)", "best_of", "invalid_value"},
      {R"(,"prompt":"a","logprobs":21)", "logprobs", "invalid_value"},
      {R"(,"prompt":"a","suffix":5)", "suffix", "invalid_type"},
  };
  for (const auto& test : cases) {
    const TestReply reply = AskCompletion(test.members);
    EXPECT_EQ(reply.status, 400) << test.members;
    EXPECT_EQ(CodeOf(reply), test.code) << test.members;
    EXPECT_EQ(ParamOf(reply), test.param) << test.members;
  }
}

TEST_F(OpenAiApiTest, PromptsFillTheContextToTheLastToken) {
  const auto ask = [&](size_t prompt, int max_tokens) {
    std::vector<int> ids(prompt, 100);
    return AskCompletion(absl::StrCat(",\"prompt\":[", absl::StrJoin(ids, ","), "],\"max_tokens\":", max_tokens));
  };
  EXPECT_EQ(ask(kContext - 1, 1).status, 200);
  EXPECT_EQ(CodeOf(ask(kContext - 1, 2)), "context_length_exceeded");
  EXPECT_EQ(CodeOf(ask(kContext, 1)), "context_length_exceeded");
  EXPECT_EQ(CodeOf(ask(kContext * 10, 1)), "context_length_exceeded");
  const TestReply reply = AskCompletion(absl::StrCat(R"(,"prompt":")", std::string(1 << 20, 'a'), "\""));
  EXPECT_EQ(CodeOf(reply), "context_length_exceeded");
  EXPECT_THAT(reply.body, HasSubstr("2048 tokens"));
}

TEST_F(OpenAiApiTest, TheServersOutputLimitIsACapAndTheDefaultIsApart) {
  max_tokens_limit_ = 100, default_max_tokens_ = 40;
  StartServers();
  const TestReply over = AskChat(R"(,"max_tokens":101)");
  EXPECT_EQ(over.status, 400);
  EXPECT_EQ(CodeOf(over), "invalid_value");
  EXPECT_EQ(ParamOf(over), "max_tokens");
  EXPECT_THAT(over.body, HasSubstr("limit is 100"));
  EXPECT_EQ(ParamOf(AskChat(R"(,"max_completion_tokens":101)")), "max_completion_tokens");
  EXPECT_EQ(AskCompletion(R"(,"prompt":"a","max_tokens":101)").status, 400);
  const auto asked = [&](const TestReply& reply) {
    EXPECT_EQ(reply.status, 200) << reply.body;
    return generations_->requests().back().max_tokens;
  };
  EXPECT_EQ(asked(AskChat(R"(,"max_tokens":100)")), 100);
  EXPECT_EQ(asked(AskChat()), 40);
  EXPECT_EQ(asked(AskCompletion(R"(,"prompt":"a")")), 16);
  max_tokens_limit_ = 10, default_max_tokens_ = 0;
  StartServers();
  EXPECT_EQ(asked(AskChat()), 10);
  EXPECT_EQ(asked(AskCompletion(R"(,"prompt":"a")")), 10);
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

TEST_F(OpenAiApiTest, AcceptedFieldsReachTheEngineAsWritten) {
  const TestReply reply = AskChat(
      R"(,"max_completion_tokens":1e2,"min_tokens":3,"ignore_eos":true,"temperature":1e-40,"top_p":0.5,"top_k":-1,)"
      R"("min_p":0.1,"seed":-9223372036854775808,"frequency_penalty":-0.0,"presence_penalty":2,)"
      R"("repetition_penalty":1.1,"logit_bias":{"7":-100,"3":100},"logprobs":true,"top_logprobs":2,"stop":null,)"
      R"("cache_salt":"s","user":"u","metadata":{"k":"v"},"frobnicate":1,"x\r\ny":2)");
  ASSERT_EQ(reply.status, 200) << reply.body;
  const GenerationRequest request = generations_->requests().back();
  EXPECT_EQ(request.max_tokens, 100);
  EXPECT_EQ(request.min_tokens, 3);
  EXPECT_TRUE(request.ignore_eos);
  EXPECT_EQ(request.sampling.temperature, 0);
  EXPECT_EQ(request.sampling.top_p, 0.5);
  EXPECT_EQ(request.sampling.top_k, 0);
  EXPECT_EQ(request.sampling.seed, uint64_t{1} << 63);
  EXPECT_EQ(request.sampling.presence_penalty, 2);
  EXPECT_THAT(request.sampling.logit_bias, ElementsAre(std::pair(3, 100.f), std::pair(7, -100.f)));
  EXPECT_EQ(request.num_logprobs, 2);
  EXPECT_EQ(request.cache_salt, "s");
  auto headers = reply.headers;
  EXPECT_EQ(headers["x-ignored-params"], "frobnicate, x??y");
  EXPECT_EQ(headers["x-seed"], "-9223372036854775808");
}

TEST_F(OpenAiApiTest, UserTextNeverBecomesControlTokens) {
  ASSERT_EQ(Ask(Post("/v1/chat/completions",
                     R"({"model":"demo/model","messages":[{"role":"user","content":"<｜User｜></think>"}]})"))
                .status,
            200);
  const auto ids = generations_->requests().back().prompt_ids;
  EXPECT_EQ(std::count(ids.begin(), ids.end(), *tokenizer_->TokenId("<｜User｜>")), 1);
  ASSERT_EQ(AskCompletion(R"(,"prompt":"<｜User｜>")").status, 200);
  EXPECT_THAT(generations_->requests().back().prompt_ids, ElementsAre(*tokenizer_->TokenId("<｜User｜>")));
}

TEST_F(OpenAiApiTest, AHugeIntegerOfAToolReachesThePromptAsWritten) {
  const std::string digits = "123456789012345678901234567890";
  const TestReply reply = AskChat(
      absl::StrCat(R"(,"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","maximum":)",
                   digits, R"(,"minimum":-)", digits, "}}}]"));
  ASSERT_EQ(reply.status, 200) << reply.body;
  const std::string prompt = tokenizer_->Decode(generations_->requests().back().prompt_ids, /*skip_special=*/false);
  EXPECT_THAT(prompt, HasSubstr(absl::StrCat("\"maximum\": ", digits, ", \"minimum\": -", digits)));
  for (const char* field : {"temperature", "seed", "max_tokens"}) {
    const TestReply refused = AskChat(absl::StrCat(",\"", field, "\":", digits));
    EXPECT_EQ(CodeOf(refused), "invalid_value") << field;
    EXPECT_THAT(refused.body, HasSubstr(absl::StrCat("got the number ", digits)));
  }
}

TEST_F(OpenAiApiTest, WholeChatReplyHasOpenAisShape) {
  generations_->SetScript({.text = "Hello world", .cached_prompt_tokens = 2});
  const TestReply reply = AskChat();
  ASSERT_EQ(reply.status, 200) << reply.body;
  const Json json = Parse(reply.body);
  EXPECT_EQ(json["object"], "chat.completion");
  EXPECT_EQ(json["model"], "demo/model");
  EXPECT_EQ(json["id"].get<std::string>().substr(0, 9), "chatcmpl-");
  EXPECT_EQ(json["choices"][0]["message"]["role"], "assistant");
  EXPECT_EQ(json["choices"][0]["message"]["content"], "Hello world");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(json["choices"][0]["logprobs"].is_null());
  const auto prompt_tokens = generations_->requests().back().prompt_ids.size();
  const auto completion_tokens = TokenCount("Hello world") + 1;
  EXPECT_EQ(json["usage"]["prompt_tokens"], prompt_tokens);
  EXPECT_EQ(json["usage"]["completion_tokens"], completion_tokens);
  EXPECT_EQ(json["usage"]["total_tokens"], prompt_tokens + completion_tokens);
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
  EXPECT_EQ(json["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, StreamHasRoleContentFinishAndDone) {
  TestClient client(public_->port());
  for (const bool usage : {false, true}) {  // twice on one connection: a good stream does not end it
    client.Send(Post("/v1/chat/completions",
                     Chat(usage ? R"(,"stream":true,"stream_options":{"include_usage":true})" : R"(,"stream":true)")));
    TestReply reply = client.Read();
    ASSERT_EQ(reply.status, 200);
    EXPECT_EQ(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    EXPECT_EQ(reply.headers["cache-control"], "no-cache");
    const auto events = Events(reply.body);
    ASSERT_GE(events.size(), 4u);
    EXPECT_EQ(events.back(), "[DONE]");
    EXPECT_EQ(Parse(events[0])["choices"][0]["delta"]["role"], "assistant");
    EXPECT_EQ(Joined(events, "content"), "Hello world");
    EXPECT_EQ(FinishReason(events), "stop");
    const Json first = Parse(events[0]);
    for (size_t i = 0; i + 1 < events.size(); ++i) {
      const Json chunk = Parse(events[i]);
      EXPECT_EQ(chunk["object"], "chat.completion.chunk");
      EXPECT_EQ(chunk["id"], first["id"]);
      EXPECT_EQ(chunk["created"], first["created"]);
      EXPECT_EQ(chunk.contains("usage"), usage);
    }
    if (!usage) continue;
    const Json last = Parse(events[events.size() - 2]);
    EXPECT_TRUE(last["choices"].is_array() && last["choices"].empty());
    EXPECT_EQ(last["usage"]["completion_tokens"], TokenCount("Hello world") + 1);
  }
}

TEST_F(OpenAiApiTest, LengthEndsWithItsReason) {
  EXPECT_EQ(Parse(AskChat(R"(,"max_tokens":1)").body)["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(FinishReason(Events(AskChat(R"(,"max_tokens":1,"stream":true)").body)), "length");
}

TEST_F(OpenAiApiTest, StopStringsAreTrimmedAndCancelTheRest) {
  const std::string text = "one two three four";
  generations_->SetScript({.text = text, .cached_prompt_tokens = 1});
  const Json json = Parse(AskChat(R"(,"stop":["wo th","four"])").body);
  EXPECT_EQ(json["choices"][0]["message"]["content"], "one t");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
  EXPECT_LT(json["usage"]["completion_tokens"], TokenCount(text));
  EXPECT_EQ(Joined(Events(AskChat(R"(,"stream":true,"stop":"o thr")").body), "content"), "one tw");
  EXPECT_EQ(Joined(Events(AskChat(R"(,"stream":true,"stop":"one two three four")").body), "content"), "");
  EXPECT_EQ(Joined(Events(AskChat(R"(,"stream":true,"stop":"four!")").body), "content"), text);
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, ReasoningIsApartAndCounted) {
  generations_->SetScript({.text = "I think so</think>Yes"});
  for (const char* how : {R"(,"reasoning_effort":"high")", R"(,"thinking":{"type":"enabled"})",
                          R"(,"chat_template_kwargs":{"thinking":true})"}) {
    const Json json = Parse(AskChat(how).body);
    EXPECT_EQ(json["choices"][0]["message"]["reasoning_content"], "I think so") << how;
    EXPECT_EQ(json["choices"][0]["message"]["content"], "Yes");
    EXPECT_EQ(json["usage"]["completion_tokens_details"]["reasoning_tokens"], TokenCount("I think so</think>"));
    const auto events = Events(AskChat(std::string(how) + R"(,"stream":true)").body);
    EXPECT_EQ(Joined(events, "reasoning_content"), "I think so");
    EXPECT_EQ(Joined(events, "content"), "Yes");
  }
  for (const char* how : {"", R"(,"reasoning_effort":"none")"}) {
    EXPECT_FALSE(Parse(AskChat(how).body)["choices"][0]["message"].contains("reasoning_content"));
  }
}

TEST_F(OpenAiApiTest, ToolCallsStreamWithIndexIdAndArguments) {
  const std::string tools =
      R"(,"tools":[{"type":"function","function":{"name":"get_weather","parameters":{"type":"object"}}}])";
  const std::string call =
      "<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">"
      "Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n";
  generations_->SetScript({.text = "Let me look.\n\n<｜DSML｜tool_calls>\n" + call + call + "</｜DSML｜tool_calls>"});
  const Json json = Parse(AskChat(tools).body);
  EXPECT_EQ(json["choices"][0]["finish_reason"], "tool_calls");
  const Json& message = json["choices"][0]["message"];
  EXPECT_EQ(message["content"], "Let me look.");
  ASSERT_EQ(message["tool_calls"].size(), 2u);
  EXPECT_EQ(message["tool_calls"][0]["type"], "function");
  EXPECT_EQ(message["tool_calls"][0]["function"]["name"], "get_weather");
  EXPECT_EQ(Parse(message["tool_calls"][1]["function"]["arguments"])["city"], "Rome");
  EXPECT_NE(message["tool_calls"][0]["id"], message["tool_calls"][1]["id"]);

  const TestReply reply = AskChat(tools + R"(,"stream":true)");
  EXPECT_THAT(reply.body, Not(HasSubstr("DSML")));
  std::string arguments[2];
  int starts = 0;
  const auto events = Events(reply.body);
  for (const auto& event : events) {
    const Json chunk = Parse(event);
    if (!chunk.is_object() || !chunk["choices"][0]["delta"].contains("tool_calls")) continue;
    for (const auto& piece : chunk["choices"][0]["delta"]["tool_calls"]) {
      starts += piece.contains("id");
      arguments[piece["index"].get<int>()] += piece["function"]["arguments"].get<std::string>();
    }
  }
  EXPECT_EQ(starts, 2);
  for (const auto& text : arguments) EXPECT_EQ(Parse(text)["city"], "Rome");
  EXPECT_EQ(FinishReason(events), "tool_calls");

  const Json plain = Parse(AskChat(tools + R"(,"tool_choice":"none")").body);
  EXPECT_FALSE(plain["choices"][0]["message"].contains("tool_calls"));
  EXPECT_EQ(plain["choices"][0]["finish_reason"], "stop");
}

TEST_F(OpenAiApiTest, SeveralChoicesShareAReply) {
  const Json json = Parse(AskChat(R"(,"n":3)").body);
  ASSERT_EQ(json["choices"].size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(json["choices"][i]["index"], i);
  EXPECT_EQ(json["usage"]["completion_tokens"], 3 * (TokenCount("Hello world") + 1));
  const auto requests = generations_->requests();
  EXPECT_EQ(requests[0].sampling.seed, requests[2].sampling.seed);
  EXPECT_EQ(requests[2].choice, 2);

  const auto events = Events(AskChat(R"(,"n":3,"stream":true)").body);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Joined(events, "content", i), "Hello world");
    EXPECT_EQ(Joined(events, "role", i), "assistant");
    EXPECT_EQ(FinishReason(events, i), "stop");
  }
  EXPECT_EQ(events.back(), "[DONE]");
}

TEST_F(OpenAiApiTest, LogprobsHaveAnEntryForEveryToken) {
  const size_t tokens = TokenCount("Hello world") + 1;
  const std::string how = R"(,"logprobs":true,"top_logprobs":2)";
  const Json content = Parse(AskChat(how).body)["choices"][0]["logprobs"]["content"];
  ASSERT_EQ(content.size(), tokens);
  EXPECT_EQ(content[1]["logprob"], -0.25);
  EXPECT_EQ(content[0]["top_logprobs"].size(), 2u);
  EXPECT_TRUE(content[0]["bytes"].is_array());
  std::string text;
  for (size_t i = 0; i + 1 < tokens; ++i) text += content[i]["token"].get<std::string>();
  EXPECT_EQ(text, "Hello world");

  size_t streamed = 0;
  for (const auto& event : Events(AskChat(how + R"(,"stream":true)").body)) {
    const Json chunk = Parse(event);
    if (chunk.is_object() && chunk["choices"][0]["logprobs"].is_object()) {
      streamed += chunk["choices"][0]["logprobs"]["content"].size();
    }
  }
  EXPECT_EQ(streamed, tokens);

  const Json plain = Parse(AskCompletion(R"(,"prompt":"Hi","logprobs":1)").body)["choices"][0]["logprobs"];
  EXPECT_EQ(plain["tokens"].size(), tokens);
  EXPECT_EQ(plain["token_logprobs"][1], -0.25);
  EXPECT_EQ(plain["top_logprobs"].size(), tokens);
  EXPECT_EQ(plain["text_offset"][0], 0);
}

TEST_F(OpenAiApiTest, CompletionsTakeTextIdsSuffixAndEcho) {
  Json json = Parse(AskCompletion(R"(,"prompt":"Hi there")").body);
  EXPECT_EQ(json["object"], "text_completion");
  EXPECT_EQ(json["choices"][0]["text"], "Hello world");
  EXPECT_EQ(generations_->requests().back().prompt_ids, *tokenizer_->Encode("Hi there", text::SpecialTokens::kPlain));
  EXPECT_EQ(AskCompletion(R"(,"prompt":[100,1e2])").status, 200);
  EXPECT_THAT(generations_->requests().back().prompt_ids, ElementsAre(100, 100));
  EXPECT_EQ(Parse(AskCompletion(R"(,"prompt":"Hi ","echo":true)").body)["choices"][0]["text"], "Hi Hello world");
  const auto events = Events(AskCompletion(R"(,"prompt":"Hi ","echo":true,"stream":true)").body);
  EXPECT_EQ(Joined(events, "text"), "Hi Hello world");
  EXPECT_EQ(events.back(), "[DONE]");
  EXPECT_EQ(AskCompletion(R"(,"prompt":"def f(","suffix":"return x")").status, 200);
  const auto ids = generations_->requests().back().prompt_ids;
  EXPECT_EQ(ids.front(), *tokenizer_->TokenId("<｜begin▁of▁sentence｜>"));
  EXPECT_EQ(ids.back(), *tokenizer_->TokenId("<｜fim▁end｜>"));
}

TEST_F(OpenAiApiTest, SeveralPromptsAreAnsweredInOrderAndCountedOnce) {
  const Json reply =
      Parse(AskCompletion(R"(,"prompt":["Hi there","Compute 1",[40,41,42]],"n":2,"seed":5,"echo":true)").body);
  ASSERT_EQ(reply["choices"].size(), 6u) << reply;
  for (int i = 0; i < 6; ++i) EXPECT_EQ(reply["choices"][i]["index"], i);
  EXPECT_THAT(reply["choices"][1]["text"].get<std::string>(), ::testing::StartsWith("Hi there"));
  EXPECT_THAT(reply["choices"][2]["text"].get<std::string>(), ::testing::StartsWith("Compute 1"));
  const auto requests = generations_->requests();
  ASSERT_EQ(requests.size(), 6u);
  int64_t tokens = 0;
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(requests[i].choice, i % 2) << "with one seed, each prompt draws what it draws alone";
    EXPECT_EQ(requests[i].prompt_ids, requests[i - i % 2].prompt_ids);
    if (i % 2 == 0) tokens += static_cast<int64_t>(requests[i].prompt_ids.size());
  }
  EXPECT_THAT(requests[4].prompt_ids, ElementsAre(40, 41, 42));
  EXPECT_EQ(reply["usage"]["prompt_tokens"], tokens);

  const auto events = Events(AskCompletion(R"(,"prompt":["Hi","Ho"],"stream":true,"echo":true)").body);
  EXPECT_EQ(Joined(events, "text", 0), "HiHello world");
  EXPECT_EQ(Joined(events, "text", 1), "HoHello world");
  EXPECT_EQ(events.back(), "[DONE]");
}

TEST_F(OpenAiApiTest, SeveralPromptsAreCheckedOneByOne) {
  const auto refused = [&](const std::string& members, const std::string& code, const std::string& param) {
    const TestReply reply = AskCompletion(members);
    EXPECT_EQ(reply.status, 400) << members;
    EXPECT_EQ(CodeOf(reply), code) << members;
    EXPECT_EQ(ParamOf(reply), param) << members;
  };
  refused(R"(,"prompt":["a",""])", "empty_prompt", "prompt[1]");
  refused(R"(,"prompt":["a",[]])", "empty_prompt", "prompt[1]");
  refused(R"(,"prompt":["a",7])", "invalid_type", "prompt[1]");
  refused(R"(,"prompt":[[1,2],[3,-1]])", "invalid_token_id", "prompt[1][1]");
  refused(R"(,"prompt":["a","b"],"suffix":"c")", "unsupported_parameter", "suffix");
  refused(absl::StrCat(R"(,"prompt":[)", absl::StrJoin(std::vector<std::string>(33, R"("a")"), ","), "]"),
          "too_many_items", "prompt");
  refused(absl::StrCat(R"(,"n":8,"prompt":[)", absl::StrJoin(std::vector<std::string>(9, R"("a")"), ","), "]"),
          "too_many_items", "prompt");
  refused(absl::StrCat(R"(,"max_tokens":10,"prompt":["a",[)", absl::StrJoin(std::vector<int>(kContext - 5, 100), ","),
                       "]]"),
          "context_length_exceeded", "");
  EXPECT_TRUE(generations_->requests().empty());
}

TEST_F(OpenAiApiTest, ErrorsBeforeTheFirstByteAreHttpErrors) {
  for (const bool stream : {false, true}) {
    const std::string members = stream ? R"(,"stream":true)" : "";
    generations_->SetScript({.start_error = MakeError(absl::StatusCode::kResourceExhausted, "Queue full.",
                                                      {.code = "overloaded", .retry_after_s = 7})});
    TestReply reply = AskChat(members);
    EXPECT_EQ(reply.status, 429);
    EXPECT_EQ(reply.headers["retry-after"], "7");
    EXPECT_EQ(CodeOf(reply), "overloaded");
    generations_->SetScript({.start_error = absl::DeadlineExceededError("late")});
    EXPECT_EQ(AskChat(members).status, 504);
  }
  generations_->SetScript({.text = "abc def", .error = absl::DataLossError("digest of 10.1.2.3"), .error_after = 1});
  const TestReply reply = AskChat();
  EXPECT_EQ(reply.status, 500);
  EXPECT_THAT(reply.body, Not(HasSubstr("10.1.2.3")));
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, AnErrorInsideAStreamIsAnEventAndTheEnd) {
  generations_->SetScript({.text = "one two three", .error = absl::UnavailableError("decode died"), .error_after = 2});
  TestClient client(public_->port());
  client.Send(Post("/v1/chat/completions", Chat(R"(,"stream":true,"n":2)")));
  const TestReply reply = client.Read();
  EXPECT_EQ(reply.status, 200);
  const auto events = Events(reply.body);
  ASSERT_FALSE(events.empty());
  const Json error = Parse(events.back())["error"];
  EXPECT_EQ(error["code"], "no_capacity");
  EXPECT_TRUE(error["delivered_tokens"].is_number());
  EXPECT_THAT(reply.body, Not(HasSubstr("[DONE]")));
  EXPECT_TRUE(client.WaitForClose());
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, HangingUpCancelsWhateverTheRequestWaitsFor) {
  for (const int hold : {0, 2}) {
    for (const bool stream : {false, true}) {
      generations_->SetScript({.text = "one two three four", .hold_after = hold});
      const int before = generations_->cancelled();
      {
        TestClient client(public_->port());
        client.Send(Post("/v1/chat/completions", Chat(stream ? R"(,"n":2,"stream":true)" : R"(,"n":2)")));
        ASSERT_TRUE(Eventually([&] { return generations_->running() == 2; }));
      }
      EXPECT_TRUE(Quiet());
      EXPECT_EQ(generations_->cancelled(), before + 2);
    }
  }
}

TEST_F(OpenAiApiTest, ManyClientsThatLeaveAtOnceLeaveNothingBehind) {
  generations_->SetScript({.text = "one two three four", .token_delay = std::chrono::microseconds(300)});
  for (int i = 0; i < 300; ++i) {
    TestClient client(public_->port());
    client.Send(Post("/v1/chat/completions", Chat(i % 2 ? R"(,"stream":true)" : "")));
    std::this_thread::sleep_for(std::chrono::microseconds(10 * i));
  }
  EXPECT_TRUE(Quiet());
  EXPECT_THAT(AskOperator(Get("/metrics")).body, HasSubstr("millrace_requests_running{role=\"router\"} 0"));
}

TEST_F(OpenAiApiTest, QuietStreamsArePingedUntilTheirTurn) {
  ApiLimits limits;
  limits.ping_interval = std::chrono::milliseconds(50);
  StartServers(limits);
  generations_->SetScript({.text = "Hello world", .hold_after = 0});
  TestClient client(public_->port());
  client.Send(Post("/v1/chat/completions", Chat(R"(,"stream":true)")));
  ASSERT_TRUE(client.WaitFor(": ping\n\n"));
  EXPECT_THAT(client.buffer(), Not(HasSubstr("assistant")));
  generations_->Release();
  const auto events = Events(client.Read().body);
  EXPECT_EQ(Joined(events, "content"), "Hello world");
  EXPECT_EQ(events.back(), "[DONE]");
}

TEST_F(OpenAiApiTest, TheRoleComesAtAdmission) {
  generations_->SetScript({.text = "one two three", .hold_after = 1});
  TestClient client(public_->port());
  client.Send(Post("/v1/chat/completions", Chat(R"(,"stream":true)")));
  EXPECT_TRUE(client.WaitFor("assistant"));
  generations_->Release();
  EXPECT_EQ(Joined(Events(client.Read().body), "content"), "one two three");
}

TEST_F(OpenAiApiTest, TheFrontEndsWhatTheClusterForgot) {
  ApiLimits limits;
  limits.deadline_grace = std::chrono::milliseconds(50);
  StartServers(limits);
  generations_->SetScript({.text = "x", .hold_after = 0});
  const TestReply reply = AskChat("", "x-request-timeout-ms: 100\r\n");
  EXPECT_EQ(reply.status, 504);
  EXPECT_EQ(CodeOf(reply), "deadline_exceeded");
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, SlowReadersArePausedThenEndedWithTheirReason) {
  HttpLimits limits;
  limits.soft_write_buffer_bytes = 32 << 10;
  limits.slow_reader_timeout = std::chrono::milliseconds(300);
  StartServers({}, limits);
  generations_->SetScript({.text = "one two three four five six seven eight nine ten ", .repeat = true});
  TestClient client(public_->port(), 4096);
  client.Send(Post("/v1/completions", R"({"model":"demo/model","prompt":"a","stream":true,"max_tokens":2000,"n":8,)"
                                      R"("logprobs":20})"));
  EXPECT_TRUE(Eventually([&] { return generations_->pauses() > 0; }));
  EXPECT_TRUE(Quiet());
  EXPECT_THAT(AskOperator(Get("/metrics")).body, HasSubstr("millrace_slow_consumers_total 1"));
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

TEST_F(OpenAiApiTest, StoppingTheServerCancelsWhatRuns) {
  generations_->SetScript({.text = "x", .hold_after = 0});
  TestClient client(public_->port());
  client.Send(Post("/v1/chat/completions", Chat(R"(,"stream":true)")));
  ASSERT_TRUE(Eventually([&] { return generations_->running() == 1; }));
  public_.reset();
  EXPECT_EQ(generations_->cancelled(), 1);
  EXPECT_TRUE(Quiet());
}

}  // namespace
}  // namespace millrace::router
