// SPDX-License-Identifier: Apache-2.0
// Child processes of `up`: started, watched, restarted with back-off, drained in order.
//
// A child gets its own process group (Ctrl-C reaches the supervisor alone, which then drains in order), a log file for
// its output, and SIGTERM from the kernel should the supervisor die. A child that ends by itself is started again,
// sooner or later depending on how often it has ended; one that says its model or its configuration is wrong is not,
// because trying again cannot help. What the children serve is not known here.
//
// Thread: one, the one that constructed it (PR_SET_PDEATHSIG is bound to the thread that forks).
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace millrace::cli {

struct ChildSpec {
  std::string name;                    // unique: "prefill-0"
  std::vector<std::string> arguments;  // after the program's name
  int drain_stage = 0;                 // stages are drained in ascending order, each wholly before the next
};

class Supervisor {
 public:
  using Clock = std::chrono::steady_clock;

  struct Child {
    ChildSpec spec;
    std::string log_path;
    pid_t pid = -1;  // -1: not running
    int starts = 0;
    Clock::time_point started_at{}, restart_at{};
    std::chrono::milliseconds back_off{0};
    std::string last_end;  // "exit 65", "killed by SIGKILL"; empty while it never ended
  };

  // `program` is executed for each child; logs go to `log_dir`, which is created.
  Supervisor(std::string program, std::string log_dir, std::vector<ChildSpec> specs);
  // Kills what is left.
  ~Supervisor();
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  absl::Status StartAll();
  // Collects ended children and starts those whose time has come. Call every 50 ms or so. Once a child has ended with a
  // status that no restart can cure, returns an error with the last line of its log; failed_exit_code() is its status.
  absl::Status Poll(Clock::time_point now);
  // SIGTERM stage by stage, each stage given `grace` before SIGKILL. `tick` is called while waiting.
  void Drain(std::chrono::milliseconds grace, const std::function<void()>& tick);

  const std::vector<Child>& children() const { return children_; }
  int failed_exit_code() const { return failed_exit_code_; }
  // Called with one line whenever a child ended or was started again.
  void set_on_event(std::function<void(const std::string&)> f) { on_event_ = std::move(f); }

  // The last line of a log file that holds something, for error messages.
  static std::string LastLine(const std::string& path);

 private:
  absl::Status Start(Child& child);
  void Reap();
  bool AnyRunning(int stage) const;

  const std::string program_, log_dir_;
  std::vector<Child> children_;
  std::function<void(const std::string&)> on_event_;
  bool draining_ = false;
  int failed_exit_code_ = 0;
  std::string failure_;
};

}  // namespace millrace::cli
