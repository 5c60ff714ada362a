// SPDX-License-Identifier: Apache-2.0
// What a request says to the model, as token ids: the encoded chat, or the prompts of /v1/completions.
//
// A text that cannot fit the context is given up by its bytes, before it is tokenised: tokenising it would be the
// attack.
//
// Thread: any; pure functions of their arguments.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/text/chat_encoding.h"
#include "services/router/http_limits.h"
#include "services/router/json_fields.h"
#include "services/router/openai_request.h"

namespace millrace::router {

// "context_length_exceeded". `prompt_tokens` is a count, or "at least N".
absl::Status PromptTooLong(std::string_view prompt_tokens, int64_t max_tokens, const ServedModel& model);

// Only the encoder's own literals become control tokens.
absl::StatusOr<std::vector<int32_t>> EncodePrompt(const text::Prompt& prompt, const ServedModel& model);

// `prompt` (a string, token ids, or an array of either) and `suffix`: one list of ids per prompt, none of them empty.
absl::StatusOr<std::vector<std::vector<int32_t>>> ReadCompletionPrompts(JsonFields& fields, const ServedModel& model,
                                                                        const ApiLimits& limits);

}  // namespace millrace::router
