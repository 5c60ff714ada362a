// SPDX-License-Identifier: Apache-2.0
// See cuda_bench.h.
#include <algorithm>
#include <cstdio>

#include "engine/device/cuda_bench.h"

namespace millrace::cuda {
namespace {

// The tensor cores at the clock a full load holds: a BF16 product of 8192 cubed, measured on an H200.
constexpr double kBf16FlopsPerSecond = 0.79e15;

__device__ inline uint32_t Mix(uint64_t i, uint32_t seed) {
  uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b9u + static_cast<uint32_t>(i >> 32) + seed * 0x85ebca6bu;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

__global__ void FillKernel(uint32_t* words, int64_t count, uint32_t seed, uint32_t and_mask, uint32_t or_mask) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    words[i] = (Mix(i, seed) & and_mask) | or_mask;
  }
}

// The sum of four bytes is nearly normal.
__global__ void FillBf16Kernel(uint16_t* values, int64_t count, uint32_t seed) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const uint32_t x = Mix(i, seed);
    const int sum = static_cast<int>((x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24));
    values[i] = static_cast<uint16_t>(__float_as_uint(static_cast<float>(sum - 510) * (1.0f / 148.0f)) >> 16);
  }
}

// Four loads of 16 bytes in flight a thread.
__global__ void CopyKernel(const uint4* from, uint4* to, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += 4 * stride) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * stride < count) v[j] = from[i + j * stride];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * stride < count) to[i + j * stride] = v[j];
    }
  }
}

}  // namespace

void FillRandom(void* data, int64_t bytes, uint32_t seed, uint8_t and_mask, uint8_t or_mask, cudaStream_t stream) {
  FillKernel<<<1024, 256, 0, stream>>>(static_cast<uint32_t*>(data), bytes / 4, seed, and_mask * 0x01010101u,
                                       or_mask * 0x01010101u);
  CUDA_CHECK(cudaGetLastError());
}

void FillRandomBf16(void* data, int64_t count, uint32_t seed, cudaStream_t stream) {
  FillBf16Kernel<<<1024, 256, 0, stream>>>(static_cast<uint16_t*>(data), count, seed);
  CUDA_CHECK(cudaGetLastError());
}

Timing TimeLaunches(int launches, int sets, int repetitions, const std::function<void(int, cudaStream_t)>& launch) {
  const Stream stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  launch(0, stream.get());  // what a first call sets up must not be captured
  CUDA_CHECK(cudaStreamSynchronize(stream.get()));
  CUDA_CHECK(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) launch(i % sets, stream.get());
  CUDA_CHECK(cudaStreamEndCapture(stream.get(), &graph));
  CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> us;
  for (int r = 0; r <= repetitions; ++r) {
    CUDA_CHECK(cudaEventRecord(begin, stream.get()));
    CUDA_CHECK(cudaGraphLaunch(exec, stream.get()));
    CUDA_CHECK(cudaEventRecord(end, stream.get()));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (r > 0) us.push_back(ms * 1000.0 / launches);
  }
  CUDA_CHECK(cudaEventDestroy(begin));
  CUDA_CHECK(cudaEventDestroy(end));
  CUDA_CHECK(cudaGraphExecDestroy(exec));
  CUDA_CHECK(cudaGraphDestroy(graph));
  std::sort(us.begin(), us.end());
  return {us[us.size() / 2], us.front(), us.back()};
}

double CopyBytesPerSecond() {
  constexpr int64_t kBytes = int64_t{1} << 30;
  const DeviceBuffer from = *DeviceBuffer::Take(kBytes, "copy"), to = *DeviceBuffer::Take(kBytes, "copy");
  FillRandom(from.data(), kBytes, 1, 0xff, 0, nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
  const Timing t = TimeLaunches(4, 1, 7, [&](int, cudaStream_t stream) {
    CopyKernel<<<2048, 512, 0, stream>>>(reinterpret_cast<const uint4*>(from.data()),
                                         reinterpret_cast<uint4*>(to.data()), kBytes / 16);
    CUDA_CHECK(cudaGetLastError());
  });
  return 2.0 * kBytes / (t.median_us * 1e-6);
}

BenchReport::BenchReport(const std::string& path, const std::string& commit, const std::string& machine,
                         double copy_rate)
    : commit_(commit), machine_(machine), copy_rate_(copy_rate) {
  if (!path.empty()) {
    file_ = std::fopen(path.c_str(), "a");
    if (file_ == nullptr) std::fprintf(stderr, "cannot write %s; rows go to standard output only\n", path.c_str());
  }
  std::printf("%s, commit %s, copy %.2f TB/s\n%-34s %-30s %10s %9s %9s %8s %8s %9s %6s  %s\n", machine.c_str(),
              commit.c_str(), copy_rate / 1e12, "kernel", "shape", "us", "low", "high", "GB/s", "TFLOP/s", "floor us",
              "share", "checked");
  if (file_ != nullptr && std::ftell(file_) == 0) {
    std::fprintf(file_,
                 "machine,commit,copy_tb_s,kernel,shape,us_median,us_low,us_high,gb_s,tflop_s,floor_us,share_of_floor,"
                 "checked\n");
  }
}

BenchReport::~BenchReport() {
  if (file_ != nullptr) std::fclose(file_);
}

void BenchReport::Add(const BenchRow& r) {
  const double seconds = r.timing.median_us * 1e-6;
  const double floor_us = 1e6 * std::max(r.bytes / copy_rate_, r.flops / kBf16FlopsPerSecond);
  std::printf("%-34s %-30s %10.2f %9.2f %9.2f %8.0f %8.0f %9.2f %5.1f%%  %s\n", r.kernel.c_str(), r.shape.c_str(),
              r.timing.median_us, r.timing.low_us, r.timing.high_us, r.bytes / seconds / 1e9, r.flops / seconds / 1e12,
              floor_us, 100 * floor_us / r.timing.median_us, r.check.c_str());
  std::fflush(stdout);
  if (file_ != nullptr) {
    std::fprintf(file_, "%s,%s,%.3f,%s,%s,%.3f,%.3f,%.3f,%.1f,%.1f,%.3f,%.4f,%s\n", machine_.c_str(), commit_.c_str(),
                 copy_rate_ / 1e12, r.kernel.c_str(), r.shape.c_str(), r.timing.median_us, r.timing.low_us,
                 r.timing.high_us, r.bytes / seconds / 1e9, r.flops / seconds / 1e12, floor_us,
                 floor_us / r.timing.median_us, r.check.c_str());
  }
}

int BenchMain(int argc, char** argv, const std::function<int(BenchReport&)>& body) {
  const auto device = OpenDevice(0);
  if (!device.ok()) {
    std::fprintf(stderr, "%s\n", device.status().ToString().c_str());
    return 1;
  }
  BenchReport report(argc > 1 ? argv[1] : "", argc > 2 ? argv[2] : "unknown", device->name, CopyBytesPerSecond());
  return body(report);
}

}  // namespace millrace::cuda
