// SPDX-License-Identifier: Apache-2.0
// Chat messages as the encoder's rules see them, and the reader that makes them of JSON: private to the encoder.
//
// The reader checks every field that a rule relies on and refuses by its name; what the rules then do with a list is
// chat_encoding.cc, and how a list becomes text is chat_render.cc.
//
// Thread: any; pure functions.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/text/python_json.h"

namespace millrace::text::chat {

// What a message's `task` may name, and the control token that asks for it.
struct Task {
  std::string_view name;
  std::string_view token;
};
inline constexpr Task kTasks[] = {{"action", "<｜action｜>"},       {"query", "<｜query｜>"},
                                  {"authority", "<｜authority｜>"}, {"domain", "<｜domain｜>"},
                                  {"title", "<｜title｜>"},         {"read_url", "<｜read_url｜>"}};
inline constexpr std::string_view kActionTask = "action";

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

// Reads and checks a list of messages; `name` is the list's in errors. `strict`: see ChatOptions.
// Errors: InvalidArgument `name[i].field: found X, expected Y`.
absl::StatusOr<std::vector<Message>> ReadMessages(const Json& messages, std::string_view name, bool strict);

// Reads a list of tools as one JSON line per function. Errors: as above.
absl::Status ReadToolList(const Json& tools, const std::string& name, std::vector<std::string>& lines);

// The error `field: found X, expected Y`, and what a value is, for it.
absl::Status Bad(std::string_view field, std::string_view found, std::string_view expected);
std::string Describe(const Json* value);

// A member, or null where it is absent or null, which Python's .get treats alike.
const Json* Get(const Json& object, const char* key);

}  // namespace millrace::text::chat
