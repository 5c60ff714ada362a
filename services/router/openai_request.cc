// SPDX-License-Identifier: Apache-2.0
// Fields common to both endpoints and the token budget. The checks of messages and tools are in openai_messages.cc,
// prompts become ids in openai_prompt.cc.
#include "services/router/openai_request.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <utility>

#include "absl/strings/numbers.h"
#include "engine/status.h"
#include "engine/text/concat.h"
#include "services/common/error.h"
#include "services/router/json_fields.h"
#include "services/router/openai_messages.h"
#include "services/router/openai_prompt.h"

namespace millrace::router {
namespace {

using text::Concat;

// Below this a distribution is a single spike in float32: greedy, without the overflow.
constexpr double kGreedyTemperature = 1e-5;

// Fields that would change the answer and are not supported. Absent, null and false are fine.
constexpr std::string_view kUnsupported[] = {
    "audio",           "prediction",      "prompt_embeds", "functions",      "function_call",      "web_search_options",
    "guided_json",     "guided_regex",    "guided_choice", "guided_grammar", "structured_outputs", "logits_processors",
    "prompt_logprobs", "use_beam_search",
};

absl::Status CheckModel(JsonFields& fields, const ServedModel& model) {
  std::string name;
  if (fields.Get("model") == nullptr) {
    return InvalidRequest("missing_field", "model", "model: missing; name the model to use.");
  }
  RETURN_IF_ERROR(fields.Read("model", name, 256));
  if (name.empty()) return InvalidRequest("invalid_value", "model", "model: must not be empty.");
  if (name == model.id) return absl::OkStatus();
  return MakeError(
      absl::StatusCode::kNotFound,
      Concat("The model ", QuoteInput(name), " does not exist; this server has ", QuoteInput(model.id), "."),
      {.code = "model_not_found", .param = "model"});
}

absl::Status ReadStops(JsonFields& fields, const ApiLimits& limits, std::vector<std::string>& stops) {
  const Json* stop = fields.Get("stop");
  if (stop == nullptr) return absl::OkStatus();
  const auto add = [&](const Json& item, const std::string& param) -> absl::Status {
    if (!item.is_string()) return WrongType(param, "a string", &item);
    const auto& text = item.get_ref<const std::string&>();
    if (text.empty() || text.size() > limits.max_stop_bytes) {
      return InvalidRequest(
          "invalid_value", param,
          Concat(param, ": must have 1 to ", limits.max_stop_bytes, " bytes, has ", text.size(), "."));
    }
    stops.push_back(text);
    return absl::OkStatus();
  };
  if (stop->is_string()) return add(*stop, "stop");
  if (!stop->is_array()) return WrongType("stop", "a string or an array of strings", stop);
  if (stop->size() > limits.max_stops) {
    return InvalidRequest("too_many_items", "stop",
                          Concat("stop: ", stop->size(), " strings, the limit is ", limits.max_stops, "."));
  }
  for (size_t i = 0; i < stop->size(); ++i) RETURN_IF_ERROR(add((*stop)[i], Concat("stop[", i, "]")));
  return absl::OkStatus();
}

absl::Status ReadLogitBias(JsonFields& fields, const ServedModel& model, const ApiLimits& limits,
                           SamplingParams& sampling) {
  const Json* bias = fields.Get("logit_bias");
  if (bias == nullptr) return absl::OkStatus();
  if (!bias->is_object()) return WrongType("logit_bias", "an object from token ids to numbers", bias);
  if (bias->size() > limits.max_logit_bias) {
    return InvalidRequest("too_many_items", "logit_bias",
                          Concat("logit_bias: ", bias->size(), " entries, the limit is ", limits.max_logit_bias, "."));
  }
  std::map<int32_t, float> ordered;
  for (const auto& [key, value] : bias->items()) {
    int32_t id = -1;
    const std::string param = Concat("logit_bias[", QuoteInput(key), "]");
    const bool is_number = !key.empty() && key.find_first_not_of("0123456789") == std::string::npos;
    if (!is_number || !absl::SimpleAtoi(key, &id) || id >= model.vocab_size) {
      return InvalidRequest("invalid_token_id", param,
                            Concat(param, ": not a token id from 0 to ", model.vocab_size - 1, "."));
    }
    if (!value.is_number()) return WrongType(param, "a number from -100 to 100", &value);
    const double number = value.get<double>();
    if (!(std::abs(number) <= 100)) return WrongValue(param, "a number from -100 to 100", &value);
    if (!ordered.emplace(id, static_cast<float>(number)).second) {  // "7" and "07"
      return InvalidRequest("duplicate_key", param, Concat(param, ": this token id appears twice."));
    }
  }
  sampling.logit_bias.assign(ordered.begin(), ordered.end());
  return absl::OkStatus();
}

absl::Status ReadSampling(JsonFields& fields, const ServedModel& model, const ApiLimits& limits, ApiRequest& out) {
  SamplingParams& s = out.sampling;
  constexpr double kMin = std::numeric_limits<double>::min();
  RETURN_IF_ERROR(fields.ReadNumber("temperature", 0, 2, s.temperature));
  if (s.temperature < kGreedyTemperature) s.temperature = 0;
  RETURN_IF_ERROR(fields.ReadNumber("top_p", kMin, 1, s.top_p));
  RETURN_IF_ERROR(fields.ReadNumber("min_p", 0, 1, s.min_p));
  RETURN_IF_ERROR(fields.ReadNumber("presence_penalty", -2, 2, s.presence_penalty));
  RETURN_IF_ERROR(fields.ReadNumber("frequency_penalty", -2, 2, s.frequency_penalty));
  RETURN_IF_ERROR(fields.ReadNumber("repetition_penalty", kMin, 2, s.repetition_penalty));
  int64_t top_k = 0, seed = 0;
  RETURN_IF_ERROR(fields.ReadInteger("top_k", -1, std::numeric_limits<int32_t>::max(), top_k));
  s.top_k = static_cast<int32_t>(std::max<int64_t>(top_k, 0));  // -1 is vLLM's way to say off
  RETURN_IF_ERROR(fields.ReadInteger("seed", INT64_MIN, INT64_MAX, seed));
  out.has_seed = fields.Get("seed") != nullptr;
  s.seed = static_cast<uint64_t>(seed);
  return ReadLogitBias(fields, model, limits, s);
}

absl::Status ReadStreaming(JsonFields& fields, ApiRequest& out) {
  RETURN_IF_ERROR(fields.Read("stream", out.stream));
  const Json* options = fields.Get("stream_options");
  if (options == nullptr) return absl::OkStatus();
  if (!options->is_object()) return WrongType("stream_options", "an object", options);
  if (!out.stream) {
    return InvalidRequest("invalid_value", "stream_options", "stream_options: only allowed when stream is true.");
  }
  JsonFields stream_fields(*options, "stream_options.");
  return stream_fields.Read("include_usage", out.include_usage);
}

// Fields that name the caller or its bookkeeping: checked, then without effect.
absl::Status CheckBookkeeping(JsonFields& fields, const ApiLimits& limits, ApiRequest& out) {
  std::string ignored;
  for (const std::string_view name : {"user", "safety_identifier", "prompt_cache_key", "service_tier"}) {
    RETURN_IF_ERROR(fields.Read(name, ignored, limits.max_user_bytes));
  }
  bool store = false;
  RETURN_IF_ERROR(fields.Read("store", store));
  if (store) out.ignored.push_back("store");
  if (const Json* metadata = fields.Get("metadata"); metadata != nullptr) {
    if (!metadata->is_object()) return WrongType("metadata", "an object", metadata);
    if (metadata->size() > limits.max_metadata_entries) {
      return InvalidRequest("too_many_items", "metadata",
                            Concat("metadata: more than ", limits.max_metadata_entries, " entries."));
    }
    for (const auto& [key, value] : metadata->items()) {
      const std::string param = Concat("metadata[", QuoteInput(key), "]");
      if (!value.is_string()) return WrongType(param, "a string", &value);
      if (value.get_ref<const std::string&>().size() > limits.max_metadata_value_bytes) {
        return InvalidRequest("string_too_long", param,
                              Concat(param, ": longer than ", limits.max_metadata_value_bytes, " bytes."));
      }
    }
  }
  if (const Json* salt = fields.Get("cache_salt"); salt != nullptr) {
    RETURN_IF_ERROR(fields.Read("cache_salt", out.cache_salt, limits.max_cache_salt_bytes));
    if (out.cache_salt.empty()) return WrongValue("cache_salt", "a string that is not empty", salt);
  }
  return absl::OkStatus();
}

absl::Status CheckUnsupported(JsonFields& fields) {
  for (const std::string_view name : kUnsupported) {
    const Json* value = fields.Get(name);
    if (value != nullptr && *value != false) return Unsupported(name, "not supported by this server");
  }
  if (const Json* modalities = fields.Get("modalities");
      modalities != nullptr && *modalities != Json::array({"text"})) {
    return Unsupported("modalities", "only [\"text\"] is supported");
  }
  return absl::OkStatus();
}

absl::Status ReadCommon(JsonFields& fields, const ServedModel& model, const ApiLimits& limits, ApiRequest& out) {
  RETURN_IF_ERROR(CheckModel(fields, model));
  RETURN_IF_ERROR(CheckUnsupported(fields));
  int64_t n = 1;
  RETURN_IF_ERROR(fields.ReadInteger("n", 1, limits.max_n, n));
  out.n = static_cast<int32_t>(n);
  RETURN_IF_ERROR(ReadStreaming(fields, out));
  RETURN_IF_ERROR(ReadSampling(fields, model, limits, out));
  RETURN_IF_ERROR(ReadStops(fields, limits, out.stops));
  RETURN_IF_ERROR(fields.Read("ignore_eos", out.ignore_eos));
  return CheckBookkeeping(fields, limits, out);
}

// max_tokens and its newer name, against the server's limit and what is left of the context.
absl::Status ResolveMaxTokens(JsonFields& fields, const ServedModel& model, int32_t default_max_tokens,
                              ApiRequest& out) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  int64_t old_name = 0, new_name = 0, min_tokens = 0;
  RETURN_IF_ERROR(fields.ReadInteger("max_tokens", 1, kMax, old_name));
  if (out.is_chat) {
    RETURN_IF_ERROR(fields.ReadInteger("max_completion_tokens", 1, kMax, new_name));
    if (old_name != 0 && new_name != 0 && old_name != new_name) {
      return InvalidRequest("invalid_value", "max_tokens", "max_tokens and max_completion_tokens differ.");
    }
  }
  size_t longest = 0;
  for (const auto& ids : out.prompts) longest = std::max(longest, ids.size());
  const int64_t prompt_tokens = static_cast<int64_t>(longest);
  const int64_t left = model.context_length - prompt_tokens;
  int64_t max_tokens = std::max(old_name, new_name);
  const int64_t limit = model.max_tokens_limit == 0 ? kMax : model.max_tokens_limit;
  if (max_tokens > limit) {
    const std::string_view param = new_name != 0 ? "max_completion_tokens" : "max_tokens";
    return InvalidRequest("invalid_value", param,
                          Concat(param, ": ", max_tokens, ", this server's limit is ", limit, "."));
  }
  if (max_tokens == 0)
    max_tokens = std::min({default_max_tokens == 0 ? left : int64_t{default_max_tokens}, limit, left});
  if (left < 1 || max_tokens > left)
    return PromptTooLong(Concat(prompt_tokens), std::max<int64_t>(max_tokens, 1), model);
  RETURN_IF_ERROR(fields.ReadInteger("min_tokens", 0, max_tokens, min_tokens));
  out.max_tokens = static_cast<int32_t>(max_tokens);
  out.min_tokens = static_cast<int32_t>(min_tokens);
  return absl::OkStatus();
}

absl::Status ReadChatLogprobs(JsonFields& fields, const ApiLimits& limits, ApiRequest& out) {
  bool logprobs = false;
  int64_t top = 0;
  RETURN_IF_ERROR(fields.Read("logprobs", logprobs));
  RETURN_IF_ERROR(fields.ReadInteger("top_logprobs", 0, limits.max_top_logprobs, top));
  const Json* given = fields.Get("top_logprobs");
  if (given != nullptr && !logprobs) {
    return InvalidRequest("invalid_value", "top_logprobs", "top_logprobs: only allowed when logprobs is true.");
  }
  if (logprobs) out.num_logprobs = static_cast<int32_t>(top);
  return absl::OkStatus();
}

// An error of the text engine is a sentence "field: what is wrong" about what the client sent.
absl::Status AsRequestError(const absl::Status& status) {
  if (status.ok() || status.code() != absl::StatusCode::kInvalidArgument || GetApiError(status)) return status;
  const std::string message(status.message());
  const size_t colon = message.find(':');
  return InvalidRequest("invalid_value", colon == std::string::npos ? "" : message.substr(0, colon), message);
}

absl::Status CheckIsObject(const Json& body) {
  if (body.is_object()) return absl::OkStatus();
  return InvalidRequest("expected_object", "",
                        Concat("The body must be a JSON object, got ", DescribeJson(&body), "."));
}

}  // namespace

