// SPDX-License-Identifier: Apache-2.0
// Both listeners over a scripted engine, for the tests of the OpenAI surface, and words for what is asked of them and
// for what they answer.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "services/common/error.h"
#include "services/common/test_wait.h"
#include "services/router/fake_generation_service.h"
#include "services/router/http_test_client.h"
#include "services/router/json_reader.h"
#include "services/router/openai_api.h"

namespace millrace::router {

inline constexpr int kContext = 2048;

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
    options.operator_hosts = {"a"};  // what the tests' requests call it
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

  // Nothing of any request is left.
  bool Quiet() {
    return Eventually([&] { return generations_->running() == 0 && api_->num_requests() == 0; });
  }

  std::string drained_;                                    // the worker that was asked to drain
  int32_t max_tokens_limit_ = 0, default_max_tokens_ = 0;  // of the model, when the servers start
  static inline text::Tokenizer* tokenizer_ = nullptr;
  TraceLog traces_{{}};
  std::shared_ptr<prometheus::Registry> registry_;
  std::unique_ptr<HttpMetrics> metrics_;
  std::unique_ptr<FakeGenerationService> generations_;
  std::unique_ptr<OpenAiApi> api_;
  std::unique_ptr<HttpServer> public_, operator_;
};

}  // namespace millrace::router
