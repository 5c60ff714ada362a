// SPDX-License-Identifier: Apache-2.0
// The pool of thread_pool.h: workers sleep between loops and take indices from one counter during them.
#include "engine/device/thread_pool.h"

namespace millrace {

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { Work(); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();  // bounded: a worker only waits for wake_
}

void ThreadPool::Run(int64_t n, Task task, void* context) {
  {
    std::lock_guard lock(mutex_);
    task_ = task;
    context_ = context;
    n_ = n;
    next_.store(0, std::memory_order_relaxed);
    busy_ = static_cast<int>(workers_.size());
    ++generation_;
  }
  wake_.notify_all();
  Drain();
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return busy_ == 0; });  // bounded by the longest body
}

void ThreadPool::Drain() {
  for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) task_(context_, i);
}

void ThreadPool::Work() {
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
    if (stop_) return;
    seen = generation_;
    lock.unlock();
    Drain();
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace millrace
