// SPDX-License-Identifier: Apache-2.0
// The texts the model was trained on, and the order in which a message's parts and what follows it are written.
#include "engine/text/chat_render.h"

#include <string>
#include <utility>

#include "engine/status.h"

namespace millrace::text::chat {
namespace {

constexpr std::string_view kLatestReminder = "<｜latest_reminder｜>";

constexpr std::string_view kAbsoluteMaximum =
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n";

constexpr std::string_view kBeyondMaximum =
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying "
    "cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that "
    "no assumption remains unchecked and no error remains undiscovered.\n\n";

constexpr std::string_view kToolsBeforeSchemas = R"(## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

)";
constexpr std::string_view kToolsAfterSchemas =
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n";

constexpr std::string_view kResponseFormat =
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";

class Renderer {
 public:
  Renderer(const std::vector<Message>& messages, const ChatOptions& options, bool drop_thinking)
      : messages_(messages), options_(options), drop_thinking_(drop_thinking), last_user_(LastUserIndex(messages)) {}

  Prompt Render(size_t first, bool with_bos) {
    if (with_bos) out_.Control(kBos);
    for (size_t i = first; i < messages_.size(); ++i) {
      if (i == 0 && options_.thinking) out_.Text(EffortText());
      RenderMessage(i);
      RenderTransition(i);
    }
    return out_.Finish();
  }

 private:
  std::string_view EffortText() const {
    if (options_.release == EncoderRelease::kPreview) {
      return options_.effort == ReasoningEffort::kMax ? kAbsoluteMaximum : "";
    }
    switch (options_.effort) {
      case ReasoningEffort::kLow:
        return "";
      case ReasoningEffort::kHigh:
        return kAbsoluteMaximum;
      case ReasoningEffort::kMax:
        return kBeyondMaximum;
    }
    return "";
  }

  void RenderMessage(size_t i) {
    const Message& message = messages_[i];
    switch (message.role) {
      case Role::kSystem:
        out_.Text(message.content);
        RenderToolsAndFormat(message);
        break;
      case Role::kDeveloper:
        out_.Control(kUser);
        out_.Text(message.content);
        RenderToolsAndFormat(message);
        break;
      case Role::kUser:
        RenderUser(message);
        break;
      case Role::kReminder:
        out_.Control(kLatestReminder);
        out_.Text(message.content);
        break;
      case Role::kAssistant:
        RenderAssistant(i);
        break;
      case Role::kTool:
        CHECK(false, "tool messages are merged into user turns");
    }
  }

  void RenderToolsAndFormat(const Message& message) {
    if (!message.tools.empty()) {
      out_.Text("\n\n");
      out_.Literal(kToolsBeforeSchemas);
      for (size_t i = 0; i < message.tools.size(); ++i) {
        if (i > 0) out_.Text("\n");
        out_.Text(message.tools[i]);
      }
      out_.Literal(kToolsAfterSchemas);
    }
    if (!message.response_format.empty()) {
      out_.Text("\n\n");
      out_.Literal(kResponseFormat);
      out_.Text(message.response_format);
    }
  }

  void RenderUser(const Message& message) {
    out_.Control(kUser);
    for (size_t i = 0; i < message.blocks.size(); ++i) {
      const Block& block = message.blocks[i];
      if (i > 0) out_.Text("\n\n");
      if (block.is_tool_result) out_.Text("<tool_result>");
      out_.Text(block.text);
      if (block.is_tool_result) out_.Text("</tool_result>");
    }
  }

  void RenderAssistant(size_t i) {
    const Message& message = messages_[i];
    const bool answers_task = i > 0 && !messages_[i - 1].task.empty();
    if (options_.thinking && !answers_task && (!drop_thinking_ || static_cast<int>(i) > last_user_)) {
      out_.Text(message.reasoning);
      out_.Control(kThinkEnd);
    }
    out_.Text(message.content);
    if (!message.tool_calls.empty()) RenderToolCalls(message.tool_calls);
    if (!message.wo_eos) out_.Control(kEos);
  }

  void RenderToolCalls(const std::vector<ToolCall>& calls) {
    out_.Literal("\n\n<｜DSML｜tool_calls>\n");
    for (const ToolCall& call : calls) {
      out_.Literal("<｜DSML｜invoke name=\"");
      out_.Text(call.name);
      out_.Text("\">\n");
      bool is_first = true;
      for (const auto& [key, value] : call.arguments.items()) {
        if (!std::exchange(is_first, false)) out_.Text("\n");
        out_.Literal("<｜DSML｜parameter name=\"");
        out_.Text(key);
        out_.Text(value.is_string() ? "\" string=\"true\">" : "\" string=\"false\">");
        out_.Text(value.is_string() ? value.get_ref<const std::string&>() : DumpPythonJson(value));
        out_.Literal("</｜DSML｜parameter>");
      }
      out_.Literal("\n</｜DSML｜invoke>\n");
    }
    out_.Literal("</｜DSML｜tool_calls>");
  }

  // What follows message i so that the next speaker can start.
  void RenderTransition(size_t i) {
    if (i + 1 < messages_.size()) {
      const Role next = messages_[i + 1].role;
      if (next != Role::kAssistant && next != Role::kReminder) return;
    }
    const Message& message = messages_[i];
    if (!message.task.empty()) {
      if (message.task == kActionTask) {
        out_.Control(kAssistant);
        out_.Control(options_.thinking ? kThinkStart : kThinkEnd);
      }
      for (const Task& task : kTasks) {
        if (task.name == message.task) out_.Control(task.token);
      }
    } else if (message.role == Role::kUser || message.role == Role::kDeveloper) {
      const bool thinks = options_.thinking && (!drop_thinking_ || static_cast<int>(i) >= last_user_);
      out_.Control(kAssistant);
      out_.Control(thinks ? kThinkStart : kThinkEnd);
    }
  }

  const std::vector<Message>& messages_;
  const ChatOptions& options_;
  const bool drop_thinking_;
  const int last_user_;
  PromptBuilder out_;
};

}  // namespace

void PromptBuilder::Control(std::string_view token) {
  prompt_.push_back({Segment::Kind::kControl, std::string(token)});
}

void PromptBuilder::Text(std::string_view text) {
  if (text.empty()) return;
  if (prompt_.empty() || prompt_.back().kind != Segment::Kind::kText) prompt_.push_back({Segment::Kind::kText, ""});
  prompt_.back().text += text;
}

void PromptBuilder::Literal(std::string_view text) {
  constexpr std::string_view kMarkup[] = {kThinkStart, kThinkEnd, kDsml};
  while (!text.empty()) {
    size_t at = text.size();
    std::string_view token;
    for (const std::string_view markup : kMarkup) {
      const size_t found = text.find(markup);
      if (found < at) {
        at = found;
        token = markup;
      }
    }
    Text(text.substr(0, at));
    if (token.empty()) return;
    Control(token);
    text.remove_prefix(at + token.size());
  }
}

Prompt PromptBuilder::Finish() { return std::move(prompt_); }

int LastUserIndex(const std::vector<Message>& messages) {
  for (int i = static_cast<int>(messages.size()) - 1; i >= 0; --i) {
    if (messages[i].role == Role::kUser || messages[i].role == Role::kDeveloper) return i;
  }
  return -1;
}

Prompt Render(const std::vector<Message>& messages, const ChatOptions& options, bool drop_thinking, size_t first,
              bool with_bos) {
  return Renderer(messages, options, drop_thinking).Render(first, with_bos);
}

}  // namespace millrace::text::chat
