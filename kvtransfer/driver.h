// SPDX-License-Identifier: Apache-2.0
// Who drives a transport, and when it sleeps. Internal to kvtransfer; knows no wire.
//
// An engine (a UCX worker) may be touched by one thread at a time. Normally that is the driver's own thread: it runs
// posted tasks and due timers, lets the engine progress, spins for a while after the last event, then arms the engine
// and sleeps in epoll. A thread inside WaitFor takes over: it drives until its condition holds and the own thread stays
// parked, so that a reply is handled on the thread that waits for it, without a thread switch.
//
// Everything that the engine calls back runs under the drive lock, one at a time. Post, RunAfter and WaitFor may be
// called from any thread, Post and RunAfter from callbacks too.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/time/time.h"

namespace millrace::kvtransfer::internal {

class Driver {
 public:
  using Task = absl::AnyInvocable<void()>;

  class Engine {
   public:
    virtual ~Engine() = default;
    virtual bool Progress() = 0;  // true: something happened
    virtual bool Arm() = 0;       // true: fd() will be readable when something happens; false: progress again
    virtual int fd() const = 0;
    virtual void EnterThread() {}  // before the first turn on a thread, under the drive lock
  };

  Driver(Engine& engine, absl::Duration spin, absl::Duration linger);
  ~Driver();  // stops

  void Start();
  // Joins the thread. Timers that have not run are dropped; tasks that have not are returned, for the caller to run or
  // drop.
  std::vector<Task> Stop();

  void Post(Task task);
  void RunAfter(absl::Duration delay, Task task);
  bool WaitFor(absl::FunctionRef<bool()> done, absl::Duration timeout);
  void PostAtOnce(absl::FunctionRef<void()> post);     // what `post` posts runs here, once; not from callbacks
  void Exclusively(absl::FunctionRef<void()> action);  // runs it here, under the drive lock; not from callbacks

 private:
  using Clock = std::chrono::steady_clock;

  void Run();
  bool DriveLocked();
  void SleepUntil(Clock::time_point deadline);
  void Park(Clock::duration at_most);
  void Wake();
  bool IsLingeringDriver() const;
  bool Parked() const;

  Engine& engine_;
  const uint64_t id_;  // never reused, as an address is
  const Clock::duration spin_, linger_;
  int event_fd_ = -1, epoll_fd_ = -1;

  std::mutex drive_mu_;

  std::mutex queue_mu_;
  std::vector<Task> tasks_;                        // guarded by queue_mu_
  std::multimap<Clock::time_point, Task> timers_;  // guarded by queue_mu_
  std::atomic<int> asleep_{0};                     // threads about to sleep or asleep in epoll
  std::atomic<int> waiting_{0};                    // threads inside WaitFor
  std::atomic<std::thread::id> last_waiter_{};
  std::atomic<Clock::rep> linger_until_{0};
  std::atomic<Clock::rep> last_wait_{0};  // how long the last waiter waited
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace millrace::kvtransfer::internal
