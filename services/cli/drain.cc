// SPDX-License-Identifier: Apache-2.0
// `millrace drain WORKER`: asks the router to have one worker finish and end, and watches it do so.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "services/cli/command.h"
#include "services/cli/operator_client.h"
#include "services/cli/terminal.h"

namespace millrace::cli {
namespace {

using Clock = std::chrono::steady_clock;

const OperatorJson* Find(const OperatorJson& status, const std::string& name) {
  for (const OperatorJson& worker : status["cluster"]["workers"]) {
    if (worker.value("name", "") == name) return &worker;
  }
  return nullptr;
}

std::string Left(const OperatorJson& worker) {
  const auto number = [&](const char* key) { return worker.value(key, int64_t{0}); };
  std::string text = absl::StrCat(worker.value("state", ""), ", ", number("running"), " running");
  if (number("leased") > 0) absl::StrAppend(&text, ", ", number("leased"), " reserved");
  if (number("queued") > 0) absl::StrAppend(&text, ", ", number("queued"), " waiting");
  return text;
}

// Follows one incarnation until the router no longer has it.
int Watch(const Operator& router, const std::string& name, const std::string& incarnation, int64_t timeout_s) {
  const Clock::time_point start = Clock::now();
  std::string said;
  while (Clock::now() - start < std::chrono::seconds(timeout_s)) {
    const absl::StatusOr<OperatorJson> status = ClusterStatus(router);
    if (!status.ok()) return Fail("drain", kExitUnavailable, status.status());
    const OperatorJson* worker = Find(*status, name);
    if (worker == nullptr || worker->value("incarnation", "") != incarnation) {
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      std::printf("%s has left after %s%s\n", name.c_str(), HumanSeconds(seconds).c_str(),
                  worker == nullptr ? "" : "; its successor has joined");
      return kExitOk;
    }
    const std::string left = Left(*worker);
    if (left != said) std::printf("%s: %s\n", name.c_str(), left.c_str());
    std::fflush(stdout);
    said = left;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  return Fail("drain", kExitFailure, absl::StrCat(name, " is still there after ", timeout_s, " s: ", said));
}

}  // namespace

int RunDrain(Arguments arguments) {
  std::string worker;
  OperatorFlags where;
  bool wait = true;
  int64_t timeout_s = 120;
  Flags flags("drain", "Has one worker finish what it has and end",
              "The router places nothing new there; what runs finishes, or is tried elsewhere if its client has seen\n"
              "nothing of it yet. Then the process ends with status 0, and whoever supervises it starts it again. The\n"
              "same as SIGTERM to the worker, without having to know where it runs.\n\n"
              "  millrace drain decode-0\n"
              "  millrace drain prefill-1 --operator 10.0.0.5:8081 --no-wait");
  flags.Positional("WORKER", &worker, "Name of the worker, as the status page and `millrace top` show it.");
  where.Declare(flags);
  flags.Bool("wait", &wait, "Stay until it has left, and say what it still has.");
  flags.Int("timeout", &timeout_s, 1, 86400, "Seconds to wait; exit status 1 if it is still there then.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "drain", arguments, &exit_code)) return exit_code;
  const absl::StatusOr<Operator> router = where.Resolve();
  if (!router.ok()) return Fail("drain", kExitConfig, router.status());

  const absl::StatusOr<OperatorJson> before = ClusterStatus(*router);
  if (!before.ok()) return Fail("drain", kExitUnavailable, before.status());
  const OperatorJson* found = Find(*before, worker);
  if (found == nullptr) {
    std::string names;
    for (const OperatorJson& one : (*before)["cluster"]["workers"]) {
      absl::StrAppend(&names, names.empty() ? "" : ", ", one.value("name", ""));
    }
    return Fail("drain", kExitUsage, absl::StrCat("no worker ", worker, "; there are: ", names));
  }
  const absl::StatusOr<OperatorJson> told =
      TellOperator(*router, absl::StrCat("/workers/", PercentEncode(worker), "/drain"));
  if (!told.ok()) return Fail("drain", kExitUnavailable, told.status());
  std::printf("%s has been asked to drain\n", worker.c_str());
  return wait ? Watch(*router, worker, found->value("incarnation", ""), timeout_s) : kExitOk;
}

}  // namespace millrace::cli
