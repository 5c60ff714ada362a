// SPDX-License-Identifier: Apache-2.0
// See cuda_device.h. Host calls of the runtime only; compiled by the host compiler.
#include "engine/device/cuda_device.h"

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"

namespace millrace::cuda {
namespace internal {

void CallFailed(cudaError_t error, const char* call, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: CUDA call failed: %s: %s (%s)\n", file, line, call, cudaGetErrorName(error),
               cudaGetErrorString(error));
  std::abort();
}

}  // namespace internal

namespace {

std::string Why(cudaError_t error) { return absl::StrCat(cudaGetErrorName(error), ", ", cudaGetErrorString(error)); }

}  // namespace

absl::StatusOr<DeviceInfo> OpenDevice(int ordinal) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    return absl::FailedPreconditionError(
        absl::StrCat("device: cuda needs an NVIDIA driver for CUDA 13 and a card; found none (", Why(error), ")"));
  }
  if (ordinal < 0 || ordinal >= count) {
    return absl::FailedPreconditionError(absl::StrCat("device: card ", ordinal, " asked for, found ", count));
  }
  cudaDeviceProp properties;
  if (cudaError_t error = cudaGetDeviceProperties(&properties, ordinal); error != cudaSuccess) {
    return absl::FailedPreconditionError(absl::StrCat("device: card ", ordinal, " cannot be read (", Why(error), ")"));
  }
  if (properties.major != kComputeMajor || properties.minor != kComputeMinor) {
    return absl::FailedPreconditionError(
        absl::StrCat("device: card ", ordinal, " is ", properties.name, " of compute capability ", properties.major,
                     ".", properties.minor, ", expected ", kComputeMajor, ".", kComputeMinor, " (H100, H200)"));
  }
  size_t free = 0, total = 0;
  cudaError_t error = cudaSetDevice(ordinal);
  if (error == cudaSuccess) error = cudaMemGetInfo(&free, &total);  // makes the context
  if (error != cudaSuccess) {
    return absl::FailedPreconditionError(absl::StrCat("device: card ", ordinal, " cannot be used (", Why(error), ")"));
  }
  return DeviceInfo{properties.name, properties.multiProcessorCount, static_cast<int64_t>(total),
                    static_cast<int64_t>(free)};
}

int CurrentMultiprocessors() {
  int device = 0, count = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

absl::StatusOr<DeviceBuffer> DeviceBuffer::Take(int64_t bytes, const std::string& purpose) {
  DeviceBuffer buffer;
  buffer.bytes_ = bytes;
  if (bytes == 0) return buffer;
  void* data = nullptr;
  if (const cudaError_t error = cudaMalloc(&data, static_cast<size_t>(bytes)); error != cudaSuccess) {
    cudaGetLastError();  // an allocation that fails leaves the context usable, but also the error for the next to find
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    return absl::ResourceExhaustedError(
        absl::StrCat("device memory: ", purpose, " needs ", bytes, " bytes, ", free, " of ", total, " are free"));
  }
  buffer.data_ = static_cast<uint8_t*>(data);
  CUDA_CHECK(cudaMemset(data, 0, static_cast<size_t>(bytes)));
  CUDA_CHECK(cudaDeviceSynchronize());  // non-blocking streams do not wait for the default one
  return buffer;
}

DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }
DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

absl::StatusOr<PinnedBuffer> PinnedBuffer::Take(int64_t bytes, const std::string& purpose) {
  PinnedBuffer buffer;
  buffer.bytes_ = bytes;
  if (bytes == 0) return buffer;
  void* data = nullptr;
  if (const cudaError_t error = cudaMallocHost(&data, static_cast<size_t>(bytes)); error != cudaSuccess) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(
        absl::StrCat("page-locked host memory: ", purpose, " needs ", bytes, " bytes (", Why(error), ")"));
  }
  buffer.data_ = static_cast<uint8_t*>(data);
  return buffer;
}

PinnedBuffer::~PinnedBuffer() { cudaFreeHost(data_); }
PinnedBuffer::PinnedBuffer(PinnedBuffer&& other) noexcept { *this = std::move(other); }
PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace millrace::cuda
