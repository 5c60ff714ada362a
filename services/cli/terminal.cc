// SPDX-License-Identifier: Apache-2.0
// Bars, sizes and colours of terminal.h.
#include "services/cli/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace millrace::cli {

bool IsTerminal(int fd) {
  if (!isatty(fd)) return false;
  const char* term = std::getenv("TERM");
  const char* no_color = std::getenv("NO_COLOR");
  return term != nullptr && std::strcmp(term, "dumb") != 0 && (no_color == nullptr || *no_color == '\0');
}

int TerminalWidth(int fd) {
  winsize size{};
  if (ioctl(fd, TIOCGWINSZ, &size) != 0 || size.ws_col < 20) return 100;
  return std::min<int>(size.ws_col, 120);
}

std::string HumanBytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    ++unit;
  }
  if (unit == 0) return absl::StrCat(bytes, " B");
  return absl::StrFormat(value < 10 ? "%.2f %s" : value < 100 ? "%.1f %s" : "%.0f %s", value, kUnits[unit]);
}

std::string HumanSeconds(double seconds) {
  if (seconds < 10) return absl::StrFormat("%.1f s", seconds);
  if (seconds < 60) return absl::StrFormat("%.0f s", seconds);
  const int64_t whole = std::llround(seconds);
  if (whole < 3600) return absl::StrFormat("%d min %02d s", whole / 60, whole % 60);
  return absl::StrFormat("%d h %02d min", whole / 3600, whole / 60 % 60);
}

std::string Bar(double fraction, int width) {
  const int filled = static_cast<int>(std::lround(std::clamp(fraction, 0.0, 1.0) * width));
  std::string bar;
  for (int i = 0; i < width; ++i) bar += i < filled ? "█" : "░";
  return bar;
}

std::string ProgressLine(absl::string_view label, int64_t done, int64_t total, double elapsed_seconds, int width) {
  const double fraction = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 0;
  const double rate = elapsed_seconds > 0 ? static_cast<double>(done) / elapsed_seconds : 0;
  std::string tail = absl::StrCat(HumanBytes(done), " of ", HumanBytes(total));
  if (rate > 0 && done < total) {
    absl::StrAppend(&tail, ", ", HumanBytes(static_cast<int64_t>(rate)), "/s, ",
                    HumanSeconds(static_cast<double>(total - done) / rate), " left");
  }
  const int cells = std::clamp(width - static_cast<int>(label.size() + tail.size()) - 6, 4, 40);
  return absl::StrCat(label, "  ", Bar(fraction, cells), "  ", tail);
}

Progress::Progress(std::string label, bool enabled)
    : label_(std::move(label)), enabled_(enabled), terminal_(IsTerminal(STDERR_FILENO)) {}

Progress::~Progress() {
  if (drawn_ && !finished_ && terminal_) std::fputs("\r\033[K", stderr);
}

void Progress::Update(int64_t done, int64_t total) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!enabled_ || finished_) return;
  done_ = done;
  total_ = total;
  Draw(Clock::now());
}

void Progress::Draw(Clock::time_point now) {
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  if (terminal_) {
    if (drawn_ && now - last_draw_ < std::chrono::milliseconds(50)) return;
    std::fprintf(stderr, "\r\033[K%s",
                 ProgressLine(label_, done_, total_, elapsed, TerminalWidth(STDERR_FILENO)).c_str());
    std::fflush(stderr);
    drawn_ = true;
    last_draw_ = now;
    return;
  }
  const int quarter = total_ > 0 ? static_cast<int>(4 * done_ / total_) : 0;
  if (elapsed < 2 || quarter <= last_quarter_ || quarter >= 4) return;
  last_quarter_ = quarter;
  std::fprintf(stderr, "%s: %s of %s (%d %%)\n", label_.c_str(), HumanBytes(done_).c_str(), HumanBytes(total_).c_str(),
               25 * quarter);
}

void Progress::Finish() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!enabled_ || finished_) return;
  finished_ = true;
  const double elapsed = std::chrono::duration<double>(Clock::now() - start_).count();
  if (drawn_ && terminal_) std::fputs("\r\033[K", stderr);
  std::fprintf(stderr, "%s: %s in %s\n", label_.c_str(), HumanBytes(total_).c_str(), HumanSeconds(elapsed).c_str());
}

}  // namespace millrace::cli
