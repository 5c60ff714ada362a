// SPDX-License-Identifier: Apache-2.0
// What clients send: HTTP heads, JSON, and the requests of both fronts.
#include <nlohmann/json.hpp>

#include "engine/status.h"
#include "engine/text/tokenizer.h"
#include "millrace/v1/inference.pb.h"
#include "services/common/error.h"
#include "services/router/http_head.h"
#include "services/router/inference_request.h"
#include "services/router/json_reader.h"
#include "services/router/openai_request.h"
#include "services/router/openai_response.h"
#include "tests/fuzz/targets.h"

namespace millrace::fuzz {
namespace {

using router::ApiRequest;

const router::ServedModel& Model() {
  static const router::ServedModel* model = [] {
    auto tokenizer = text::Tokenizer::Load("deploy/demo/model/tokenizer.json", 1536);
    CHECK(tokenizer.ok(), std::string(tokenizer.status().message()));
    auto* served = new router::ServedModel;
    served->id = "demo";
    served->context_length = 2048;
    served->vocab_size = 1536;
    served->tokenizer = tokenizer->release();
    return served;
  }();
  return *model;
}

void HttpHead(std::string_view input) {
  const router::HttpLimits limits;
  const auto whole = router::CheckHttpHead(input, limits);
  if (!whole.ok()) {
    CHECK(GetApiError(whole.status()).has_value(), "a refusal without its code word");
    return;
  }
  CHECK(whole->bytes <= input.size() && !(whole->chunked && whole->content_length.has_value()));
  if (whole->bytes == 0) return;
  // What follows a head is not its business, and no part of it is a head already.
  const auto alone = router::CheckHttpHead(input.substr(0, whole->bytes), limits);
  CHECK(alone.ok() && alone->bytes == whole->bytes && alone->content_length == whole->content_length);
  const auto part = router::CheckHttpHead(input.substr(0, whole->bytes - 1), limits);
  CHECK(part.ok() && part->bytes == 0);
}

std::vector<std::string> HttpHeadSeeds() {
  return {
      "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
      "GET /v1/models HTTP/1.1\r\nHost: [::1]:8080\r\nAccept: */*\r\nConnection: keep-alive\r\n\r\n",
      "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n0\r\n\r\n",
      "GET / HTTP/1.0\r\n\r\n",
      "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
  };
}

// Whatever we take, a forgiving reader takes too, and it is written as something we take.
void JsonText(std::string_view input) {
  const auto ours = router::ReadJson(input);
  const bool theirs = nlohmann::ordered_json::accept(input);
  if (!ours.ok()) {
    const auto error = GetApiError(ours.status());
    CHECK(error.has_value(), "a refusal without its code word");
    // A word for "not JSON at all" must not fall on what is JSON. The other reader skips a byte-order mark and takes a
    // NUL for the end; neither is JSON.
    const bool lenient = input.substr(0, 3) == "\xEF\xBB\xBF" || input.find('\0') != std::string_view::npos;
    if (theirs && !lenient) CHECK(error->code != "invalid_json", QuoteInput(input));
    return;
  }
  CHECK(theirs, "not JSON");
  if (input.find_first_of("0123456789") != std::string_view::npos) return;  // numbers change their spelling
  const auto again = router::ReadJson(router::DumpJson(*ours));
  CHECK(again.ok() && *again == *ours, "a value that does not survive being written");
}

std::vector<std::string> JsonSeeds() {
  return {R"({"a":[1,-2.5e3,true,false,null,"x\u00e9\ud83d\ude00\n"],"b":{"c":{}}})",
          R"([[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[0]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]])", R"(123456789012345678901234567890)",
          "\"\xE8\x8B\x8D\xE9\xB9\xAD\"", R"({"a":1,"a":2})"};
}

void CheckRequest(const absl::StatusOr<ApiRequest>& request) {
  if (!request.ok()) {
    CHECK(GetApiError(request.status()).has_value(), std::string(request.status().message()));
    return;
  }
  CHECK(!request->prompts.empty() && request->n >= 1 && request->max_tokens >= 1);
  CHECK(request->min_tokens >= 0 && request->min_tokens <= request->max_tokens);
  for (const auto& ids : request->prompts) {
    CHECK(!ids.empty() && ids.size() + static_cast<size_t>(request->max_tokens) <= 2048);
    for (const int32_t id : ids) CHECK(id >= 0 && id < Model().vocab_size);
  }
}

void OpenAiRequest(std::string_view input) {
  const auto body = router::ReadJson(input);
  if (!body.ok()) return;
  CheckRequest(router::ParseChatRequest(*body, Model(), {}));
  CheckRequest(router::ParseCompletionRequest(*body, Model(), {}));
}

std::vector<std::string> OpenAiSeeds() {
  return {
      R"({"model":"demo","messages":[{"role":"user","content":"Hi"}],"stream":true,"stream_options":{"include_usage":true}})",
      R"({"model":"demo","messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"t"}]},)"
      R"({"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f",)"
      R"("arguments":"{\"a\":1}"}}]},{"role":"tool","tool_call_id":"c","content":"r"}],"tools":[{"type":"function",)"
      R"("function":{"name":"f","parameters":{"type":"object","maximum":123456789012345678901234567890}}}],)"
      R"("tool_choice":"auto","reasoning_effort":"high","response_format":{"type":"json_object"}})",
      R"({"model":"demo","messages":[{"role":"user","content":"x"}],"temperature":0.5,"top_p":0.9,"top_k":5,"seed":1,)"
      R"("n":2,"stop":["a","b"],"logit_bias":{"5":1},"logprobs":true,"top_logprobs":2,"max_completion_tokens":5})",
      R"({"model":"demo","prompt":["a",[1,2,3]],"n":2,"echo":true,"max_tokens":5,"logit_bias":{"7":-100}})",
      R"({"model":"demo","prompt":"fox1","suffix":"fox3","logprobs":2,"ignore_eos":true,"min_tokens":2})",
  };
}

