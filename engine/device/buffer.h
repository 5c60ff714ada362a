// SPDX-License-Identifier: Apache-2.0
// Owned, zeroed, 128-byte aligned host memory: what weights, caches and workspaces are kept in.
//
// Memory is touched when a buffer is made, so that a machine that cannot hold it says so at start and not under load.
// It asks the kernel for huge pages: a decode step reads all weights once, and with small pages it waits for the TLB.
// Small buffers therefore stand side by side in shared chunks; a chunk goes when its last buffer does.
//
// Thread: making and dropping buffers from any; the memory itself is not guarded.
#pragma once

#include <cstdint>
#include <memory>

namespace millrace {

// Zeroed bytes, aligned to 128; never null, also for 0 bytes. Out of memory is a CHECK that names the size.
std::shared_ptr<uint8_t> AllocateHost(int64_t bytes);

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : data_(AllocateHost(count * static_cast<int64_t>(sizeof(T)))), count_(count) {}
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;

  T* data() { return reinterpret_cast<T*>(data_.get()); }
  const T* data() const { return reinterpret_cast<const T*>(data_.get()); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }

 private:
  std::shared_ptr<uint8_t> data_;  // shared with a chunk, never with another buffer
  int64_t count_ = 0;
};

}  // namespace millrace
