// SPDX-License-Identifier: Apache-2.0
// The reader, field by field; every refusal names the field, what was found and what was expected.
#include "engine/text/chat_messages.h"

#include <utility>

#include "engine/status.h"
#include "engine/text/concat.h"

namespace millrace::text::chat {
namespace {

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

  const Json& json_;
  const std::string field_;
  const bool strict_;
  Message message_;
};

}  // namespace

absl::StatusOr<std::vector<Message>> ReadMessages(const Json& messages, std::string_view name, bool strict) {
  std::vector<Message> list;
  if (!messages.is_array()) return Bad(name, Describe(&messages), "an array of messages");
  for (size_t i = 0; i < messages.size(); ++i) {
    ASSIGN_OR_RETURN(Message message, MessageReader(messages[i], Concat(name, "[", i, "]"), strict).Read());
    list.push_back(std::move(message));
  }
  return list;
}

absl::Status ReadToolList(const Json& tools, const std::string& name, std::vector<std::string>& lines) {
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

absl::Status Bad(std::string_view field, std::string_view found, std::string_view expected) {
  return absl::InvalidArgumentError(Concat(field, ": found ", found, ", expected ", expected));
}

std::string Describe(const Json* value) {
  if (value == nullptr) return "nothing";
  if (value->is_string()) return QuotePythonString(value->get_ref<const std::string&>().substr(0, 40));
  if (value->is_number() || value->is_binary()) return "a number";
  if (value->is_object()) return "an object";
  if (value->is_array()) return value->empty() ? "an empty array" : "an array";
  return value->is_null() ? "null" : value->get<bool>() ? "true" : "false";
}

const Json* Get(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

}  // namespace millrace::text::chat