absl::StatusOr<ApiRequest> ParseChatRequest(const Json& body, const ServedModel& model, const ApiLimits& limits) {
  RETURN_IF_ERROR(CheckIsObject(body));
  JsonFields fields(body, "");
  ApiRequest out;
  out.is_chat = true;
  RETURN_IF_ERROR(ReadCommon(fields, model, limits, out));
  RETURN_IF_ERROR(ReadChatLogprobs(fields, limits, out));
  RETURN_IF_ERROR(CheckMessages(fields, limits));
  ASSIGN_OR_RETURN(out.tool_markup, CheckTools(fields, limits, out.ignored));
  RETURN_IF_ERROR(CheckResponseFormat(fields));

  for (const std::string_view name : {"reasoning_effort", "thinking", "chat_template_kwargs"}) fields.Get(name);
  auto options = text::ResolveChatOptions(body, model.chat_defaults);
  if (!options.ok()) return AsRequestError(options.status());
  options->strict = true;
  out.thinking = options->thinking;
  auto prompt = text::EncodeChatRequest(body, *options);
  if (!prompt.ok()) return AsRequestError(prompt.status());
  out.prompts.resize(1);
  ASSIGN_OR_RETURN(out.prompts[0], EncodePrompt(*prompt, model));
  RETURN_IF_ERROR(ResolveMaxTokens(fields, model, model.default_max_tokens, out));
  for (auto& name : fields.Unknown()) out.ignored.push_back(std::move(name));
  return out;
}

