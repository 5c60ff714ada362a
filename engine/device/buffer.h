// SPDX-License-Identifier: Apache-2.0
// Owned, zeroed, 128-byte aligned host memory: what weights, caches and workspaces are kept in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace millrace {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  // Large buffers come zeroed from the kernel and are only backed by memory once touched.
  explicit Buffer(int64_t count) : count_(count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 128 * 128;
    void* memory = std::aligned_alloc(128, bytes == 0 ? 128 : bytes);
    CHECK(memory != nullptr, absl::StrCat("cannot allocate ", bytes, " bytes"));
    std::memset(memory, 0, bytes);
    data_.reset(static_cast<T*>(memory));
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }
  int64_t size() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t count_ = 0;
};

}  // namespace millrace
