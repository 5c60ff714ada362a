// SPDX-License-Identifier: Apache-2.0
// The loop of event_loop.h: drain posted events, run due timers, sleep until the next.
#include "services/router/event_loop.h"

#include <pthread.h>

#include <utility>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "engine/status.h"

namespace millrace::router {

EventLoop::EventLoop(std::string thread_name) : thread_([this, name = std::move(thread_name)] { Run(name); }) {}

EventLoop::~EventLoop() {
  {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
  }
  thread_.join();
}

void EventLoop::Post(Handler handler) {
  absl::MutexLock lock(&mutex_);
  posted_.push_back(std::move(handler));
}

void EventLoop::Call(absl::AnyInvocable<void(TimePoint now)> handler) {
  CHECK(!OnLoopThread(), "EventLoop::Call from its own thread would wait for itself");
  absl::Notification done;
  Post([&](TimePoint now) {
    handler(now);
    done.Notify();
  });
  done.WaitForNotification();
}

EventLoop::TimerId EventLoop::At(TimePoint when, Handler handler) {
  const TimerId id = next_timer_++;
  timer_times_.emplace(id, when);
  timers_.emplace(std::make_pair(when, id), std::move(handler));
  return id;
}

void EventLoop::Cancel(TimerId id) {
  const auto found = timer_times_.find(id);
  if (found == timer_times_.end()) return;
  timers_.erase({found->second, id});
  timer_times_.erase(found);
}

void EventLoop::Run(const std::string& thread_name) {
  pthread_setname_np(pthread_self(), thread_name.substr(0, 15).c_str());
  std::vector<Handler> batch;
  while (true) {
    bool stopping = false;
    {
      absl::MutexLock lock(&mutex_);
      const auto something = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return stop_ || !posted_.empty(); };
      if (timers_.empty()) {
        mutex_.Await(absl::Condition(&something));
      } else {
        const TimePoint due = timers_.begin()->first.first;
        mutex_.AwaitWithTimeout(absl::Condition(&something), absl::FromChrono(due - std::chrono::steady_clock::now()));
      }
      batch.swap(posted_);
      stopping = stop_;
    }
    for (Handler& handler : batch) handler(std::chrono::steady_clock::now());
    if (stopping && batch.empty()) return;
    batch.clear();
    const TimePoint now = std::chrono::steady_clock::now();
    while (!stopping && !timers_.empty() && timers_.begin()->first.first <= now) {
      auto node = timers_.extract(timers_.begin());
      timer_times_.erase(node.key().second);
      node.mapped()(now);
    }
  }
}

}  // namespace millrace::router
