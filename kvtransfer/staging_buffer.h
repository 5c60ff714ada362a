// SPDX-License-Identifier: Apache-2.0
// Host buffers under one bound, for transports that carry something else than the caller's own memory. Internal to
// kvtransfer.
//
// Thread: any. A buffer may outlive the transport that took it, in a callback that is still to run; it keeps the
// bound's books alive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

namespace millrace::kvtransfer::internal {

// Counts bytes against the bound. One buffer larger than the bound may be had alone.
class StagingBudget {
 public:
  explicit StagingBudget(size_t most) : most_(most) {}
  bool Take(size_t bytes) {
    std::lock_guard lock(mu_);
    if (used_ != 0 && used_ + bytes > most_) return false;
    used_ += bytes;
    return true;
  }
  void GiveBack(size_t bytes) {
    std::lock_guard lock(mu_);
    used_ -= bytes;
  }

 private:
  const size_t most_;
  std::mutex mu_;
  size_t used_ = 0;  // guarded by mu_
};

// A host buffer under the budget, its contents undefined. Null if there is no room.
class StagingBuffer {
 public:
  static std::unique_ptr<StagingBuffer> Take(const std::shared_ptr<StagingBudget>& budget, size_t bytes) {
    if (!budget->Take(bytes)) return nullptr;
    return std::unique_ptr<StagingBuffer>(new StagingBuffer(budget, bytes));
  }
  ~StagingBuffer() { budget_->GiveBack(bytes_); }
  uint8_t* data() { return data_.get(); }

 private:
  StagingBuffer(std::shared_ptr<StagingBudget> budget, size_t bytes)
      : budget_(std::move(budget)), bytes_(bytes), data_(std::make_unique_for_overwrite<uint8_t[]>(bytes)) {}
  std::shared_ptr<StagingBudget> budget_;
  const size_t bytes_;
  std::unique_ptr<uint8_t[]> data_;
};

}  // namespace millrace::kvtransfer::internal
