// SPDX-License-Identifier: Apache-2.0
// `millrace chat`: talk to a running cluster from the terminal.
//
// The conversation lives here and is sent whole with each question, as any client does.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <iostream>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "services/cli/chat_client.h"
#include "services/cli/command.h"
#include "services/cli/http_client.h"
#include "services/cli/terminal.h"

namespace millrace::cli {
namespace {

using Json = nlohmann::ordered_json;

Json AssistantMessage(const ChatAnswer& answer) {
  Json message = {{"role", "assistant"}, {"content", answer.content}};
  if (!answer.reasoning.empty()) message["reasoning_content"] = answer.reasoning;
  if (!answer.tool_calls.empty()) message["tool_calls"] = answer.tool_calls;
  return message;
}

}  // namespace

int RunChat(Arguments arguments) {
  DoorFlags way;
  std::string message, system, effort;
  double temperature = -1;
  int64_t max_tokens = 0;
  bool quiet = false;
  Flags flags("chat", "Talks to a running cluster",
              "Without --message it reads questions from the terminal until Ctrl-D; /new starts a new conversation.\n\n"
              "  millrace chat\n"
              "  millrace chat --address router.example:8080 --message 'Sort 9 4 7.' --temperature 0");
  AddDoorFlags(flags, &way);
  flags.String("message", &message, "TEXT", "Ask this one thing and end.");
  flags.String("system", &system, "TEXT", "System prompt.");
  flags.Enum("effort", &effort, {"none", "high", "max"}, "How hard to think.");
  flags.Double("temperature", &temperature, 0, 2, "Default: the server's.");
  flags.Int("max-tokens", &max_tokens, 1, 1 << 24, "Most tokens of one answer. Default: the server's.");
  flags.Bool("quiet", &quiet, "Only the answer.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "chat", arguments, &exit_code)) return exit_code;
  const absl::StatusOr<HttpDoor> door = OpenDoor(way);
  if (!door.ok()) return Fail("chat", kExitNoInput, door.status());
  const std::string& address = way.address;
  const absl::StatusOr<std::string> model = OnlyModel(address, *door);
  if (absl::IsUnauthenticated(model.status())) return Fail("chat", kExitUnavailable, model.status());
  if (!model.ok()) {
    return Fail("chat", kExitUnavailable, absl::StrCat(model.status().message(), "; is `millrace up` running?"));
  }

  Json messages = Json::array();
  const auto reset = [&] {
    messages = Json::array();
    if (!system.empty()) messages.push_back(Json{{"role", "system"}, {"content", system}});
  };
  reset();
  const bool terminal = IsTerminal(STDIN_FILENO) && IsTerminal(STDOUT_FILENO);
  if (message.empty() && terminal && !quiet) std::printf("%s at %s. Ctrl-D ends.\n", model->c_str(), address.c_str());
  while (true) {
    std::string question = message;
    if (message.empty()) {
      if (terminal) std::fputs("\n\033[1m> \033[0m", stdout);
      std::fflush(stdout);
      if (!std::getline(std::cin, question)) break;
      if (question == "/new") {
        reset();
        continue;
      }
      if (absl::StripAsciiWhitespace(question).empty()) continue;
    }
    messages.push_back(Json{{"role", "user"}, {"content", question}});
    Json body = {{"model", *model}, {"messages", messages}};
    if (!effort.empty()) body["reasoning_effort"] = effort;
    if (flags.Given("temperature")) body["temperature"] = temperature;
    if (flags.Given("max-tokens")) body["max_tokens"] = max_tokens;
    const absl::StatusOr<ChatAnswer> answer = StreamChat(address, *door, std::move(body));
    std::fputs("\n", stdout);
    if (!answer.ok()) {
      if (!message.empty()) return Fail("chat", kExitUnavailable, answer.status());
      Fail("chat", kExitUnavailable, answer.status());
      messages.erase(messages.size() - 1);
      continue;
    }
    messages.push_back(AssistantMessage(*answer));
    if (!quiet && IsTerminal(STDERR_FILENO)) {
      std::fprintf(stderr, "\033[2m%s\033[0m\n", DescribeSpeed(*answer).c_str());
    }
    if (!message.empty()) break;
  }
  return kExitOk;
}

}  // namespace millrace::cli
