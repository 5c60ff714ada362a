// SPDX-License-Identifier: Apache-2.0
// `millrace explain REQUEST-ID`: why a request went where it went, and where its time went.
//
// The router keeps a record of the last requests (services/router/explanation.h); this lays one out, or lists them.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/cli/command.h"
#include "services/cli/operator_client.h"
#include "services/cli/terminal.h"

namespace millrace::cli {
namespace {

using Json = OperatorJson;

std::string Milliseconds(double ms) { return ms < 10000 ? absl::StrFormat("%.1f ms", ms) : HumanSeconds(ms / 1e3); }

std::string Paint(bool colour, const char* code, const std::string& text) {
  return colour ? absl::StrCat("\033[", code, "m", text, "\033[0m") : text;
}

std::string EndOf(const Json& request) {
  if (request.value("state", "") == "running") return "running";
  const int status = request.value("http_status", 0);
  return absl::StrCat(request.value("outcome", ""), status == 0 ? "" : absl::StrCat(", status ", status));
}

// Where in the request's time a phase lies: dots before it, blocks for it.
std::string Span(double start, double length, double total, int width) {
  std::string bar;
  for (int i = 0; i < width; ++i) {
    const double begin = total * i / width, end = total * (i + 1) / width;
    const bool inside = begin < start + length && end > start;
    bar += inside ? "█" : "·";
  }
  return bar;
}

void Print(const Json& request, bool colour) {
  const double total = request.value("total_ms", 0.0);
  std::printf("%s  %s\n", Paint(colour, "1", request.value("request_id", "")).c_str(),
              request.value("route", "").c_str());
  std::printf("%s after %s; %d prompt tokens, %d drawn; trace %s\n", EndOf(request).c_str(),
              Milliseconds(total).c_str(), request.value("input_tokens", 0), request.value("output_tokens", 0),
              request.value("trace_id", "").c_str());
  if (request.value("attempts", 0) > 1) {
    std::printf("%s\n", Paint(colour, "33", absl::StrCat("tried ", request.value("attempts", 0), " times")).c_str());
  }
  int choice = -1, attempt = -1;
  for (const Json& phase : request["phases"]) {
    const std::string name = phase.value("name", "");
    if (name == "generation") continue;  // the whole of a choice: its parts are below
    if (phase.value("choice", 0) != choice || phase.value("attempt", 0) != attempt) {
      choice = phase.value("choice", 0);
      attempt = phase.value("attempt", 0);
      std::printf("\nchoice %d, attempt %d\n", choice, attempt);
    }
    const double ms = phase.value("ms", 0.0);
    const std::string outcome = phase.value("outcome", "");
    std::string text = phase.value("worker", "");
    if (!phase.value("detail", "").empty()) absl::StrAppend(&text, text.empty() ? "" : ": ", phase.value("detail", ""));
    if (outcome != "ok") absl::StrAppend(&text, text.empty() ? "" : "; ", Paint(colour, "31", outcome));
    std::printf("  %-10s %s %10s  %s\n", name.c_str(), Span(phase.value("start_ms", 0.0), ms, total, 24).c_str(),
                Milliseconds(ms).c_str(), text.c_str());
  }
  if (request.value("bytes_moved", int64_t{0}) > 0) {
    std::printf("\n%s moved, %d extents sent again\n", HumanBytes(request.value("bytes_moved", int64_t{0})).c_str(),
                request.value("extents_resent", 0));
  }
}

void List(const Json& requests, bool colour) {
  std::printf("%s\n",
              Paint(colour, "2",
                    absl::StrFormat("%-36s %-26s %9s %9s %9s  %s", "REQUEST", "ROUTE", "AGO", "TOOK", "TOKENS", "END"))
                  .c_str());
  for (const Json& request : requests) {
    std::printf("%-36s %-26s %9s %9s %9d  %s\n", request.value("request_id", "").c_str(),
                request.value("route", "").c_str(), HumanSeconds(request.value("age_ms", 0.0) / 1e3).c_str(),
                Milliseconds(request.value("total_ms", 0.0)).c_str(), request.value("output_tokens", 0),
                EndOf(request).c_str());
  }
}

}  // namespace

int RunExplain(Arguments arguments) {
  std::string id;
  OperatorFlags where;
  bool json = false;
  Flags flags(
      "explain", "Says why a request went where it went, and where its time went",
      "The router keeps a record of what runs and of the last requests that ended: the pair that was chosen and\n"
      "why, the wait, each attempt's prefill, hand-off and decode, bytes moved, what was sent again. Every reply\n"
      "has its id in x-request-id. Without an id: a list, newest first. No prompt and no output is kept.\n\n"
      "  millrace explain\n"
      "  millrace explain req-8f14e45fceea167a5a36dedd");
  flags.Positional("REQUEST-ID", &id, "As in x-request-id of the reply.", /*required=*/false);
  where.Declare(flags);
  flags.Bool("json", &json, "The router's JSON as it is.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "explain", arguments, &exit_code)) return exit_code;
  const absl::StatusOr<Operator> router = where.Resolve();
  if (!router.ok()) return Fail("explain", kExitConfig, router.status());

  const absl::StatusOr<Json> answer =
      AskOperator(*router, id.empty() ? "/requests" : absl::StrCat("/requests/", PercentEncode(id)));
  if (absl::IsNotFound(answer.status())) return Fail("explain", kExitFailure, answer.status());
  if (!answer.ok()) return Fail("explain", kExitUnavailable, answer.status());
  const bool colour = IsTerminal(STDOUT_FILENO);
  if (json) {
    std::printf("%s\n", answer->dump(2).c_str());
  } else if (id.empty()) {
    List((*answer)["requests"], colour);
  } else {
    Print(*answer, colour);
  }
  return kExitOk;
}

}  // namespace millrace::cli
