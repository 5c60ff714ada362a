// SPDX-License-Identifier: Apache-2.0
// When to stop: SIGTERM and SIGINT as something a thread can wait for.
//
// The first signal asks for a drain (finish what is running, take nothing new), the second one for an end at once. A
// StopSignal can also be raised by code, which is how tests and the in-process cluster stop a role.
//
// A drain ends: by itself within its grace, or, should something of ours or of a library's never come back, by
// LeaveWithin, with a word in the log and a status of its own. A process that stays for ever keeps its ports and its
// memory, and nobody asks why.
//
// Thread: any. InstallHandlers once per process, before other threads start, so that they inherit the blocked mask.
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>

#include "absl/time/time.h"

namespace millrace {

inline constexpr int kExitDrainStuck = 70;
// What may pass between the end of a drain's grace and the end of the process: less than the 10 s after which a kubelet
// would kill it without a word.
inline constexpr absl::Duration kLeaveAfterGrace = absl::Seconds(8);

class StopSignal {
 public:
  // Blocks both signals in this thread and its children and starts a thread that waits for them. The second signal
  // ends the process with code 130 or 143. The signal must live as long as the process.
  void InstallHandlers();

  // Once, before it is raised: from then on the process has `limit` to end, or is ended with kExitDrainStuck.
  void LeaveWithin(std::string who, absl::Duration limit);

  void Raise();
  bool raised() const;
  // True: raised; false: the time has passed.
  bool WaitFor(absl::Duration timeout) const;
  void Wait() const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool raised_ = false;  // guarded by mutex_, as is all below
  std::string who_;
  absl::Duration leave_within_ = absl::InfiniteDuration();
};

}  // namespace millrace
