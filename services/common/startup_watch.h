// SPDX-License-Identifier: Apache-2.0
// Ends a start-up that has stopped moving, and says what it was waiting for.
//
// Loading has no deadline of its own: a large checkpoint on a slow disk may take an hour and be in order. What is never
// in order is a start-up in which nothing happens: a share that stalls, a driver that hangs. It cannot be told from
// inside the call that is stuck, so a thread beside it looks: the clock starts anew with each stage, with progress that
// is reported, and with every sign of work of the process (pages that came from a device, processor time). Passes after
// the start are the watchdog's (worker_core.h).
//
// Thread: any.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace millrace {

inline constexpr int kExitStartupStuck = 69;

class StartupWatch {
 public:
  // `expired` hears once, on the watch's thread, that nothing has moved for `limit`. The default logs the sentence and
  // ends the process with kExitStartupStuck: the thread that is stuck cannot be asked to stop. A limit of zero: no
  // watch.
  StartupWatch(std::string who, absl::Duration limit, std::function<void(const std::string& why)> expired = nullptr);
  ~StartupWatch();  // Done

  void Waiting(std::string for_what);       // a new stage
  void Moved(int64_t done, int64_t total);  // of the stage, in bytes
  void Done();                              // start-up is over; idempotent

 private:
  void Run();
  std::string Sentence(absl::Duration still) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string who_;
  const absl::Duration limit_;
  const std::function<void(const std::string&)> expired_;

  mutable absl::Mutex mutex_;
  std::string stage_ ABSL_GUARDED_BY(mutex_) = "the process";
  int64_t done_ ABSL_GUARDED_BY(mutex_) = 0, total_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t moves_ ABSL_GUARDED_BY(mutex_) = 0;  // stages and progress so far
  bool over_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace millrace
