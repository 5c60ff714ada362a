// SPDX-License-Identifier: Apache-2.0
// OpenAI's reply objects, whole and in chunks, for chat and plain completions.
//
// `logprobs` has an entry for every token drawn, markup, reasoning and the end-of-sequence token included, so that
// their number equals usage.completion_tokens; in a stream an entry comes with the first chunk after its token.
//
// Thread: values; pure functions of their arguments.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/text/completion_parser.h"
#include "engine/text/tokenizer.h"
#include "services/router/generation.h"
#include "services/router/json_reader.h"

namespace millrace::router {

struct ReplyUsage {
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t completion_tokens = 0;  // all choices
  int64_t reasoning_tokens = 0;   // of them
};

// One choice, finished.
struct ReplyChoice {
  int32_t index = 0;
  std::string content;
  std::string reasoning;
  struct ToolCall {
    std::string id, name, arguments;
  };
  std::vector<ToolCall> tool_calls;
  std::string finish_reason;
  Json logprobs;  // null, or from LogprobsJson
};

// Makes the replies of one request; `id` and `created` are the same in all of them.
class ReplyWriter {
 public:
  ReplyWriter(bool is_chat, std::string id, std::string model, int64_t created_unix_s, bool include_usage);

  // Chunks of a stream, as JSON text.
  std::string RoleChunk(int32_t index) const;  // chat only
  // `call_ids[i]` is the id of tool call i. A chat delta without anything is fine: it carries logprobs.
  std::string DeltaChunk(int32_t index, const text::CompletionDelta& delta, const std::vector<std::string>& call_ids,
                         Json logprobs) const;
  std::string FinishChunk(int32_t index, std::string_view finish_reason, Json logprobs) const;
  std::string UsageChunk(const ReplyUsage& usage) const;

  // The reply of a request that does not stream.
  std::string Whole(const std::vector<ReplyChoice>& choices, const ReplyUsage& usage) const;

  // The logprobs member of a choice for these tokens. `text_offset` counts characters before the first of them; it is
  // moved past them.
  Json LogprobsJson(const std::vector<GeneratedToken>& tokens, const text::Tokenizer& tokenizer,
                    int64_t& text_offset) const;

 private:
  Json Envelope(std::string_view object) const;
  std::string Chunk(int32_t index, Json body, std::string_view finish_reason, Json logprobs) const;

  const bool is_chat_;
  const std::string id_;
  const std::string model_;
  const int64_t created_unix_s_;
  const bool include_usage_;
};

std::string DumpJson(const Json& json);

}  // namespace millrace::router
