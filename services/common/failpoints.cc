// SPDX-License-Identifier: Apache-2.0
// See failpoints.h.
#include "services/common/failpoints.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"

namespace millrace::failpoints {
namespace internal {
std::atomic<bool> any_armed{false};
}

namespace {

enum class ActionKind { kCrash, kExit, kError, kSleep, kHang, kOn };

struct Action {
  ActionKind kind = ActionKind::kOn;
  int64_t argument = 0;
  uint64_t only_hit = 0;  // 0: every hit
};

struct Table {
  std::mutex mutex;
  std::map<std::string, Action, std::less<>> actions;
  std::map<std::string, uint64_t, std::less<>> hits;
};

Table& GetTable() {
  static Table* table = new Table;  // never destroyed: threads may pass a place while the process ends
  return *table;
}

absl::Status ParseAction(std::string_view text, Action& action) {
  const std::vector<std::string> parts = absl::StrSplit(absl::string_view(text.data(), text.size()), '@');
  if (parts.size() > 2) return absl::InvalidArgumentError("more than one @");
  if (parts.size() == 2 && (!absl::SimpleAtoi(parts[1], &action.only_hit) || action.only_hit == 0)) {
    return absl::InvalidArgumentError("@ wants a count from 1");
  }
  absl::string_view word = parts[0];
  std::string argument;
  if (const size_t open = word.find('('); open != absl::string_view::npos) {
    if (word.back() != ')') return absl::InvalidArgumentError("missing )");
    argument = std::string(word.substr(open + 1, word.size() - open - 2));
    word = word.substr(0, open);
  }
  const auto number = [&] { return absl::SimpleAtoi(argument, &action.argument) && action.argument >= 0; };
  if (word == "crash") {
    action.kind = ActionKind::kCrash;
  } else if (word == "hang") {
    action.kind = ActionKind::kHang;
  } else if (word == "on") {
    action.kind = ActionKind::kOn;
  } else if (word == "exit" && number()) {
    action.kind = ActionKind::kExit;
  } else if (word == "sleep" && number()) {
    action.kind = ActionKind::kSleep;
  } else if (word == "error") {
    action.kind = ActionKind::kError;
    for (int code = 1; code <= 16; ++code) {
      if (absl::StatusCodeToString(static_cast<absl::StatusCode>(code)) == argument) action.argument = code;
    }
    if (action.argument == 0) return absl::InvalidArgumentError("error wants a code such as UNAVAILABLE");
  } else {
    return absl::InvalidArgumentError("no such action");
  }
  return absl::OkStatus();
}

}  // namespace

const std::vector<std::string_view>& Names() {
  static const auto* names =
      new std::vector<std::string_view>{"p.before_prefill",  "p.during_prefill",     "p.after_prefill",
                                        "p.before_transfer", "p.during_transfer",    "p.after_transfer",
                                        "p.before_commit",   "p.after_commit",       "d.reserve",
                                        "d.before_commit",   "d.after_commit",       "d.before_step",
                                        "d.after_step",      "d.before_send",        "e.before_compute",
                                        "e.after_compute",   "x.dispatch",           "w.load",
                                        "bug.drop_frontier", "bug.off_by_one_row",   "bug.swap_two_blocks",
                                        "bug.skip_expert",   "bug.stale_attempt",    "bug.n_minus_1",
                                        "bug.rope_position", "bug.reuse_before_ack", "bug.double_token",
                                        "bug.arrival_order"};
  return *names;
}

absl::Status Arm(std::string_view specification) {
  std::map<std::string, Action, std::less<>> actions;
  for (absl::string_view entry :
       absl::StrSplit(absl::string_view(specification.data(), specification.size()), ';', absl::SkipWhitespace())) {
    const std::vector<std::string> parts = absl::StrSplit(absl::StripAsciiWhitespace(entry), absl::MaxSplits('=', 1));
    Action action;
    const absl::Status parsed = parts.size() == 2 ? ParseAction(parts[1], action) : absl::InvalidArgumentError("no =");
    if (!parsed.ok()) return absl::InvalidArgumentError(absl::StrCat("failpoint \"", entry, "\": ", parsed.message()));
    if (std::find(Names().begin(), Names().end(), parts[0]) == Names().end()) {
      return absl::InvalidArgumentError(absl::StrCat("failpoint \"", parts[0], "\": no such place"));
    }
    actions[parts[0]] = action;
  }
  Table& table = GetTable();
  std::lock_guard<std::mutex> lock(table.mutex);
  table.actions = std::move(actions);
  table.hits.clear();
  internal::any_armed.store(!table.actions.empty());
  return absl::OkStatus();
}

uint64_t Hits(std::string_view name) {
  Table& table = GetTable();
  std::lock_guard<std::mutex> lock(table.mutex);
  const auto it = table.hits.find(name);
  return it == table.hits.end() ? 0 : it->second;
}

namespace internal {

absl::Status HitSlow(std::string_view name) {
  Table& table = GetTable();
  Action action;
  {
    std::lock_guard<std::mutex> lock(table.mutex);
    const uint64_t hit = ++table.hits[std::string(name)];
    const auto it = table.actions.find(name);
    if (it == table.actions.end() || (it->second.only_hit != 0 && it->second.only_hit != hit)) return absl::OkStatus();
    action = it->second;
  }
  switch (action.kind) {
    case ActionKind::kCrash:
      kill(getpid(), SIGKILL);
      break;
    case ActionKind::kExit:
      _exit(static_cast<int>(action.argument));
    case ActionKind::kSleep:
      absl::SleepFor(absl::Milliseconds(action.argument));
      break;
    case ActionKind::kHang:
      for (;;) absl::SleepFor(absl::Seconds(1));
    case ActionKind::kError:
      return absl::Status(static_cast<absl::StatusCode>(action.argument),
                          absl::StrCat("failpoint ", absl::string_view(name.data(), name.size())));
    case ActionKind::kOn:
      break;
  }
  return absl::OkStatus();
}

bool BugSlow(std::string_view name) {
  Table& table = GetTable();
  std::lock_guard<std::mutex> lock(table.mutex);
  const auto it = table.actions.find(name);
  if (it == table.actions.end()) return false;
  const uint64_t hit = ++table.hits[std::string(name)];
  return it->second.only_hit == 0 || it->second.only_hit == hit;
}

}  // namespace internal
}  // namespace millrace::failpoints
