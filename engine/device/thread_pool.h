// SPDX-License-Identifier: Apache-2.0
// Splits a loop over the engine's CPU threads. Which thread runs an index never changes what it computes, so one thread
// and many give the same bits.
//
// Thread: one caller at a time (the engine thread), which takes part itself.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace millrace {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(i) for every i in [0, n) and returns when all are done. `body` must not call For again.
  template <typename Body>
  void For(int64_t n, Body&& body) {
    if (workers_.empty() || n <= 1) {
      for (int64_t i = 0; i < n; ++i) body(i);
      return;
    }
    using Plain = std::remove_reference_t<Body>;
    Run(
        n, [](void* context, int64_t i) { (*static_cast<Plain*>(context))(i); }, &body);
  }

 private:
  using Task = void (*)(void* context, int64_t i);
  void Run(int64_t n, Task task, void* context);
  void Work();
  void Drain();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  // Guarded by mutex_ except next_; a generation is one Run.
  uint64_t generation_ = 0;
  bool stop_ = false;
  int busy_ = 0;
  int64_t n_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int64_t> next_{0};
};

}  // namespace millrace
