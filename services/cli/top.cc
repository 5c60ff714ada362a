// SPDX-License-Identifier: Apache-2.0
// `millrace top`: the cluster as it works, a frame a second, from the operator port's JSON.
//
// On a terminal the frame is redrawn in place until Ctrl-C; elsewhere frames follow each other as plain lines. Rates
// are differences of two answers, so the first frame comes after one interval.
#include <sys/ioctl.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/cli/command.h"
#include "services/cli/operator_client.h"
#include "services/cli/terminal.h"
#include "services/common/drain.h"

namespace millrace::cli {
namespace {

using Clock = std::chrono::steady_clock;
using Json = OperatorJson;

int64_t Number(const Json& object, const char* key) { return object.value(key, int64_t{0}); }

// Pads to `width` terminal cells by hand: states and names are ASCII.
std::string Cell(const std::string& text, int width) { return absl::StrFormat("%-*s", width, text); }

std::string PassText(int64_t us) {
  if (us < 1000) return absl::StrCat(us, " us");
  return us < 1000000 ? absl::StrFormat("%.1f ms", us / 1e3) : absl::StrFormat("%.2f s", us / 1e6);
}

class Frames {
 public:
  explicit Frames(bool colour) : colour_(colour) {}

  // Lines of a frame; rates are those since the call before.
  std::vector<std::string> Next(const Json& status, const std::string& address) {
    const Clock::time_point now = Clock::now();
    std::map<std::string, double> rates;  // by incarnation
    std::map<std::string, int64_t> tokens;
    const double seconds = std::chrono::duration<double>(now - last_at_).count();
    const Json& workers = status["cluster"]["workers"];
    for (const Json& worker : workers) {
      const std::string id = worker.value("incarnation", "");
      tokens[id] = Number(worker, "tokens_total");
      if (const auto before = last_.find(id); before != last_.end() && seconds > 0) {
        rates[id] = static_cast<double>(tokens[id] - before->second) / seconds;
      }
    }
    last_ = std::move(tokens);
    last_at_ = now;

    std::vector<std::string> lines = {Head(status, address), Totals(status, rates), ""};
    lines.push_back(Dim(absl::StrFormat("%-24s %-8s %-9s %8s %4s %5s %14s %9s %10s  %s", "WORKER", "ROLE", "STATE",
                                        "A SECOND", "RUN", "WAIT", "PAGES", "SLOTS", "PASS", "UP")));
    for (const Json& worker : workers) lines.push_back(Line(worker, rates));
    if (workers.empty()) lines.push_back("no worker has joined");
    return lines;
  }

 private:
  std::string Paint(const char* code, const std::string& text) const {
    return colour_ ? absl::StrCat("\033[", code, "m", text, "\033[0m") : text;
  }
  std::string Dim(const std::string& text) const { return Paint("2", text); }
  std::string State(const std::string& state, int width) const {
    return Paint(state == "ready" ? "32" : state == "suspect" ? "31" : "33", Cell(state, width));
  }

  std::string Head(const Json& status, const std::string& address) const {
    const bool ready = status.value("ready", false);
    return absl::StrCat(Paint("1", status.value("model", "")), "  ", State(ready ? "ready" : "not ready", 0),
                        ready ? "" : absl::StrCat(" (", status.value("why_not_ready", ""), ")"), "  up ",
                        HumanSeconds(static_cast<double>(Number(status, "uptime_ms")) / 1e3), "  ",
                        status.value("version", ""), "  http://", address, "/");
  }

  std::string Totals(const Json& status, const std::map<std::string, double>& rates) const {
    const Json& cluster = status["cluster"];
    double drawn = 0, computed = 0;
    int64_t pages = 0, used = 0, ready = 0;
    for (const Json& worker : cluster["workers"]) {
      const auto rate = rates.find(worker.value("incarnation", ""));
      const std::string role = worker.value("role", "");
      ready += worker.value("state", "") == "ready";
      if (rate != rates.end() && role == "decode") drawn += rate->second;
      if (rate != rates.end() && role == "prefill") computed += rate->second;
      if (role != "decode") continue;
      pages += Number(worker, "pages_total");
      used += Number(worker, "pages_total") > 0 ? Number(worker, "pages_total") - Number(worker, "pages_free") : 0;
    }
    const int64_t queued = Number(cluster, "queued_generations");
    return absl::StrFormat(
        "drawn %.0f/s   prompt %.0f/s   running %d   waiting %d   decode pages %d %%   ready %d of %d", drawn, computed,
        Number(cluster, "open_generations") - queued, queued, pages > 0 ? 100 * used / pages : 0, ready,
        cluster["workers"].size());
  }