// The first byte says which message the rest is.
void GrpcRequest(std::string_view input) {
  if (input.empty()) return;
  const std::string bytes(input.substr(1));
  if (input[0] % 2 == 0) {
    v1::GenerateRequest request;
    if (request.ParseFromString(bytes)) CheckRequest(router::FromGenerate(request, Model(), {}));
  } else {
    v1::ChatRequest request;
    if (request.ParseFromString(bytes)) CheckRequest(router::FromChat(request, Model(), {}));
  }
}

std::vector<std::string> GrpcSeeds() {
  v1::GenerateRequest generate;
  generate.set_text("one two three");
  generate.mutable_options()->set_temperature(0.5f);
  generate.mutable_options()->add_stop("x");
  generate.mutable_options()->add_logit_bias()->set_id(7);
  v1::GenerateRequest ids;
  for (const int id : {1, 2, 1535}) ids.mutable_ids()->add_ids(id);
  v1::ChatRequest chat;
  auto* message = chat.add_messages();
  message->set_role("user");
  message->set_content("Hi");
  auto* tool = chat.add_tools();
  tool->set_name("f");
  tool->set_parameters_json(R"({"type":"object"})");
  chat.set_reasoning_effort(v1::REASONING_EFFORT_MAX);
  return {'\0' + generate.SerializeAsString(), '\0' + ids.SerializeAsString(), '\1' + chat.SerializeAsString()};
}

}  // namespace

std::vector<Target> FrontTargets() {
  return {{"http_head", HttpHead, HttpHeadSeeds},
          {"json", JsonText, JsonSeeds},
          {"openai_request", OpenAiRequest, OpenAiSeeds},
          {"grpc_request", GrpcRequest, GrpcSeeds}};
}

}  // namespace millrace::fuzz
