// SPDX-License-Identifier: Apache-2.0
// When to stop: SIGTERM and SIGINT as something a thread can wait for.
//
// The first signal asks for a drain (finish what is running, take nothing new), the second one for an end at once. A
// StopSignal can also be raised by code, which is how tests and the in-process cluster stop a role.
//
// Thread: any. InstallHandlers once per process, before other threads start, so that they inherit the blocked mask.
#pragma once

#include <condition_variable>
#include <mutex>

#include "absl/time/time.h"

namespace millrace {

class StopSignal {
 public:
  // Blocks both signals in this thread and its children and starts a thread that waits for them. The second signal
  // ends the process with code 130 or 143. The signal must live as long as the process.
  void InstallHandlers();

  void Raise();
  bool raised() const;
  // True: raised; false: the time has passed.
  bool WaitFor(absl::Duration timeout) const;
  void Wait() const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool raised_ = false;  // guarded by mutex_
};

}  // namespace millrace
