// SPDX-License-Identifier: Apache-2.0
// One streamed chat answer from a router, printed as it comes: what `chat` and `up --once` share.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "services/cli/flags.h"
#include "services/cli/http_client.h"

namespace millrace::cli {

struct ChatAnswer {
  std::string content, reasoning, finish_reason;
  nlohmann::ordered_json tool_calls = nlohmann::ordered_json::array();
  int64_t prompt_tokens = 0, completion_tokens = 0;
  double first_token_s = 0, total_s = 0;
};

// `body` is a request of /v1/chat/completions; it is sent with stream and usage on. Text goes to standard output,
// reasoning dimmed on a terminal. Errors carry the server's own words.
absl::StatusOr<ChatAnswer> StreamChat(const std::string& address, const HttpDoor& door, nlohmann::ordered_json body);

// The one model that a router serves, from /v1/models.
absl::StatusOr<std::string> OnlyModel(const std::string& address, const HttpDoor& door);

// The flags of a command that talks to a router's public port, and what they come to. The key is a file's first line,
// or OPENAI_API_KEY as that API's other clients have it. NotFound: no such file.
struct DoorFlags {
  std::string address = "127.0.0.1:8080", ca, api_key_file;
  bool tls = false;
};
void AddDoorFlags(Flags& flags, DoorFlags* door);
absl::StatusOr<HttpDoor> OpenDoor(const DoorFlags& flags);

// The message of an OpenAI error object, or the raw text of whatever came instead.
std::string ErrorText(const std::string& body);

// "12 tokens in 0.4 s (first after 0.1 s, 40 a second)".
std::string DescribeSpeed(const ChatAnswer& answer);

}  // namespace millrace::cli
