// SPDX-License-Identifier: Apache-2.0
// Times mHC with the fold of the last sublayer joined to the next mix, norm and quantisation, at Flash's width.
//
//   hyper_connection_cuda_bench [CSV [COMMIT]]
//
// Floor: the streams read and written once, the sublayer's result and fn read, u and its rounding written.
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/device/cuda_bench.h"
#include "engine/ops/cuda_hyper_connection.h"

namespace millrace::cuda {
namespace {

constexpr int64_t kDim = 4096;

void Run(int64_t rows, BenchReport& report) {
  // Operands that together exceed the L2 cache.
  const double bytes = static_cast<double>(rows) * kDim * (16.0 + 2 + 2 + 2) + 24 * 4 * kDim * 4;
  const int sets = static_cast<int>(std::clamp(150e6 / bytes, 1.0, 64.0));
  const DeviceBuffer streams = Take(sets * rows * 4 * kDim * 2), out = Take(sets * rows * kDim * 2),
                     fn = Take(sets * 24 * 4 * kDim * 4), norm = Take(kDim * 4), base = Take(256),
                     coefficients = Take(rows * 20 * 4), u = Take(rows * kDim * 2), rounded = Take(rows * kDim * 2);
  FillRandomBf16(streams.data(), sets * rows * 4 * kDim, 1, nullptr);
  FillRandomBf16(out.data(), sets * rows * kDim, 2, nullptr);
  // Weights and coefficients of zero take no less time, and keep the streams finite over many repetitions.
  for (const DeviceBuffer* zero : {&fn, &norm, &base, &coefficients}) {
    CUDA_CHECK(cudaMemset(zero->data(), 0,
                          zero == &fn             ? sets * 24 * 4 * kDim * 4
                          : zero == &norm         ? kDim * 4
                          : zero == &coefficients ? rows * 20 * 4
                                                  : 256));
  }
  CUDA_CHECK(cudaDeviceSynchronize());
  const auto f32 = [](const DeviceBuffer& b) { return reinterpret_cast<float*>(b.data()); };
  const auto bf16 = [](const DeviceBuffer& b) { return reinterpret_cast<Bf16*>(b.data()); };
  const auto launch = [&](int set, cudaStream_t stream) {
    const HyperUpdate update{bf16(out) + set * rows * kDim, nullptr, 0, f32(coefficients),
                             f32(coefficients) + rows * 4};
    HyperConnectionPre(bf16(streams) + set * rows * 4 * kDim, update,
                       {f32(fn) + static_cast<int64_t>(set) * 24 * 4 * kDim, f32(base), f32(base) + 32}, f32(norm), {},
                       rows, kDim, {bf16(u), bf16(rounded)}, f32(coefficients), f32(coefficients) + rows * 4, stream);
  };
  const int launches = static_cast<int>(std::clamp(3000.0 / (bytes / 3e6 + 5), 4.0, 200.0));
  report.Add({"mhc joined", absl::StrCat(rows, "x4x", kDim), TimeLaunches(launches, sets, 7, launch), bytes,
              2.0 * rows * 24 * 4 * kDim, "timing only; bits in ops_cuda_test"});
}

int RunAll(BenchReport& report) {
  for (const int64_t rows : {1, 8, 64, 512, 4096, 8192}) Run(rows, report);
  return 0;
}

}  // namespace
}  // namespace millrace::cuda

int main(int argc, char** argv) { return millrace::cuda::BenchMain(argc, argv, millrace::cuda::RunAll); }