absl::StatusOr<ApiRequest> ParseCompletionRequest(const Json& body, const ServedModel& model, const ApiLimits& limits) {
  RETURN_IF_ERROR(CheckIsObject(body));
  JsonFields fields(body, "");
  ApiRequest out;
  RETURN_IF_ERROR(ReadCommon(fields, model, limits, out));

  const Json* logprobs = fields.Get("logprobs");
  int64_t top = -1, best_of = out.n;
  RETURN_IF_ERROR(fields.ReadInteger("logprobs", 0, limits.max_top_logprobs, top));
  if (logprobs != nullptr) out.num_logprobs = static_cast<int32_t>(top);
  RETURN_IF_ERROR(fields.ReadInteger("best_of", 1, limits.max_n, best_of));
  if (best_of < out.n) return InvalidRequest("invalid_value", "best_of", "best_of: must not be less than n.");
  if (best_of > out.n) return Unsupported("best_of", "more than n is not supported");
  bool echo = false;
  RETURN_IF_ERROR(fields.Read("echo", echo));
  if (echo && logprobs != nullptr) return Unsupported("echo", "not supported together with logprobs");

  ASSIGN_OR_RETURN(out.prompts, ReadCompletionPrompts(fields, model, limits));
  const size_t num_choices = out.prompts.size() * static_cast<size_t>(out.n);
  if (num_choices > limits.max_choices) {
    return InvalidRequest("too_many_items", "prompt",
                          Concat("prompt: ", out.prompts.size(), " prompts with ", out.n, " choices each make ",
                                 num_choices, ", the limit is ", limits.max_choices, "."));
  }
  if (echo) {
    for (const auto& ids : out.prompts) out.echoes.push_back(model.tokenizer->Decode(ids, /*skip_special=*/false));
  }
  const int32_t default_max_tokens =
      limits.completion_default_max_tokens == 0 ? model.default_max_tokens : limits.completion_default_max_tokens;
  RETURN_IF_ERROR(ResolveMaxTokens(fields, model, default_max_tokens, out));
  for (auto& name : fields.Unknown()) out.ignored.push_back(std::move(name));
  return out;
}

}  // namespace millrace::router
