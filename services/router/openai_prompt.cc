// SPDX-License-Identifier: Apache-2.0
// See openai_prompt.h.
#include "services/router/openai_prompt.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/status.h"
#include "engine/text/concat.h"
#include "services/common/error.h"

namespace millrace::router {
namespace {

using text::Concat;

// Refuses by its bytes alone a text that cannot fit, since tokenising it would be the attack.
absl::Status CheckTextBytes(size_t text_bytes, const ServedModel& model) {
  const size_t limit = static_cast<size_t>(model.context_length);
  if (text_bytes <= limit) return absl::OkStatus();  // no token is shorter than a byte
  size_t longest = 1;
  for (int32_t id = 0; id < model.tokenizer->size(); ++id) {
    longest = std::max(longest, model.tokenizer->TokenBytes(id).size());
  }
  if (text_bytes / longest <= limit) return absl::OkStatus();
  return PromptTooLong(Concat("at least ", text_bytes / longest), 1, model);
}

// A plain prompt is read as the Hugging Face tokenizer reads it: spelt control tokens are control tokens.
absl::StatusOr<std::vector<int32_t>> FromText(const std::string& text, const std::string& param,
                                              const ServedModel& model) {
  if (text.empty()) return InvalidRequest("empty_prompt", param, Concat(param, ": must not be empty."));
  RETURN_IF_ERROR(CheckTextBytes(text.size(), model));
  return model.tokenizer->Encode(text, text::SpecialTokens::kMatch);
}

absl::StatusOr<std::vector<int32_t>> FromIds(const Json& ids, const std::string& param, const ServedModel& model) {
  if (ids.empty()) return InvalidRequest("empty_prompt", param, Concat(param, ": must not be empty."));
  if (ids.size() > static_cast<size_t>(model.context_length)) return PromptTooLong(Concat(ids.size()), 1, model);
  std::vector<int32_t> out;
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto id = AsInteger(ids[i]);
    if (!id || *id < 0 || *id >= model.vocab_size) {
      const std::string at = Concat(param, "[", i, "]");
      return InvalidRequest(
          "invalid_token_id", at,
          Concat(at, ": expected a token id from 0 to ", model.vocab_size - 1, ", got ", DescribeJson(&ids[i]), "."));
    }
    out.push_back(static_cast<int32_t>(*id));
  }
  return out;
}

}  // namespace

absl::Status PromptTooLong(std::string_view prompt_tokens, int64_t max_tokens, const ServedModel& model) {
  return InvalidRequest("context_length_exceeded", "",
                        Concat("This model's context is ", model.context_length, " tokens; the prompt has ",
                               std::string(prompt_tokens), " and ", max_tokens, " more were asked for."));
}

// The prompt's ids, piece by piece, so that one that cannot fit is given up early.
absl::StatusOr<std::vector<int32_t>> EncodePrompt(const text::Prompt& prompt, const ServedModel& model) {
  size_t text_bytes = 0;
  for (const auto& segment : prompt) text_bytes += segment.text.size();
  RETURN_IF_ERROR(CheckTextBytes(text_bytes, model));
  std::vector<int32_t> ids;
  for (const auto& segment : prompt) {
    std::vector<int32_t> part;
    ASSIGN_OR_RETURN(part, text::PromptIds({segment}, *model.tokenizer));
    ids.insert(ids.end(), part.begin(), part.end());
    if (ids.size() > static_cast<size_t>(model.context_length)) {
      return PromptTooLong(Concat("at least ", ids.size()), 1, model);
    }
  }
  return ids;
}

absl::StatusOr<std::vector<std::vector<int32_t>>> ReadCompletionPrompts(JsonFields& fields, const ServedModel& model,
                                                                        const ApiLimits& limits) {
  const Json* prompt = fields.Get("prompt");
  const Json* suffix = fields.Get("suffix");
  if (prompt == nullptr) return InvalidRequest("missing_field", "prompt", "prompt: missing.");
  std::vector<std::vector<int32_t>> prompts;
  const auto add = [&](const Json& one, const std::string& param) -> absl::Status {
    if (!one.is_string() && !one.is_array()) return WrongType(param, "a string or an array of token ids", &one);
    prompts.emplace_back();
    if (one.is_array()) {
      ASSIGN_OR_RETURN(prompts.back(), FromIds(one, param, model));
    } else {
      ASSIGN_OR_RETURN(prompts.back(), FromText(one.get_ref<const std::string&>(), param, model));
    }
    return absl::OkStatus();
  };
  // Several, or one in an array of its own.
  const bool list = prompt->is_array() && !prompt->empty() && !(*prompt)[0].is_number();
  if (suffix != nullptr) {
    const Json* text = list && prompt->size() == 1 ? &(*prompt)[0] : prompt;
    if (!suffix->is_string()) return WrongType("suffix", "a string", suffix);
    if (!text->is_string()) {
      return Unsupported("suffix", "only allowed with one prompt that is a string");
    }
    prompts.emplace_back();
    ASSIGN_OR_RETURN(prompts.back(), EncodePrompt(text::EncodeFillInMiddle(text->get_ref<const std::string&>(),
                                                                           suffix->get_ref<const std::string&>()),
                                                  model));
    return prompts;
  }
  if (!list) {
    RETURN_IF_ERROR(add(*prompt, "prompt"));
    return prompts;
  }
  if (prompt->size() > limits.max_prompts) {
    return InvalidRequest("too_many_items", "prompt",
                          Concat("prompt: ", prompt->size(), " prompts, the limit is ", limits.max_prompts, "."));
  }
  for (size_t i = 0; i < prompt->size(); ++i) {
    RETURN_IF_ERROR(add((*prompt)[i], prompt->size() == 1 ? "prompt" : Concat("prompt[", i, "]")));
  }
  return prompts;
}

}  // namespace millrace::router
