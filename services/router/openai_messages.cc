// SPDX-License-Identifier: Apache-2.0
// See openai_messages.h.
#include "services/router/openai_messages.h"

#include <algorithm>
#include <set>
#include <utility>

#include "engine/status.h"
#include "engine/text/concat.h"
#include "services/common/error.h"

namespace millrace::router {
namespace {

using text::Concat;

absl::Status Missing(const std::string& param) {
  return InvalidRequest("missing_field", param, Concat(param, ": missing."));
}

// A string, or an array of text parts. Nothing is ever fetched: parts that name a URL are refused.
absl::Status CheckContent(const Json& content, const std::string& param) {
  if (content.is_string()) return absl::OkStatus();
  if (!content.is_array()) return WrongType(param, "a string or an array of text parts", &content);
  if (content.empty()) return WrongValue(param, "at least one part", &content);
  for (size_t i = 0; i < content.size(); ++i) {
    const std::string part_param = Concat(param, "[", i, "]");
    if (!content[i].is_object()) return WrongType(part_param, "an object", &content[i]);
    JsonFields part(content[i], part_param + ".");
    const Json* type = part.Get("type");
    if (type == nullptr || !type->is_string()) return WrongType(part.Path("type"), "a string", type);
    if (*type != "text") {
      return InvalidRequest("unsupported_content", part.Path("type"),
                            Concat(part.Path("type"), ": only \"text\" is supported, got ", DescribeJson(type), "."));
    }
    const Json* text = part.Get("text");
    if (text == nullptr || !text->is_string()) return WrongType(part.Path("text"), "a string", text);
  }
  return absl::OkStatus();
}

absl::Status CheckToolCalls(const Json& calls, const std::string& param, const ApiLimits& limits) {
  if (!calls.is_array()) return WrongType(param, "an array", &calls);
  if (calls.size() > limits.max_tools) {
    return InvalidRequest("too_many_items", param, Concat(param, ": more than ", limits.max_tools, " calls."));
  }
  for (size_t i = 0; i < calls.size(); ++i) {
    const std::string call_param = Concat(param, "[", i, "]");
    if (!calls[i].is_object()) return WrongType(call_param, "an object", &calls[i]);
    JsonFields call(calls[i], call_param + ".");
    const Json* id = call.Get("id");
    if (id != nullptr && !id->is_string()) return WrongType(call.Path("id"), "a string", id);
    const Json* type = call.Get("type");
    if (type != nullptr && *type != "function") return WrongValue(call.Path("type"), "\"function\"", type);
    const Json* function = call.Get("function");
    if (function == nullptr || !function->is_object()) return WrongType(call.Path("function"), "an object", function);
    JsonFields function_fields(*function, call.Path("function."));
    for (const std::string_view name : {"name", "arguments"}) {
      const Json* value = function_fields.Get(name);
      if (value == nullptr || !value->is_string()) return WrongType(function_fields.Path(name), "a string", value);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckMessage(const Json& message, const std::string& param, const ApiLimits& limits) {
  if (!message.is_object()) return WrongType(param, "an object", &message);
  JsonFields fields(message, param + ".");
  const Json* role = fields.Get("role");
  if (role == nullptr) return Missing(fields.Path("role"));
  if (!role->is_string()) return WrongType(fields.Path("role"), "a string", role);
  static constexpr std::string_view kRoles[] = {"system", "user", "assistant", "tool", "developer", "latest_reminder"};
  const auto& name = role->get_ref<const std::string&>();
  if (std::find(std::begin(kRoles), std::end(kRoles), name) == std::end(kRoles)) {
    return WrongValue(fields.Path("role"), "system, user, assistant, tool, developer or latest_reminder", role);
  }
  const Json* content = fields.Get("content");
  if (content != nullptr) RETURN_IF_ERROR(CheckContent(*content, fields.Path("content")));
  if (name == "assistant") {
    const Json* reasoning = fields.Get("reasoning_content");
    if (reasoning != nullptr && !reasoning->is_string()) {
      return WrongType(fields.Path("reasoning_content"), "a string", reasoning);
    }
    const Json* calls = fields.Get("tool_calls");
    if (calls != nullptr) RETURN_IF_ERROR(CheckToolCalls(*calls, fields.Path("tool_calls"), limits));
    if (content == nullptr && calls == nullptr && reasoning == nullptr) return Missing(fields.Path("content"));
    return absl::OkStatus();
  }
  if (content == nullptr) return Missing(fields.Path("content"));
  if (name == "tool") {
    const Json* id = fields.Get("tool_call_id");
    if (id == nullptr) return Missing(fields.Path("tool_call_id"));
    if (!id->is_string()) return WrongType(fields.Path("tool_call_id"), "a string", id);
  }
  return absl::OkStatus();
}

// Levels of containers. Does not recurse deeper than the reader allowed.
size_t JsonDepth(const Json& value) {
  size_t deepest = 0;
  if (!value.is_structured()) return 0;
  for (const auto& item : value) deepest = std::max(deepest, JsonDepth(item));
  return deepest + 1;
}

absl::Status CheckTool(const Json& tool, const std::string& param, const ApiLimits& limits,
                       std::set<std::string>& names, bool& asks_strict) {
  if (!tool.is_object()) return WrongType(param, "an object", &tool);
  JsonFields fields(tool, param + ".");
  const Json* type = fields.Get("type");
  if (type == nullptr) return Missing(fields.Path("type"));
  if (*type != "function") return WrongValue(fields.Path("type"), "\"function\"", type);
  const Json* function = fields.Get("function");
  if (function == nullptr) return Missing(fields.Path("function"));
  if (!function->is_object()) return WrongType(fields.Path("function"), "an object", function);

  JsonFields function_fields(*function, fields.Path("function."));
  const std::string name_param = function_fields.Path("name");
  std::string name, description;
  if (function_fields.Get("name") == nullptr) return Missing(name_param);
  RETURN_IF_ERROR(function_fields.Read("name", name, limits.max_tool_name_bytes));
  // The name goes into markup that has no escapes.
  const auto allowed = [](unsigned char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.';
  };
  if (name.empty() || !std::all_of(name.begin(), name.end(), allowed)) {
    return WrongValue(name_param, "letters, digits, '_', '-' and '.'", function_fields.Get("name"));
  }
  if (!names.insert(name).second) {
    return InvalidRequest("duplicate_tool", name_param, Concat(name_param, ": ", QuoteInput(name), " appears twice."));
  }
  RETURN_IF_ERROR(function_fields.Read("description", description, limits.max_tool_schema_bytes));
  bool strict = false;
  RETURN_IF_ERROR(function_fields.Read("strict", strict));
  asks_strict |= strict;
  const Json* parameters = function_fields.Get("parameters");
  if (parameters == nullptr) return absl::OkStatus();
  const std::string schema_param = function_fields.Path("parameters");
  if (!parameters->is_object()) return WrongType(schema_param, "an object", parameters);
  if (JsonDepth(*parameters) > limits.max_tool_schema_depth) {
    return InvalidRequest("invalid_schema", schema_param,
                          Concat(schema_param, ": nested deeper than ", limits.max_tool_schema_depth, "."));
  }
  if (parameters->dump().size() > limits.max_tool_schema_bytes) {
    return InvalidRequest("invalid_schema", schema_param,
                          Concat(schema_param, ": larger than ", limits.max_tool_schema_bytes, " bytes."));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckMessages(JsonFields& fields, const ApiLimits& limits) {
  const Json* messages = fields.Get("messages");
  if (messages == nullptr) return Missing("messages");
  if (!messages->is_array()) return WrongType("messages", "an array", messages);
  if (messages->empty()) return WrongValue("messages", "at least one message", messages);
  if (messages->size() > limits.max_messages) {
    return InvalidRequest("too_many_items", "messages",
                          Concat("messages: ", messages->size(), " messages, the limit is ", limits.max_messages, "."));
  }
  for (size_t i = 0; i < messages->size(); ++i) {
    RETURN_IF_ERROR(CheckMessage((*messages)[i], Concat("messages[", i, "]"), limits));
  }
  return absl::OkStatus();
}

absl::StatusOr<ToolMarkup> CheckTools(JsonFields& fields, const ApiLimits& limits, std::vector<std::string>& ignored) {
  const Json* tools = fields.Get("tools");
  bool asks_strict = false;
  if (tools != nullptr) {
    if (!tools->is_array()) return WrongType("tools", "an array", tools);
    if (tools->size() > limits.max_tools) {
      return InvalidRequest("too_many_items", "tools",
                            Concat("tools: ", tools->size(), " tools, the limit is ", limits.max_tools, "."));
    }
    std::set<std::string> names;
    for (size_t i = 0; i < tools->size(); ++i) {
      RETURN_IF_ERROR(CheckTool((*tools)[i], Concat("tools[", i, "]"), limits, names, asks_strict));
    }
  }
  bool parallel = true;
  RETURN_IF_ERROR(fields.Read("parallel_tool_calls", parallel));
  if (!parallel) ignored.push_back("parallel_tool_calls");
  if (asks_strict) ignored.push_back("tools.function.strict");  // arguments are not constrained to the schema

  const Json* choice = fields.Get("tool_choice");
  const bool has_tools = tools != nullptr && !tools->empty();
  if (choice == nullptr || *choice == "auto") return has_tools ? ToolMarkup::kCalls : ToolMarkup::kText;
  if (*choice == "none") return ToolMarkup::kDropped;
  if (*choice == "required" || choice->is_object()) {
    return InvalidRequest("unsupported_parameter", "tool_choice",
                          "tool_choice: only \"auto\" and \"none\" are supported; a call cannot be forced.");
  }
  return WrongValue("tool_choice", "\"auto\" or \"none\"", choice);
}

absl::Status CheckResponseFormat(JsonFields& fields) {
  const Json* format = fields.Get("response_format");
  if (format == nullptr) return absl::OkStatus();
  if (!format->is_object()) return WrongType("response_format", "an object", format);
  JsonFields format_fields(*format, "response_format.");
  const Json* type = format_fields.Get("type");
  if (type == nullptr || !type->is_string()) return WrongType("response_format.type", "a string", type);
  if (*type == "text" || *type == "json_object") return absl::OkStatus();
  if (*type == "json_schema") {
    return InvalidRequest("invalid_schema", "response_format",
                          "response_format: json_schema is not supported, since output is not constrained to a schema; "
                          "use json_object and put the schema into the prompt.");
  }
  return WrongValue("response_format.type", "\"text\" or \"json_object\"", type);
}

}  // namespace millrace::router
