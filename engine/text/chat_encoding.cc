// SPDX-License-Identifier: Apache-2.0
// The encoder in the order of its rules: read and check the messages, merge tool results into user turns, order them,
// drop old reasoning, render each message and what follows it.
#include "engine/text/chat_encoding.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "engine/status.h"
#include "engine/text/concat.h"

namespace millrace::text {
namespace {

constexpr std::string_view kLatestReminder = "<｜latest_reminder｜>";
constexpr std::string_view kFimBegin = "<｜fim▁begin｜>";
constexpr std::string_view kFimHole = "<｜fim▁hole｜>";
constexpr std::string_view kFimEnd = "<｜fim▁end｜>";

struct Task {
  std::string_view name;
  std::string_view token;
};
constexpr Task kTasks[] = {{"action", "<｜action｜>"}, {"query", "<｜query｜>"}, {"authority", "<｜authority｜>"},
                           {"domain", "<｜domain｜>"}, {"title", "<｜title｜>"}, {"read_url", "<｜read_url｜>"}};
constexpr std::string_view kActionTask = "action";

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

// ---- Messages as the rules see them
// ----------------------------------------------------------------------------------

enum class Role { kSystem, kDeveloper, kUser, kTool, kAssistant, kReminder };

struct Block {
  bool is_tool_result = false;
  std::string tool_use_id;
  std::string text;
};

struct ToolCall {
  std::string id;
  std::string name;
  Json arguments;  // an object
};

struct Message {
  Role role = Role::kSystem;
  std::string content;
  std::vector<Block> blocks;       // user only, after merging
  std::vector<std::string> tools;  // one JSON line each
  std::string response_format;     // JSON, or empty
  std::string reasoning;
  std::vector<ToolCall> tool_calls;
  std::string task;  // empty: none
  bool wo_eos = false;
};

absl::Status Bad(std::string_view field, std::string_view found, std::string_view expected) {
  return absl::InvalidArgumentError(Concat(field, ": found ", found, ", expected ", expected));
}

// What a value is, for messages.
std::string Describe(const Json* value) {
  if (value == nullptr) return "nothing";
  if (value->is_string()) return QuotePythonString(value->get_ref<const std::string&>().substr(0, 40));
  if (value->is_number() || value->is_binary()) return "a number";
  if (value->is_object()) return "an object";
  if (value->is_array()) return value->empty() ? "an empty array" : "an array";
  return value->is_null() ? "null" : value->get<bool>() ? "true" : "false";
}

// A member, or null where it is absent or null, which Python's .get treats alike.
const Json* Get(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

absl::StatusOr<std::string> GetString(const Json& object, const char* key, std::string_view field) {
  const Json* value = Get(object, key);
  if (value == nullptr) return std::string();
  if (!value->is_string()) return Bad(Concat(field, ".", key), Describe(value), "a string");
  return value->get<std::string>();
}

absl::StatusOr<bool> GetBool(const Json& object, const char* key, std::string_view field) {
  const Json* value = Get(object, key);
  if (value == nullptr) return false;
  if (!value->is_boolean()) return Bad(Concat(field, ".", key), Describe(value), "true or false");
  return value->get<bool>();
}

// Reads one message; `field` is its name in errors.
class MessageReader {
 public:
  MessageReader(const Json& json, std::string field, bool strict)
      : json_(json), field_(std::move(field)), strict_(strict) {}

  absl::StatusOr<Message> Read() {
    if (!json_.is_object()) return Bad(field_, Describe(&json_), "an object");
    RETURN_IF_ERROR(ReadRole());
    RETURN_IF_ERROR(ReadContent());
    ASSIGN_OR_RETURN(message_.reasoning, GetString(json_, "reasoning_content", field_));
    ASSIGN_OR_RETURN(message_.wo_eos, GetBool(json_, "wo_eos", field_));
    RETURN_IF_ERROR(ReadTask());
    RETURN_IF_ERROR(ReadTools());
    RETURN_IF_ERROR(ReadToolCalls());
    if (const Json* format = Get(json_, "response_format"); format != nullptr && !format->empty()) {
      message_.response_format = DumpPythonJson(*format);
    }
    return std::move(message_);
  }

 private:
  absl::Status ReadRole() {
    static constexpr std::pair<std::string_view, Role> kRoles[] = {
        {"system", Role::kSystem}, {"developer", Role::kDeveloper}, {"user", Role::kUser},
        {"tool", Role::kTool},     {"assistant", Role::kAssistant}, {"latest_reminder", Role::kReminder}};
    const Json* role = Get(json_, "role");
    for (const auto& [name, value] : kRoles) {
      if (role == nullptr || !role->is_string() || role->get_ref<const std::string&>() != name) continue;
      message_.role = value;
      return absl::OkStatus();
    }
    return Bad(field_ + ".role", Describe(role),
               "\"system\", \"user\", \"assistant\", \"tool\", \"developer\" or \"latest_reminder\"");
  }

  absl::Status ReadContent() {
    const Json* content = Get(json_, "content");
    const Json* blocks = Get(json_, "content_blocks");
    const std::string name = field_ + ".content";
    if (message_.role == Role::kUser && blocks != nullptr) return ReadBlocks(*blocks);
    if (content != nullptr) {
      ASSIGN_OR_RETURN(message_.content, ReadText(*content, name));
    } else if (const bool needed = message_.role == Role::kDeveloper || message_.role == Role::kReminder ||
                                   (strict_ && (message_.role == Role::kUser || message_.role == Role::kTool));
               needed) {
      return Bad(name, "nothing", "a string or an array of text parts");
    }
    if (message_.role == Role::kUser) message_.blocks.push_back({false, "", message_.content});
    if (message_.role == Role::kTool) {
      if (strict_ && Get(json_, "tool_call_id") == nullptr) {
        return Bad(field_ + ".tool_call_id", "nothing", "the id of the call this answers");
      }
      ASSIGN_OR_RETURN(std::string id, GetString(json_, "tool_call_id", field_));
      message_.blocks.push_back({true, std::move(id), message_.content});
    }
    return absl::OkStatus();
  }

  absl::Status ReadBlocks(const Json& blocks) {
    if (!blocks.is_array()) return Bad(field_ + ".content_blocks", Describe(&blocks), "an array");
    for (size_t i = 0; i < blocks.size(); ++i) {
      const std::string name = Concat(field_, ".content_blocks[", i, "]");
      const Json& block = blocks[i];
      ASSIGN_OR_RETURN(const std::string type, GetString(block, "type", name));
      if (type == "text") {
        ASSIGN_OR_RETURN(std::string text, GetString(block, "text", name));
        message_.blocks.push_back({false, "", std::move(text)});
      } else if (type == "tool_result") {
        ASSIGN_OR_RETURN(std::string id, GetString(block, "tool_use_id", name));
        const Json* content = Get(block, "content");
        std::string text;
        if (content != nullptr) {
          ASSIGN_OR_RETURN(text, ReadText(*content, name + ".content"));
        }
        message_.blocks.push_back({true, std::move(id), std::move(text)});
      } else {
        if (strict_) return Bad(name + ".type", Describe(Get(block, "type")), "\"text\" or \"tool_result\"");
        message_.blocks.push_back({false, "", Concat("[Unsupported ", type, "]")});
      }
    }
    return absl::OkStatus();
  }

  // A string, or an array of parts of which only text can be said.
  absl::StatusOr<std::string> ReadText(const Json& content, const std::string& name) const {
    if (content.is_string()) return content.get<std::string>();
    if (!content.is_array()) return Bad(name, Describe(&content), "a string or an array of text parts");
    std::string text;
    for (size_t i = 0; i < content.size(); ++i) {
      const std::string part_name = Concat(name, "[", i, "]");
      if (!content[i].is_object()) return Bad(part_name, Describe(&content[i]), "an object");
      ASSIGN_OR_RETURN(const std::string type, GetString(content[i], "type", part_name));
      if (i > 0) text += "\n\n";
      if (type == "text") {
        const Json* part = Get(content[i], "text");
        if (part == nullptr || !part->is_string()) return Bad(part_name + ".text", Describe(part), "a string");
        text += part->get_ref<const std::string&>();
      } else if (strict_) {
        return Bad(part_name + ".type", Describe(Get(content[i], "type")), "\"text\", the only kind this model reads");
      } else {
        text += Concat("[Unsupported ", type, "]");
      }
    }
    return text;
  }

  absl::Status ReadTask() {
    ASSIGN_OR_RETURN(message_.task, GetString(json_, "task", field_));
    if (Get(json_, "task") == nullptr) return absl::OkStatus();
    for (const Task& task : kTasks) {
      if (task.name == message_.task) return absl::OkStatus();
    }
    return Bad(field_ + ".task", Describe(Get(json_, "task")), "action, query, authority, domain, title or read_url");
  }

  absl::Status ReadTools() {
    const Json* tools = Get(json_, "tools");
    if (tools == nullptr) return absl::OkStatus();
    return ReadToolList(*tools, field_ + ".tools", message_.tools);
  }

  absl::Status ReadToolCalls() {
    const Json* calls = Get(json_, "tool_calls");
    if (calls == nullptr) return absl::OkStatus();
    if (!calls->is_array()) return Bad(field_ + ".tool_calls", Describe(calls), "an array");
    for (size_t i = 0; i < calls->size(); ++i) {
      const std::string name = Concat(field_, ".tool_calls[", i, "]");
      const Json* function = Get((*calls)[i], "function");
      if (function == nullptr || !function->is_object())
        return Bad(name + ".function", Describe(function), "an object");
      ToolCall call;
      ASSIGN_OR_RETURN(call.id, GetString((*calls)[i], "id", name));
      if (call.id.empty()) {
        ASSIGN_OR_RETURN(call.id, GetString(*function, "id", name + ".function"));
      }
      const Json* called = Get(*function, "name");
      if (called == nullptr || !called->is_string()) return Bad(name + ".function.name", Describe(called), "a string");
      call.name = called->get<std::string>();
      ASSIGN_OR_RETURN(call.arguments, ReadArguments(Get(*function, "arguments"), name + ".function.arguments"));
      message_.tool_calls.push_back(std::move(call));
    }
    return absl::OkStatus();
  }

  // A JSON object as a string, which is what OpenAI's format says; text that is none becomes the only argument.
  static absl::StatusOr<Json> ReadArguments(const Json* arguments, const std::string& name) {
    if (arguments != nullptr && arguments->is_object()) return *arguments;
    if (arguments == nullptr || !arguments->is_string()) return Bad(name, Describe(arguments), "a string of JSON");
    absl::StatusOr<Json> parsed = ParseJson(arguments->get_ref<const std::string&>());
    if (parsed.ok() && parsed->is_object()) return *std::move(parsed);
    Json wrapped = Json::object();
    wrapped["arguments"] = *arguments;
    return wrapped;
  }

 public:
  static absl::Status ReadToolList(const Json& tools, const std::string& name, std::vector<std::string>& lines) {
    if (!tools.is_array()) return Bad(name, Describe(&tools), "an array");
    lines.clear();
    for (size_t i = 0; i < tools.size(); ++i) {
      const Json* function = Get(tools[i], "function");
      const std::string field = Concat(name, "[", i, "].function");
      if (function == nullptr || !function->is_object()) return Bad(field, Describe(function), "an object");
      const Json* called = Get(*function, "name");
      if (called == nullptr || !called->is_string()) return Bad(field + ".name", Describe(called), "a string");
      lines.push_back(DumpPythonJson(*function));
    }
    return absl::OkStatus();
  }

 private:
  const Json& json_;
  const std::string field_;
  const bool strict_;
  Message message_;
};

absl::StatusOr<std::vector<Message>> ReadMessages(const Json& messages, std::string_view name, bool strict) {
  std::vector<Message> list;
  if (!messages.is_array()) return Bad(name, Describe(&messages), "an array of messages");
  for (size_t i = 0; i < messages.size(); ++i) {
    ASSIGN_OR_RETURN(Message message, MessageReader(messages[i], Concat(name, "[", i, "]"), strict).Read());
    list.push_back(std::move(message));
  }
  return list;
}

// ---- Rules over the whole list
// ---------------------------------------------------------------------------------------

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

// The last message that starts an answer, or -1.
int LastUserIndex(const std::vector<Message>& messages) {
  for (int i = static_cast<int>(messages.size()) - 1; i >= 0; --i) {
    if (messages[i].role == Role::kUser || messages[i].role == Role::kDeveloper) return i;
  }
  return -1;
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

// ---- Rendering
// -------------------------------------------------------------------------------------------------------

class PromptBuilder {
 public:
  void Control(std::string_view token) { prompt_.push_back({Segment::Kind::kControl, std::string(token)}); }

  void Text(std::string_view text) {
    if (text.empty()) return;
    if (prompt_.empty() || prompt_.back().kind != Segment::Kind::kText) prompt_.push_back({Segment::Kind::kText, ""});
    prompt_.back().text += text;
  }

  // Text of the encoder's own, in which markup is markup.
  void Literal(std::string_view text) {
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

  Prompt Finish() { return std::move(prompt_); }

 private:
  Prompt prompt_;
};

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
  return Renderer(messages, options, drop).Render(first, with_bos);
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
    RETURN_IF_ERROR(MessageReader::ReadToolList(*given, "tools", tools));
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
