// SPDX-License-Identifier: Apache-2.0
// Sends a chat request, prints deltas, collects the answer.
#include "services/cli/chat_client.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/status.h"
#include "services/cli/command.h"
#include "services/cli/terminal.h"

namespace millrace::cli {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

class Collector {
 public:
  explicit Collector(ChatAnswer& answer) : answer_(answer) {}

  bool OnEvent(absl::string_view data) {
    if (data == "[DONE]") {
      done_ = true;
      return true;
    }
    const Json json = Json::parse(data.begin(), data.end(), nullptr, /*allow_exceptions=*/false);
    if (!json.is_object()) {
      error_ = absl::InternalError("the server sent an event that is not JSON");
      return false;
    }
    if (json.contains("error")) {
      error_ = absl::UnavailableError(ErrorText(json.dump()));
      return false;
    }
    if (json.contains("usage") && json["usage"].is_object()) {
      answer_.prompt_tokens = json["usage"].value("prompt_tokens", 0);
      answer_.completion_tokens = json["usage"].value("completion_tokens", 0);
    }
    if (!json.contains("choices")) return true;
    for (const Json& choice : json["choices"]) {
      if (choice.contains("finish_reason") && choice["finish_reason"].is_string()) {
        answer_.finish_reason = choice["finish_reason"];
      }
      if (choice.contains("delta")) OnDelta(choice["delta"]);
    }
    return true;
  }

  bool done() const { return done_; }
  const absl::Status& error() const { return error_; }

 private:
  static std::string Text(const Json& delta, const char* key) {
    return delta.contains(key) && delta[key].is_string() ? delta[key].get<std::string>() : "";
  }
  void OnDelta(const Json& delta) {
    const std::string reasoning = Text(delta, "reasoning_content");
    const std::string content = Text(delta, "content");
    if (answer_.first_token_s == 0 && (!reasoning.empty() || !content.empty() || delta.contains("tool_calls"))) {
      answer_.first_token_s = std::chrono::duration<double>(Clock::now() - start_).count();
    }
    if (!reasoning.empty()) {
      std::fputs(colour_ ? "\033[2m" : "", stdout);
      std::fwrite(reasoning.data(), 1, reasoning.size(), stdout);
      std::fputs(colour_ ? "\033[0m" : "", stdout);
      answer_.reasoning += reasoning;
    }
    if (!content.empty()) {
      if (answer_.content.empty() && !answer_.reasoning.empty()) std::fputs("\n\n", stdout);
      std::fwrite(content.data(), 1, content.size(), stdout);
      answer_.content += content;
    }
    if (delta.contains("tool_calls")) OnToolCalls(delta["tool_calls"]);
    std::fflush(stdout);
  }
  void OnToolCalls(const Json& calls) {
    for (const Json& call : calls) {
      const size_t index = call.value("index", 0);
      while (answer_.tool_calls.size() <= index) {
        answer_.tool_calls.push_back(
            Json{{"id", ""}, {"type", "function"}, {"function", {{"name", ""}, {"arguments", ""}}}});
      }
      Json& out = answer_.tool_calls[index];
      if (call.contains("id") && call["id"].is_string()) out["id"] = call["id"];
      if (!call.contains("function")) continue;
      const Json& function = call["function"];
      if (const std::string name = Text(function, "name"); !name.empty()) {
        out["function"]["name"] = name;
        std::printf("\n[%s] ", name.c_str());
      }
      const std::string piece = Text(function, "arguments");
      out["function"]["arguments"] = out["function"]["arguments"].get<std::string>() + piece;
      std::fwrite(piece.data(), 1, piece.size(), stdout);
    }
  }

  ChatAnswer& answer_;
  const Clock::time_point start_ = Clock::now();
  const bool colour_ = IsTerminal(STDOUT_FILENO);
  bool done_ = false;
  absl::Status error_;
};

}  // namespace

void AddDoorFlags(Flags& flags, DoorFlags* door) {
  flags.String("address", &door->address, "HOST:PORT", "The router's HTTP port.");
  flags.Bool("tls", &door->tls, "It speaks TLS.");
  flags.String("ca", &door->ca, "FILE", "PEM certificate to believe instead of the system's; implies --tls.");
  flags.String("api-key-file", &door->api_key_file, "FILE",
               "Its first line is the key to send. Default: $OPENAI_API_KEY, if that is set.");
}

absl::StatusOr<HttpDoor> OpenDoor(const DoorFlags& flags) {
  HttpDoor door;
  door.tls = flags.tls || !flags.ca.empty();
  door.ca = flags.ca;
  ASSIGN_OR_RETURN(door.api_key, ReadApiKey(flags.api_key_file, "OPENAI_API_KEY"));
  return door;
}

absl::StatusOr<std::string> OnlyModel(const std::string& address, const HttpDoor& door) {
  HttpCall call;
  call.address = address;
  call.door = door;
  call.path = "/v1/models";
  call.read_timeout = std::chrono::milliseconds(5000);
  absl::StatusOr<HttpReply> reply = Send(call);
  if (!reply.ok()) return reply.status();
  if (reply->status == 401) return absl::UnauthenticatedError(ErrorText(reply->body));
  const Json json = Json::parse(reply->body, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("data") || json["data"].empty()) {
    return absl::UnavailableError(absl::StrCat(address, " does not answer /v1/models as a router does"));
  }
  return json["data"][0].value("id", "");
}

std::string ErrorText(const std::string& body) {
  const Json json = Json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (json.is_object() && json.contains("error") && json["error"].is_object()) {
    const Json& error = json["error"];
    return absl::StrCat(error.value("message", "no message"), " (",
                        error.contains("code") && error["code"].is_string() ? error["code"].get<std::string>() : "?",
                        ")");
  }
  return body.substr(0, 200);
}

absl::StatusOr<ChatAnswer> StreamChat(const std::string& address, const HttpDoor& door, Json body) {
  body["stream"] = true;
  body["stream_options"] = Json{{"include_usage", true}};
  ChatAnswer answer;
  const Clock::time_point start = Clock::now();
  Collector collector(answer);
  SseReader events([&](absl::string_view data) { return collector.OnEvent(data); });
  HttpCall call;
  call.address = address;
  call.door = door;
  call.method = "POST";
  call.path = "/v1/chat/completions";
  call.accept = "text/event-stream";
  call.body = body.dump(-1, ' ', false, Json::error_handler_t::replace);
  call.on_body = [&](absl::string_view bytes) { return events.Push(bytes); };
  const absl::StatusOr<HttpReply> reply = Send(call);
  RETURN_IF_ERROR(collector.error());
  if (!reply.ok()) return reply.status();
  if (reply->status != 200) {
    return absl::UnavailableError(absl::StrCat("HTTP ", reply->status, ": ", ErrorText(reply->body)));
  }
  if (!collector.done()) return absl::UnavailableError("the answer was cut off");
  answer.total_s = std::chrono::duration<double>(Clock::now() - start).count();
  return answer;
}

std::string DescribeSpeed(const ChatAnswer& answer) {
  const double decode_s = answer.total_s - answer.first_token_s;
  return absl::StrFormat(
      "%d prompt tokens; %d tokens in %s, first after %.2f s%s", answer.prompt_tokens, answer.completion_tokens,
      HumanSeconds(answer.total_s), answer.first_token_s,
      answer.completion_tokens > 1 && decode_s > 0
          ? absl::StrFormat(", then %.0f a second", static_cast<double>(answer.completion_tokens - 1) / decode_s)
          : "");
}

}  // namespace millrace::cli
