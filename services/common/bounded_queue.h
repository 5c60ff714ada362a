// SPDX-License-Identifier: Apache-2.0
// A queue that refuses rather than grows: how other threads hand work to an engine thread.
//
// TryPush never waits; a full queue is the caller's to report. Post is for what must not be refused because something
// already admitted depends on it (completions, aborts): it goes past the capacity, and its number is bounded by what
// was admitted. The consumer takes everything at once, so that one wake-up serves a burst.
//
// Thread: any; one consumer.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <utility>

#include "absl/time/time.h"

namespace millrace {

template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t capacity) : capacity_(capacity) {}

  // False: full or closed; `item` is left as it was.
  bool TryPush(T& item) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (closed_ || items_.size() >= capacity_) return false;
      items_.push_back(std::move(item));
    }
    ready_.notify_one();
    return true;
  }

  // False: closed.
  bool Post(T item) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (closed_) return false;
      items_.push_back(std::move(item));
    }
    ready_.notify_one();
    return true;
  }

  // Everything queued; waits up to `timeout` for the first item. Empty: the time passed, or closed and drained.
  std::deque<T> DrainFor(absl::Duration timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (timeout > absl::ZeroDuration()) {
      ready_.wait_for(lock, absl::ToChronoMicroseconds(timeout), [this] { return closed_ || !items_.empty(); });
    }
    return std::exchange(items_, {});
  }

  // No more pushes; what is queued can still be drained.
  void Close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    ready_.notify_all();
  }

  size_t size() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return items_.size();
  }

 private:
  const size_t capacity_;
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<T> items_;  // guarded by mutex_
  bool closed_ = false;  // guarded by mutex_
};

}  // namespace millrace
