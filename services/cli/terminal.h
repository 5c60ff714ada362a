// SPDX-License-Identifier: Apache-2.0
// What a person at a terminal sees: progress bars with bytes and time left, sizes, colours. Logs get plain lines.
//
// Everything here asks whether the stream is a terminal and falls silent or plain when it is not, so that output in CI
// and in `kubectl logs` is lines, not escape sequences.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

#include "absl/strings/string_view.h"

namespace millrace::cli {

// A terminal that understands escape sequences: isatty, TERM not dumb, NO_COLOR not set.
bool IsTerminal(int fd);
// Columns, 100 when unknown, at most 120.
int TerminalWidth(int fd);

std::string HumanBytes(int64_t bytes);     // "19.6 MiB"
std::string HumanSeconds(double seconds);  // "0.4 s", "2 min 05 s"
// "████████░░░░" of `width` cells.
std::string Bar(double fraction, int width);

// One labelled bar on standard error. On a terminal the line is redrawn at most every 50 ms; elsewhere a plain line at
// 0 %, each 25 % if it takes longer than 2 s, and at the end. Any thread.
class Progress {
 public:
  // Silent when `enabled` is false (--quiet, --json on a pipe).
  Progress(std::string label, bool enabled);
  ~Progress();
  void Update(int64_t done, int64_t total);
  // Clears the bar and, on a terminal or not, leaves one line with what was done and how long it took.
  void Finish();

 private:
  using Clock = std::chrono::steady_clock;
  void Draw(Clock::time_point now);

  std::mutex mutex_;
  const std::string label_;
  const bool enabled_;
  const bool terminal_;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point last_draw_{};
  int64_t done_ = 0, total_ = 0;
  int last_quarter_ = -1;
  bool drawn_ = false, finished_ = false;
};

// "label  ████░░░░  12.1 / 19.6 MiB  310 MiB/s  0.2 s left": also what `up` shows for each role.
std::string ProgressLine(absl::string_view label, int64_t done, int64_t total, double elapsed_seconds, int width);

}  // namespace millrace::cli
