// SPDX-License-Identifier: Apache-2.0
// Measures kernels: graph replays over rotating operands, and rows a reader can compare.
//
// A measurement captures launches into a graph, each on the next of several sets of operands that together exceed the
// L2 cache, and times replays with events: what is measured is the kernel and the launch gap of a graph, with cold
// weights, as in a decode step. Floors come from the same process: a copy gives the memory's rate; the tensor cores'
// rate is the constant below. Nothing here checks results: a bench checks what it ran beside its timing. Thread: one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/device/cuda_device.h"

namespace millrace::cuda {

struct Timing {
  double median_us = 0, low_us = 0, high_us = 0;  // over repetitions, of one launch
};

// `launch(set, stream)` for set in [0, sets), `launches` of them a graph; median, least and greatest of `repetitions`
// replays after one that is not counted.
Timing TimeLaunches(int launches, int sets, int repetitions, const std::function<void(int, cudaStream_t)>& launch);

// Bytes read plus written a second by a copy of 1 GiB.
double CopyBytesPerSecond();

// Fills with pseudo-random bytes; every byte b becomes b & and_mask | or_mask.
void FillRandom(void* data, int64_t bytes, uint32_t seed, uint8_t and_mask, uint8_t or_mask, cudaStream_t stream);
// Fills with BF16 values of normal magnitude about one.
void FillRandomBf16(void* data, int64_t count, uint32_t seed, cudaStream_t stream);

// Memory of a benchmark; one that does not fit ends it.
inline DeviceBuffer Take(int64_t bytes) { return *DeviceBuffer::Take(bytes, "bench"); }

template <typename T>
DeviceBuffer Upload(const std::vector<T>& values) {
  DeviceBuffer buffer = Take(static_cast<int64_t>(values.size() * sizeof(T)));
  CUDA_CHECK(cudaMemcpy(buffer.data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return buffer;
}

// What one row says. Bytes and operations are those of the floor: each operand once.
struct BenchRow {
  std::string kernel, shape;
  Timing timing;
  double bytes = 0, flops = 0;
  std::string check;  // what was verified in this run
};

// Writes rows as CSV, to standard output for people and to `path` (if not empty) for machines. The first lines name
// card, driver rates and the commit given.
class BenchReport {
 public:
  BenchReport(const std::string& path, const std::string& commit, const std::string& machine, double copy_rate);
  ~BenchReport();
  void Add(const BenchRow& row);

 private:
  std::FILE* file_ = nullptr;
  std::string commit_, machine_;
  double copy_rate_;
};

// The main of a benchmark `NAME [CSV [COMMIT]]`: opens the card and runs `body`, which returns how many rows were
// wrong.
int BenchMain(int argc, char** argv, const std::function<int(BenchReport&)>& body);

}  // namespace millrace::cuda
