// SPDX-License-Identifier: Apache-2.0
// From the JSON of /v1/chat/completions and /v1/completions to what the router works with, or to the error that says
// which field is wrong.
//
// Everything a client can get wrong is refused here, before anything is allocated for it or anybody else hears of it.
// What is accepted means what it says: a field that cannot be honoured is an error if ignoring it would change the
// answer, and is listed in `ignored` otherwise.
//
// Thread: any; pure functions of their arguments.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/text/chat_encoding.h"
#include "engine/text/tokenizer.h"
#include "services/router/generation.h"
#include "services/router/http_limits.h"
#include "services/router/json_reader.h"

namespace millrace::router {

// The model behind this router.
struct ServedModel {
  std::string id;              // what requests call it
  int64_t created_unix_s = 0;  // for /v1/models
  int32_t context_length = 0;  // prompt and completion together
  int32_t vocab_size = 0;
  const text::Tokenizer* tokenizer = nullptr;  // must outlive every user of this struct
  text::ChatOptions chat_defaults;             // release, and what a request leaves open
  int32_t max_tokens_limit = 0;                // most that a request may ask for; 0: what is left of the context
  int32_t default_max_tokens = 0;              // chat requests that ask for none; 0: the most that there can be
};

// What becomes of tool markup (DSML) in a completion.
enum class ToolMarkup {
  kText,     // no tools were given: text like any other
  kCalls,    // calls of the tools
  kDropped,  // tool_choice none: neither a call nor text
};

struct ApiRequest {
  std::vector<std::vector<int32_t>> prompts;  // ids; one, or for completions several, each answered n times
  SamplingParams sampling;
  bool has_seed = false;
  int32_t n = 1;
  int32_t max_tokens = 0;  // of each choice; resolved: longest prompt + max_tokens <= context_length
  int32_t min_tokens = 0;
  bool ignore_eos = false;
  int32_t num_logprobs = -1;
  std::vector<std::string> stops;
  bool stream = false;
  bool include_usage = false;
  std::string cache_salt;

  bool is_chat = false;
  bool thinking = false;                       // chat: the prompt ends in <think>
  ToolMarkup tool_markup = ToolMarkup::kText;  // chat
  std::vector<std::string> echoes;             // completions: text to put before each prompt's completions; empty: none
  std::vector<std::string> ignored;            // fields without effect, for x-ignored-params
};

absl::StatusOr<ApiRequest> ParseChatRequest(const Json& body, const ServedModel& model, const ApiLimits& limits);
absl::StatusOr<ApiRequest> ParseCompletionRequest(const Json& body, const ServedModel& model, const ApiLimits& limits);

}  // namespace millrace::router
