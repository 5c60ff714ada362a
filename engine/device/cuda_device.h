// SPDX-License-Identifier: Apache-2.0
// One CUDA device: opening it, its streams and events, and memory that is all taken at start.
//
// Nothing here computes. Opening is where the world can be wrong (no driver, no card, another generation, too little
// memory), so it returns a status that says which. After that a failing call means a broken context: CUDA_CHECK prints
// the call and the place and ends the process, and a supervisor starts it again. Builds without CUDA lack this header's
// target; whoever includes it is compiled with the backend only.
//
// Thread: a Device belongs to the engine thread; streams, events and buffers to whoever made them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace millrace::cuda {

namespace internal {
[[noreturn]] void CallFailed(cudaError_t error, const char* call, const char* file, int line);
}  // namespace internal

// Also for launches: CUDA_CHECK(cudaGetLastError()) after <<< >>> finds what the launch itself refused.
#define CUDA_CHECK(call)                                                         \
  do {                                                                           \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess) [[unlikely]]   \
      ::millrace::cuda::internal::CallFailed(error_, #call, __FILE__, __LINE__); \
  } while (false)

// The kernels are built for compute capability 9.0 with its own instructions: no other card runs them.
inline constexpr int kComputeMajor = 9, kComputeMinor = 0;

struct DeviceInfo {
  std::string name;
  int multiprocessors = 0;
  int64_t total_bytes = 0, free_bytes = 0;
};

// Makes device `ordinal` current on the calling thread. FailedPrecondition: no driver, a driver too old for CUDA 13, no
// such card, or not one of this generation; the message names what was found.
absl::StatusOr<DeviceInfo> OpenDevice(int ordinal);

// Of the device current on the calling thread.
int CurrentMultiprocessors();

// Owned device memory, zeroed. Move-only.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  // ResourceExhausted names `purpose`, the bytes asked for and the bytes free.
  static absl::StatusOr<DeviceBuffer> Take(int64_t bytes, const std::string& purpose);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Owned page-locked host memory: what asynchronous copies read and write. Move-only.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  static absl::StatusOr<PinnedBuffer> Take(int64_t bytes, const std::string& purpose);
  ~PinnedBuffer();
  PinnedBuffer(PinnedBuffer&& other) noexcept;
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;
  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Hands out a buffer piece by piece, each on 256 bytes. With a null base it only counts: the same code that lays out a
// workspace says first how large it must be.
class Bump {
 public:
  explicit Bump(uint8_t* base = nullptr) : base_(base) {}
  template <typename T>
  T* Take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

class Stream {
 public:
  Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  void Wait() { CUDA_CHECK(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

// A second stream for work that need not wait for its neighbours: it begins after what was enqueued on `main` before
// Fork and is waited for at Join. Also while `main` is captured into a graph, as a branch of it.
class SideStream {
 public:
  SideStream() {
    CUDA_CHECK(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&joined_, cudaEventDisableTiming));
  }
  ~SideStream() {
    cudaEventDestroy(forked_);
    cudaEventDestroy(joined_);
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  cudaStream_t get() const { return stream_.get(); }
  void Fork(cudaStream_t main) {
    CUDA_CHECK(cudaEventRecord(forked_, main));
    CUDA_CHECK(cudaStreamWaitEvent(stream_.get(), forked_, 0));
  }
  void Join(cudaStream_t main) {
    CUDA_CHECK(cudaEventRecord(joined_, stream_.get()));
    CUDA_CHECK(cudaStreamWaitEvent(main, joined_, 0));
  }

 private:
  Stream stream_;
  cudaEvent_t forked_ = nullptr, joined_ = nullptr;
};

}  // namespace millrace::cuda
