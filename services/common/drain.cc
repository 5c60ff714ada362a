// SPDX-License-Identifier: Apache-2.0
// See drain.h.
#include "services/common/drain.h"

#include <signal.h>
#include <unistd.h>

#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "spdlog/spdlog.h"

namespace millrace {

void StopSignal::InstallHandlers() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  // Detached on purpose: it lives in sigwait until the process ends, and so does this object.
  std::thread([this, signals] {
    for (;;) {
      int signal = 0;
      if (sigwait(&signals, &signal) != 0) continue;
      if (raised()) _exit(128 + signal);
      Raise();
    }
  }).detach();
}

void StopSignal::LeaveWithin(std::string who, absl::Duration limit) {
  std::lock_guard<std::mutex> lock(mutex_);
  who_ = std::move(who);
  leave_within_ = limit;
}

void StopSignal::Raise() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::exchange(raised_, true)) return;
    if (leave_within_ < absl::InfiniteDuration()) {
      // Detached on purpose: what it waits for is the end of the process.
      std::thread([who = who_, limit = leave_within_] {
        absl::SleepFor(limit);
        spdlog::critical("{}: still here {} after it was told to drain; leaving at once", who,
                         absl::FormatDuration(limit));
        spdlog::default_logger()->flush();
        _exit(kExitDrainStuck);
      }).detach();
    }
  }
  changed_.notify_all();
}

bool StopSignal::raised() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return raised_;
}

bool StopSignal::WaitFor(absl::Duration timeout) const {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, absl::ToChronoMicroseconds(timeout), [this] { return raised_; });
}

void StopSignal::Wait() const {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return raised_; });
}

}  // namespace millrace
