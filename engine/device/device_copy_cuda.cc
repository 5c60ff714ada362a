// SPDX-License-Identifier: Apache-2.0
// See device_copy.h. Host memory passes through a page-locked ring of two pieces per thread: copies from pageable
// memory would be staged by the driver on a stream that others wait for.
#include "engine/device/device_copy.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/device/cuda_device.h"

namespace millrace {
namespace {

constexpr int64_t kPieceBytes = 1 << 20;

absl::Status ToStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error)));
}

// One thread's stream and staging, made when it first copies.
struct Lane {
  cudaStream_t stream = nullptr;
  cudaEvent_t events[2] = {};
  uint8_t* staging = nullptr;
  cudaError_t error;

  Lane() {
    error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (cudaEvent_t& event : events) {
      if (error == cudaSuccess) error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    }
    void* memory = nullptr;
    if (error == cudaSuccess) error = cudaMallocHost(&memory, 2 * kPieceBytes);
    staging = static_cast<uint8_t*>(memory);
  }
  // Errors of the destructor have nobody left to hear them: the thread ends, or the process.
  ~Lane() {
    cudaFreeHost(staging);
    for (cudaEvent_t event : events) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
};

Lane& ThisLane() {
  thread_local Lane lane;
  return lane;
}

// Piece by piece through the two halves: while one is on the bus, the other is copied by the processor.
cudaError_t FromDevice(Lane& lane, uint8_t* host, const uint8_t* device, int64_t bytes) {
  const int64_t pieces = (bytes + kPieceBytes - 1) / kPieceBytes;
  const auto length = [&](int64_t i) { return static_cast<size_t>(std::min(kPieceBytes, bytes - i * kPieceBytes)); };
  for (int64_t i = 0; i <= pieces; ++i) {
    if (i < pieces) {
      uint8_t* half = lane.staging + i % 2 * kPieceBytes;
      cudaError_t error =
          cudaMemcpyAsync(half, device + i * kPieceBytes, length(i), cudaMemcpyDeviceToHost, lane.stream);
      if (error == cudaSuccess) error = cudaEventRecord(lane.events[i % 2], lane.stream);
      if (error != cudaSuccess) return error;
    }
    if (i > 0) {
      if (const cudaError_t error = cudaEventSynchronize(lane.events[(i - 1) % 2]); error != cudaSuccess) return error;
      std::memcpy(host + (i - 1) * kPieceBytes, lane.staging + (i - 1) % 2 * kPieceBytes, length(i - 1));
    }
  }
  return cudaSuccess;
}

cudaError_t ToDevice(Lane& lane, uint8_t* device, const uint8_t* host, int64_t bytes) {
  for (int64_t i = 0; i * kPieceBytes < bytes; ++i) {
    const size_t n = static_cast<size_t>(std::min(kPieceBytes, bytes - i * kPieceBytes));
    uint8_t* half = lane.staging + i % 2 * kPieceBytes;
    if (i >= 2) {
      if (const cudaError_t error = cudaEventSynchronize(lane.events[i % 2]); error != cudaSuccess) return error;
    }
    std::memcpy(half, host + i * kPieceBytes, n);
    cudaError_t error = cudaMemcpyAsync(device + i * kPieceBytes, half, n, cudaMemcpyHostToDevice, lane.stream);
    if (error == cudaSuccess) error = cudaEventRecord(lane.events[i % 2], lane.stream);
    if (error != cudaSuccess) return error;
  }
  return cudaStreamSynchronize(lane.stream);
}

}  // namespace

absl::Status CopyFromDevice(void* host, const void* device, int64_t bytes) {
  Lane& lane = ThisLane();
  if (lane.error != cudaSuccess) return ToStatus(lane.error, "stream for copies");
  return ToStatus(FromDevice(lane, static_cast<uint8_t*>(host), static_cast<const uint8_t*>(device), bytes),
                  "copy from the device");
}

absl::Status CopyToDevice(void* device, const void* host, int64_t bytes) {
  Lane& lane = ThisLane();
  if (lane.error != cudaSuccess) return ToStatus(lane.error, "stream for copies");
  return ToStatus(ToDevice(lane, static_cast<uint8_t*>(device), static_cast<const uint8_t*>(host), bytes),
                  "copy to the device");
}

absl::Status CopyOnDevice(void* to, const void* from, int64_t bytes) {
  Lane& lane = ThisLane();
  cudaError_t error = lane.error;
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, lane.stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(lane.stream);
  return ToStatus(error, "copy on the device");
}

absl::Status AttachDevice() { return cuda::OpenDevice(0).status(); }

std::optional<DeviceMemoryBytes> DeviceMemory() {
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) return std::nullopt;
  return DeviceMemoryBytes{static_cast<int64_t>(free), static_cast<int64_t>(total)};
}

}  // namespace millrace
