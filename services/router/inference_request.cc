// SPDX-License-Identifier: Apache-2.0
// inference.proto to the JSON of the OpenAI API, then through its parser.
#include "services/router/inference_request.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/error.h"
#include "services/router/json_reader.h"

namespace millrace::router {
namespace {

constexpr size_t kMaxStops = 16;
constexpr int64_t kMaxRequestIdBytes = 128;

absl::Status CheckRequestId(const std::string& id) {
  const bool printable = std::all_of(id.begin(), id.end(), [](char c) { return c > 0x20 && c < 0x7f; });
  if (id.size() <= kMaxRequestIdBytes && printable) return absl::OkStatus();
  return InvalidRequest("invalid_value", "request_id", "request_id: expected 1 to 128 printable ASCII characters");
}

// A float of the proto as the decimal number that it is the nearest float to: 0.9f reads as 0.9 over HTTP too.
double Decimal(float value) {
  double out = value;
  const std::string text = absl::StrCat(value);
  return absl::SimpleAtod(text, &out) ? out : static_cast<double>(value);
}

absl::Status AddOptions(const v1::GenerationOptions& options, Json& body) {
  if (options.has_temperature()) body["temperature"] = Decimal(options.temperature());
  if (options.has_top_p()) body["top_p"] = Decimal(options.top_p());
  if (options.has_top_k()) body["top_k"] = options.top_k();
  if (options.has_min_p()) body["min_p"] = Decimal(options.min_p());
  if (options.has_presence_penalty()) body["presence_penalty"] = Decimal(options.presence_penalty());
  if (options.has_frequency_penalty()) body["frequency_penalty"] = Decimal(options.frequency_penalty());
  if (options.has_repetition_penalty()) body["repetition_penalty"] = Decimal(options.repetition_penalty());
  if (options.has_max_tokens()) body["max_tokens"] = options.max_tokens();
  if (options.min_tokens() > 0) body["min_tokens"] = options.min_tokens();
  if (options.ignore_eos()) body["ignore_eos"] = true;
  for (const std::string& stop : options.stop()) body["stop"].push_back(stop);
  for (int i = 0; i < options.logit_bias_size(); ++i) {
    const std::string id = absl::StrCat(options.logit_bias(i).id());
    if (body.contains("logit_bias") && body["logit_bias"].contains(id)) {
      return InvalidRequest("duplicate_key", absl::StrCat("options.logit_bias[", i, "].id"),
                            absl::StrCat("options.logit_bias[", i, "].id: this token id appears twice"));
    }
    body["logit_bias"][id] = Decimal(options.logit_bias(i).bias());
  }
  return absl::OkStatus();
}

// What JSON cannot say: seeds of 64 bits without sign, and log-probabilities under another name in each API.
absl::Status Finish(const v1::GenerationOptions& options, ApiRequest& request) {
  if (options.has_seed()) {
    request.sampling.seed = options.seed();
    request.has_seed = true;
  }
  if (options.has_num_logprobs()) {
    if (options.num_logprobs() > 20) {
      return InvalidRequest("invalid_value", "options.num_logprobs", "options.num_logprobs: expected 0 to 20");
    }
    request.num_logprobs = static_cast<int32_t>(options.num_logprobs());
  }
  return absl::OkStatus();
}

absl::StatusOr<Json> ParseJsonField(const std::string& text, const std::string& field) {
  absl::StatusOr<Json> json = ReadJson(text);
  if (json.ok()) return json;
  return InvalidRequest("invalid_json", field, absl::StrCat(field, ": ", json.status().message()));
}

}  // namespace

absl::StatusOr<ApiRequest> FromGenerate(const v1::GenerateRequest& request, const ServedModel& model,
                                        ApiLimits limits) {
  RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  Json body = {{"model", request.model().empty() ? model.id : request.model()}};
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      body["prompt"] = request.text();
      break;
    case v1::GenerateRequest::kIds:
      body["prompt"] = Json::array();
      for (int32_t id : request.ids().ids()) body["prompt"].push_back(id);
      break;
    case v1::GenerateRequest::PROMPT_NOT_SET:
      return InvalidRequest("missing_field", "prompt", "prompt: expected text or ids");
  }
  RETURN_IF_ERROR(AddOptions(request.options(), body));
  limits.max_stops = kMaxStops;
  limits.completion_default_max_tokens = 0;  // OpenAI's few are for its own endpoint
  ASSIGN_OR_RETURN(ApiRequest api, ParseCompletionRequest(body, model, limits));
  RETURN_IF_ERROR(Finish(request.options(), api));
  return api;
}

absl::StatusOr<ApiRequest> FromChat(const v1::ChatRequest& request, const ServedModel& model, ApiLimits limits) {
  RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  Json body = {{"model", request.model().empty() ? model.id : request.model()}, {"messages", Json::array()}};
  for (int i = 0; i < request.messages_size(); ++i) {
    const v1::ChatMessage& message = request.messages(i);
    Json out = {{"role", message.role()}, {"content", message.content()}};
    if (!message.reasoning_content().empty()) out["reasoning_content"] = message.reasoning_content();
    if (!message.tool_call_id().empty()) out["tool_call_id"] = message.tool_call_id();
    if (!message.name().empty()) out["name"] = message.name();
    for (const v1::ToolCall& call : message.tool_calls()) {
      out["tool_calls"].push_back({{"id", call.id()},
                                   {"type", "function"},
                                   {"function", {{"name", call.name()}, {"arguments", call.arguments_json()}}}});
    }
    body["messages"].push_back(std::move(out));
  }
  for (int i = 0; i < request.tools_size(); ++i) {
    const v1::Tool& tool = request.tools(i);
    Json function = {{"name", tool.name()}};
    if (!tool.description().empty()) function["description"] = tool.description();
    if (!tool.parameters_json().empty()) {
      ASSIGN_OR_RETURN(function["parameters"],
                       ParseJsonField(tool.parameters_json(), absl::StrCat("tools[", i, "].parameters_json")));
    }
    if (tool.strict()) function["strict"] = true;
    body["tools"].push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  if (request.tool_choice() == v1::TOOL_CHOICE_NONE) {
    body["tool_choice"] = "none";
  } else if (request.tool_choice() != v1::TOOL_CHOICE_UNSPECIFIED && request.tool_choice() != v1::TOOL_CHOICE_AUTO) {
    return InvalidRequest("invalid_value", "tool_choice", "tool_choice: expected AUTO or NONE");
  }
  switch (request.reasoning_effort()) {
    case v1::REASONING_EFFORT_UNSPECIFIED:
      break;
    case v1::REASONING_EFFORT_NONE:
      body["reasoning_effort"] = "none";
      break;
    case v1::REASONING_EFFORT_HIGH:
      body["reasoning_effort"] = "high";
      break;
    case v1::REASONING_EFFORT_MAX:
      body["reasoning_effort"] = "max";
      break;
    default:
      return InvalidRequest("invalid_value", "reasoning_effort", "reasoning_effort: expected NONE, HIGH or MAX");
  }
  if (request.has_thinking()) body["thinking"] = {{"type", request.thinking() ? "enabled" : "disabled"}};
  RETURN_IF_ERROR(AddOptions(request.options(), body));
  limits.max_stops = kMaxStops;
  ASSIGN_OR_RETURN(ApiRequest api, ParseChatRequest(body, model, limits));
  RETURN_IF_ERROR(Finish(request.options(), api));
  return api;
}

}  // namespace millrace::router
