// SPDX-License-Identifier: Apache-2.0
// Chat messages to the prompt the model was trained on.
//
// DeepSeek-V4 has no template language: this is the official encoder's behaviour, rule by rule, with one difference.
// The prompt is a list of segments, and only the encoder's own literals are control tokens; text that a user wrote
// never is, even if it spells one. PromptString gives the same string as the official encoder either way.
//
// Messages are JSON as /v1/chat/completions takes them, with the official extensions per message: `reasoning_content`,
// `task`, `wo_eos`, `tools`, `response_format`, `content_blocks`, and the roles developer and latest_reminder.
//
// Thread: any; pure functions.
// Source: docs/model.md, "Chat encoding".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/text/python_json.h"
#include "engine/text/tokenizer.h"

namespace millrace::text {

// Spellings of the control tokens, shared with the parser.
inline constexpr std::string_view kBos = "<｜begin▁of▁sentence｜>";
inline constexpr std::string_view kEos = "<｜end▁of▁sentence｜>";
inline constexpr std::string_view kUser = "<｜User｜>";
inline constexpr std::string_view kAssistant = "<｜Assistant｜>";
inline constexpr std::string_view kThinkStart = "<think>";
inline constexpr std::string_view kThinkEnd = "</think>";
inline constexpr std::string_view kDsml = "｜DSML｜";

// Which release's texts the efforts stand for. Preview unless config.json has dspark_* keys.
enum class EncoderRelease { kPreview, kDspark };

// How hard to think; only in thinking mode. Preview: low and high add no text, max adds the "absolute maximum" text.
// Dspark: low adds nothing, high that text, max the "beyond maximum" text.
enum class ReasoningEffort { kLow, kHigh, kMax };

struct ChatOptions {
  EncoderRelease release = EncoderRelease::kPreview;
  bool thinking = false;
  ReasoningEffort effort = ReasoningEffort::kLow;
  // Forget the reasoning of turns before the last user message; forced off if any message has tools.
  bool drop_thinking = true;
  // Refuse what the official encoder lets pass and a server should not: content parts that are not text, user messages
  // without content, tool results without tool_call_id.
  bool strict = false;
  bool add_bos = true;
  // Messages already encoded and in the cache before these: seen by the rules, not rendered. Null or an array.
  Json context;
};

struct Segment {
  enum class Kind { kText, kControl };  // kControl: `text` is exactly one control token
  Kind kind;
  std::string text;
  bool operator==(const Segment&) const = default;
};
using Prompt = std::vector<Segment>;

// Encodes a list of messages.
// Errors: InvalidArgument `messages[i].field: ...`, i counting in the list as given.
absl::StatusOr<Prompt> EncodeMessages(const Json& messages, const ChatOptions& options);

// Encodes a request object of /v1/chat/completions (or a bare list of messages). Reads messages, tools, tool_choice
// (only "none", which leaves the tools out), response_format, reasoning_effort, thinking and chat_template_kwargs;
// nothing else. Tools and response_format join a leading system message, which is made if there is none.
// `defaults` holds what the request leaves open.
absl::StatusOr<Prompt> EncodeChatRequest(const Json& request, const ChatOptions& defaults);

// The thinking and effort of a request, `defaults` where it says nothing: thinking if reasoning_effort is other than
// none, or thinking.type is "enabled", or chat_template_kwargs.thinking is true.
// Errors: InvalidArgument naming the field and the values allowed.
absl::StatusOr<ChatOptions> ResolveChatOptions(const Json& request, const ChatOptions& defaults);

// Fill in the middle: BOS, prefix, hole, suffix, in the inherited order.
Prompt EncodeFillInMiddle(std::string_view prefix, std::string_view suffix);

// The segments as one string, as the official encoder returns it.
std::string PromptString(const Prompt& prompt);

// The segments as token ids: control segments by name, text with SpecialTokens::kPlain.
// Errors: FailedPrecondition if the tokenizer lacks a control token that the prompt needs.
absl::StatusOr<std::vector<int32_t>> PromptIds(const Prompt& prompt, const Tokenizer& tokenizer);

}  // namespace millrace::text
