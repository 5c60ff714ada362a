// SPDX-License-Identifier: Apache-2.0
// The encoder in the order of its rules: read and check the messages (chat_messages.cc), merge tool results into user
// turns, order them, drop old reasoning, render each message and what follows it (chat_render.cc).
#include "engine/text/chat_encoding.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <utility>

#include "engine/status.h"
#include "engine/text/chat_messages.h"
#include "engine/text/chat_render.h"
#include "engine/text/concat.h"

namespace millrace::text {
namespace {

using chat::Bad;
using chat::Block;
using chat::Describe;
using chat::Get;
using chat::LastUserIndex;
using chat::Message;
using chat::PromptBuilder;
using chat::ReadMessages;
using chat::ReadToolList;
using chat::Render;
using chat::Role;
using chat::ToolCall;

constexpr std::string_view kFimBegin = "<｜fim▁begin｜>";
constexpr std::string_view kFimHole = "<｜fim▁hole｜>";
constexpr std::string_view kFimEnd = "<｜fim▁end｜>";

// Tool results and user texts that follow each other become one user turn; after a task a text starts a new one.
std::vector<Message> MergeUserTurns(std::vector<Message> messages) {
  std::vector<Message> merged;
  for (Message& message : messages) {
    const bool is_tool = message.role == Role::kTool;
    if (!is_tool && message.role != Role::kUser) {
      merged.push_back(std::move(message));
      continue;
    }
    const bool joins = !merged.empty() && merged.back().role == Role::kUser && (is_tool || merged.back().task.empty());
    if (!joins) {
      Message turn;
      turn.role = Role::kUser;
      if (!is_tool) turn.task = message.task;  // its tools and response_format say nothing to the encoder
      merged.push_back(std::move(turn));
    }
    std::move(message.blocks.begin(), message.blocks.end(), std::back_inserter(merged.back().blocks));
  }
  return merged;
}

// Tool results of one turn in the order of the calls they answer; texts keep their places.
void SortToolResults(std::vector<Message>& messages) {
  const std::vector<ToolCall>* calls = nullptr;  // of the latest assistant message that made any
  for (Message& message : messages) {
    if (message.role == Role::kAssistant && !message.tool_calls.empty()) calls = &message.tool_calls;
    if (message.role != Role::kUser || calls == nullptr) continue;
    std::vector<Block> results;
    for (const Block& block : message.blocks) {
      if (block.is_tool_result) results.push_back(block);
    }
    const auto position = [&](const Block& block) -> size_t {
      // From the back: of two calls with one id the later counts. Unknown ids sort first, as in the official encoder.
      for (size_t i = calls->size(); i-- > 0;) {
        if (!block.tool_use_id.empty() && (*calls)[i].id == block.tool_use_id) return i;
      }
      return 0;
    };
    std::stable_sort(results.begin(), results.end(),
                     [&](const Block& a, const Block& b) { return position(a) < position(b); });
    auto next = results.begin();
    for (Block& block : message.blocks) {
      if (block.is_tool_result) block = *next++;
    }
  }
}

// Before the last user message, reasoning is forgotten and developer messages are left out.
std::vector<Message> DropOldThinking(std::vector<Message> messages) {
  const int last = LastUserIndex(messages);
  std::vector<Message> kept;
  for (int i = 0; i < static_cast<int>(messages.size()); ++i) {
    if (i < last && messages[i].role == Role::kDeveloper) continue;
    if (i < last && messages[i].role == Role::kAssistant) messages[i].reasoning.clear();
    kept.push_back(std::move(messages[i]));
  }
  return kept;
}

absl::StatusOr<Prompt> Encode(std::vector<Message> list, const ChatOptions& options) {
  std::vector<Message> context;
  if (!options.context.is_null()) {
    ASSIGN_OR_RETURN(context, ReadMessages(options.context, "context", options.strict));
  }
  context = MergeUserTurns(std::move(context));
  const bool with_bos = options.add_bos && context.empty();

  std::vector<Message> messages = context;
  for (Message& message : MergeUserTurns(std::move(list))) messages.push_back(std::move(message));
  SortToolResults(messages);

  const bool any_tools =
      std::any_of(messages.begin(), messages.end(), [](const Message& message) { return !message.tools.empty(); });
  const bool drop = options.drop_thinking && !any_tools;
  size_t first = context.size();
  if (options.thinking && drop) {
    messages = DropOldThinking(std::move(messages));
    first = DropOldThinking(std::move(context)).size();
  }
  return Render(messages, options, drop, first, with_bos);
}

// What the request's response_format asks for as JSON, empty for plain text.
absl::StatusOr<std::string> RequestedFormat(const Json& request) {
  const Json* format = Get(request, "response_format");
  if (format == nullptr) return std::string();
  const Json* type = Get(*format, "type");
  const std::string name = type != nullptr && type->is_string() ? type->get<std::string>() : "";
  if (name == "text") return std::string();
  if (name == "json_object") return DumpPythonJson(*format);
  if (name == "json_schema") {
    const Json* wrapper = Get(*format, "json_schema");
    const Json* schema = wrapper == nullptr ? nullptr : Get(*wrapper, "schema");
    if (schema == nullptr || !schema->is_object()) {
      return Bad("response_format.json_schema.schema", Describe(schema), "an object");
    }
    return DumpPythonJson(*schema);
  }
  return Bad("response_format.type", Describe(type), "\"text\", \"json_object\" or \"json_schema\"");
}

}  // namespace

absl::StatusOr<Prompt> EncodeMessages(const Json& messages, const ChatOptions& options) {
  ASSIGN_OR_RETURN(std::vector<Message> list, ReadMessages(messages, "messages", options.strict));
  return Encode(std::move(list), options);
}

absl::StatusOr<Prompt> EncodeChatRequest(const Json& request, const ChatOptions& defaults) {
  if (request.is_array()) return EncodeMessages(request, defaults);
  ASSIGN_OR_RETURN(const ChatOptions options, ResolveChatOptions(request, defaults));
  const Json* messages = Get(request, "messages");
  if (messages == nullptr) return Bad("messages", "nothing", "an array of messages");
  ASSIGN_OR_RETURN(std::vector<Message> list, ReadMessages(*messages, "messages", options.strict));
  if (list.empty()) return Bad("messages", "an empty array", "at least one message");

  std::vector<std::string> tools;
  if (const Json* given = Get(request, "tools"); given != nullptr) {
    RETURN_IF_ERROR(ReadToolList(*given, "tools", tools));
  }
  const Json* choice = Get(request, "tool_choice");
  if (choice != nullptr && *choice == "none") tools.clear();
  ASSIGN_OR_RETURN(std::string format, RequestedFormat(request));
  if (!tools.empty() || !format.empty()) {
    if (list.front().role != Role::kSystem) list.insert(list.begin(), Message());
    if (!tools.empty()) list.front().tools = std::move(tools);
    if (!format.empty()) list.front().response_format = std::move(format);
  }
  return Encode(std::move(list), options);
}

absl::StatusOr<ChatOptions> ResolveChatOptions(const Json& request, const ChatOptions& defaults) {
  if (!request.is_object()) return Bad("request", Describe(&request), "an object");
  ChatOptions options = defaults;
  bool enabled = false, disabled = false;

  if (const Json* effort = Get(request, "reasoning_effort"); effort != nullptr) {
    static constexpr std::pair<std::string_view, ReasoningEffort> kEfforts[] = {
        {"minimal", ReasoningEffort::kLow}, {"low", ReasoningEffort::kLow},    {"medium", ReasoningEffort::kHigh},
        {"high", ReasoningEffort::kHigh},   {"xhigh", ReasoningEffort::kHigh}, {"max", ReasoningEffort::kMax}};
    const std::string name = effort->is_string() ? effort->get<std::string>() : "";
    if (name == "none") disabled = true;
    for (const auto& [known, value] : kEfforts) {
      if (name != known) continue;
      options.effort = value;
      enabled = true;
    }
    if (!enabled && !disabled) {
      return Bad("reasoning_effort", Describe(effort), "none, minimal, low, medium, high, xhigh or max");
    }
  }

  if (const Json* thinking = Get(request, "thinking"); thinking != nullptr) {
    const Json* type = Get(*thinking, "type");
    const bool on = type != nullptr && *type == "enabled", off = type != nullptr && *type == "disabled";
    if (!on && !off) return Bad("thinking.type", Describe(type), "\"enabled\" or \"disabled\"");
    enabled |= on;
    disabled |= off;
  }

  if (const Json* kwargs = Get(request, "chat_template_kwargs"); kwargs != nullptr) {
    if (!kwargs->is_object()) return Bad("chat_template_kwargs", Describe(kwargs), "an object");
    if (const Json* thinking = Get(*kwargs, "thinking"); thinking != nullptr) {
      if (!thinking->is_boolean()) return Bad("chat_template_kwargs.thinking", Describe(thinking), "true or false");
      (thinking->get<bool>() ? enabled : disabled) = true;
    }
  }

  if (enabled) {
    options.thinking = true;
  } else if (disabled) {
    options.thinking = false;
  }
  return options;
}

Prompt EncodeFillInMiddle(std::string_view prefix, std::string_view suffix) {
  PromptBuilder out;
  out.Control(kBos);
  out.Control(kFimBegin);
  out.Text(prefix);
  out.Control(kFimHole);
  out.Text(suffix);
  out.Control(kFimEnd);
  return out.Finish();
}

std::string PromptString(const Prompt& prompt) {
  std::string text;
  for (const Segment& segment : prompt) text += segment.text;
  return text;
}

absl::StatusOr<std::vector<int32_t>> PromptIds(const Prompt& prompt, const Tokenizer& tokenizer) {
  std::vector<int32_t> ids;
  for (const Segment& segment : prompt) {
    if (segment.kind == Segment::Kind::kControl) {
      const std::optional<int32_t> id = tokenizer.TokenId(segment.text);
      if (!id.has_value()) {
        return absl::FailedPreconditionError(Concat("the model's tokenizer has no token ", segment.text));
      }
      ids.push_back(*id);
      continue;
    }
    ASSIGN_OR_RETURN(const std::vector<int32_t> text_ids, tokenizer.Encode(segment.text, SpecialTokens::kPlain));
    ids.insert(ids.end(), text_ids.begin(), text_ids.end());
  }
  return ids;
}

}  // namespace millrace::text
