// SPDX-License-Identifier: Apache-2.0
// One thread that owns the router's state: posted events and timers, run one at a time in order.
//
// The registry's sweeps and every request's life run here, so neither needs a lock around its logic. Each handler is
// given the time it runs at; nothing behind it reads a clock. gRPC callbacks and fronts only Post.
//
// The queue is bounded by what posts to it: each open stream and call has at most one event outstanding, and their
// number is bounded by admission.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"

namespace millrace::router {

using TimePoint = std::chrono::steady_clock::time_point;
using Duration = std::chrono::steady_clock::duration;
using std::chrono::milliseconds;

class EventLoop {
 public:
  using Handler = absl::AnyInvocable<void(TimePoint now)>;
  // Zero names no timer, so that a member can start empty and Cancel(0) does nothing.
  using TimerId = uint64_t;

  explicit EventLoop(std::string thread_name);
  // Runs what was posted before, drops timers, joins. Nothing may be posted any more.
  ~EventLoop();
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  // Any thread.
  void Post(Handler handler);
  // Runs `handler` on the loop and waits for it. Not from the loop's own thread.
  void Call(absl::AnyInvocable<void(TimePoint now)> handler);

  // Loop thread only. A handler that is due runs after what is posted already.
  TimerId At(TimePoint when, Handler handler);
  void Cancel(TimerId id);

  bool OnLoopThread() const { return std::this_thread::get_id() == thread_.get_id(); }

 private:
  void Run(const std::string& thread_name);

  absl::Mutex mutex_;
  std::vector<Handler> posted_ ABSL_GUARDED_BY(mutex_);
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;

  // Loop thread only.
  std::map<std::pair<TimePoint, TimerId>, Handler> timers_;
  std::map<TimerId, TimePoint> timer_times_;
  TimerId next_timer_ = 1;

  std::thread thread_;  // last: starts when everything above exists
};

}  // namespace millrace::router