  std::string Line(const Json& worker, const std::map<std::string, double>& rates) const {
    const std::string state = worker.value("suspect", false) ? "suspect" : worker.value("state", "");
    std::string line = absl::StrCat(absl::StrFormat("%-24s %-8s ", worker.value("name", ""), worker.value("role", "")),
                                    State(state, 9), " ");
    if (state == "loading") {
      const int64_t total = Number(worker, "load_bytes_total");
      if (total <= 0) return line;
      const double done = static_cast<double>(Number(worker, "load_bytes_done")) / static_cast<double>(total);
      return absl::StrCat(line, Bar(done, 20), absl::StrFormat(" %.0f %% of ", 100 * done), HumanBytes(total));
    }
    const auto rate = rates.find(worker.value("incarnation", ""));
    const auto share = [&](const char* what) {
      const int64_t total = Number(worker, absl::StrCat(what, "_total").c_str());
      if (total == 0) return std::string("-");
      return absl::StrCat(total - Number(worker, absl::StrCat(what, "_free").c_str()), "/", total);
    };
    absl::StrAppend(
        &line, absl::StrFormat(
                   "%8s %4d %5d %14s %9s %10s  %s", rate == rates.end() ? "-" : absl::StrFormat("%.0f", rate->second),
                   Number(worker, "running"), Number(worker, "queued") + Number(worker, "leased"), share("pages"),
                   share("slots"), Number(worker, "steps") > 0 ? PassText(Number(worker, "last_step_us")) : "-",
                   HumanSeconds(static_cast<double>(Number(worker, "up_ms")) / 1e3)));
    const std::string detail = worker.value("detail", "");
    return detail.empty() ? line : absl::StrCat(line, "  ", detail);
  }

  const bool colour_;
  std::map<std::string, int64_t> last_;  // tokens_total by incarnation
  Clock::time_point last_at_;
};

// The alternate screen for as long as it lives, so that the shell's own is there again afterwards.
class Screen {
 public:
  explicit Screen(bool terminal) : terminal_(terminal) {
    if (terminal_) std::fputs("\033[?1049h\033[?25l", stdout);
  }
  ~Screen() {
    if (terminal_) std::fputs("\033[?25h\033[?1049l", stdout);
    std::fflush(stdout);
  }
  void Draw(const std::vector<std::string>& lines) {
    if (!terminal_) {
      for (const std::string& line : lines) std::printf("%s\n", line.c_str());
      std::printf("\n");
    } else {
      winsize size{};
      const size_t rows = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_row > 2 ? size.ws_row - 1u : 24;
      std::fputs("\033[?7l\033[H", stdout);  // no wrapping: a long line ends at the edge
      for (size_t i = 0; i < lines.size() && i < rows; ++i) std::printf("%s\033[K\n", lines[i].c_str());
      if (lines.size() > rows) std::printf("... %zu more\033[K", lines.size() - rows);
      std::fputs("\033[J\033[?7h", stdout);
    }
    std::fflush(stdout);
  }

 private:
  const bool terminal_;
};

}  // namespace

int RunTop(Arguments arguments) {
  OperatorFlags where;
  int64_t count = 0, interval_ms = 1000;
  Flags flags("top", "Shows the cluster at work, frame by frame",
              "A line for the whole: tokens drawn and prompt tokens computed a second, requests running and waiting.\n"
              "Then a line for each worker: A SECOND is tokens, for experts rows; WAIT is prompts, reservations or\n"
              "messages not begun; PASS is the last one's duration. Ctrl-C ends. Not on a terminal, frames are plain\n"
              "lines one after the other.\n\n"
              "  millrace top\n"
              "  millrace top --count 1 --operator 10.0.0.5:8081");
  where.Declare(flags);
  flags.Int("interval-ms", &interval_ms, 100, 3600000, "Between two frames.");
  flags.Int("count", &count, 0, 1000000, "End after so many frames; 0: at Ctrl-C.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "top", arguments, &exit_code)) return exit_code;
  const absl::StatusOr<Operator> router = where.Resolve();
  if (!router.ok()) return Fail("top", kExitConfig, router.status());

  absl::StatusOr<Json> status = ClusterStatus(*router);
  if (!status.ok()) return Fail("top", kExitUnavailable, status.status());
  static StopSignal stop;  // lives as long as the process, as its handler thread does
  stop.InstallHandlers();
  const bool terminal = IsTerminal(STDOUT_FILENO);
  Frames frames(terminal);
  (void)frames.Next(*status, router->address);
  {
    Screen screen(terminal);
    for (int64_t shown = 0; count == 0 || shown < count; ++shown) {
      if (stop.WaitFor(absl::Milliseconds(interval_ms))) break;
      status = ClusterStatus(*router);
      if (!status.ok()) break;
      screen.Draw(frames.Next(*status, router->address));
    }
  }
  return status.ok() ? kExitOk : Fail("top", kExitUnavailable, status.status());
}

}  // namespace millrace::cli
