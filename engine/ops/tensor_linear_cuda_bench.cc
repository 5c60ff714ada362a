// SPDX-License-Identifier: Apache-2.0
// Times the dense products of cuda_linear.h at the shapes of both models, and checks samples of what it timed.
//
//   tensor_linear_cuda_bench [CSV] [COMMIT]
//
// Each row's outputs are poisoned first; then 64 sampled outputs are compared with sums in double precision.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/device/cuda_bench.h"
#include "engine/ops/cuda_quantise.h"
#include "engine/ops/rounding.h"

namespace millrace::cuda {
namespace {

struct Shape {
  const char* name;
  int64_t rows, n, k;
  int groups = 1;
};

// One set of operands, filled on the device.
struct Operands {
  Operands(const Shape& s, bool fp8, int seed) {
    const int64_t blocks = (s.k + 127) / 128, width = s.groups * s.k;
    const auto take = [](int64_t bytes) { return *DeviceBuffer::Take(bytes, "bench"); };
    w = take(s.groups * s.n * s.k * (fp8 ? 1 : 2));
    x = take(s.rows * width * 2);
    if (fp8) {
      // Codes without NaN: the top exponent bit stays clear, which also keeps sums near those of real weights.
      FillRandom(w.data(), s.n * s.k, seed, 0xbf, 0, nullptr);
      w_scales = take((s.n + 127) / 128 * blocks + 16);
      FillRandom(w_scales.data(), (s.n + 127) / 128 * blocks + 3, seed + 1, 0x03, 118, nullptr);
      rounded = take(s.rows * width * 2);
      scratch = take(std::max<int64_t>(LinearScratchBytes(s.n, s.k, s.rows), 1));
    } else {
      FillRandomBf16(w.data(), s.groups * s.n * s.k, seed, nullptr);
    }
    FillRandomBf16(x.data(), s.rows * width, seed + 2, nullptr);
    if (fp8) RoundRows(X(s), s.rows, s.k, Rounded(), nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  Bf16Rows X(const Shape& s) const { return {reinterpret_cast<const Bf16*>(x.data()), s.groups * s.k}; }
  Bf16* Rounded() const { return reinterpret_cast<Bf16*>(rounded.data()); }
  DeviceBuffer w, w_scales, x, rounded, scratch;
};

template <typename T>
std::vector<T> Read(const void* data, int64_t count) {
  std::vector<T> host(count);
  CUDA_CHECK(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

// The worst error of 64 outputs over the sum of magnitudes; negative if one was not written.
double WorstError(const Shape& s, bool fp8, const Operands& o, const uint16_t* out_host) {
  const int64_t blocks = (s.k + 127) / 128, width = s.groups * s.k;
  double worst = 0;
  for (int i = 0; i < 64; ++i) {
    const int64_t row = (i * 7919 + 13) % s.rows, n = (i * 104729 + 31) % (s.n * s.groups), group = n / s.n;
    const auto w = fp8 ? std::vector<uint16_t>() : Read<uint16_t>(o.w.data() + n * s.k * 2, s.k);
    const auto x = Read<uint16_t>((fp8 ? o.rounded : o.x).data() + (row * width + group * s.k) * 2, s.k);
    const auto wq = fp8 ? Read<uint8_t>(o.w.data() + n * s.k, s.k) : std::vector<uint8_t>();
    const auto ws = fp8 ? Read<uint8_t>(o.w_scales.data() + n / 128 * blocks, blocks) : std::vector<uint8_t>();
    double sum = 0, magnitude = 0;
    for (int64_t k = 0; k < s.k; ++k) {
      const double term =
          fp8 ? static_cast<double>(DecodeE4m3(wq[k])) * DecodeE8m0(ws[k / 128]) * DecodeBf16(x[FragmentPlace(k)])
              : static_cast<double>(DecodeBf16(w[k])) * DecodeBf16(x[k]);
      sum += term;
      magnitude += std::abs(term);
    }
    const double got = DecodeBf16(out_host[row * s.n * s.groups + n]);
    if (!std::isfinite(got)) return -1;
    worst = std::max(worst, (std::abs(got - sum) - std::abs(sum) * 0x1p-8) / magnitude);
  }
  return worst;
}

int Run(const Shape& s, bool fp8, BenchReport& report) {
  const double w_bytes = static_cast<double>(s.groups) * s.n * s.k * (fp8 ? 1 : 2);
  const double x_bytes = 2.0 * s.rows * s.groups * s.k;
  const double out_bytes = 2.0 * s.rows * s.n * s.groups;
  const double flops = 2.0 * s.rows * s.n * s.k * s.groups;
  // Together four times the L2 cache, where that takes more than one set.
  const int sets = static_cast<int>(std::min(64.0, 1 + 200e6 / (w_bytes + x_bytes)));
  std::vector<Operands> operands;
  for (int i = 0; i < sets; ++i) operands.emplace_back(s, fp8, 100 + 10 * i);
  const DeviceBuffer out = *DeviceBuffer::Take(static_cast<int64_t>(out_bytes), "bench");
  const auto launch = [&](int set, cudaStream_t stream) {
    const Operands& o = operands[set];
    const LinearOut to(reinterpret_cast<Bf16*>(out.data()), s.n * s.groups);
    if (fp8) {
      const Weight w{WeightKind::kFp8, s.n, s.k, o.w.data(), o.w_scales.data()};
      return LinearFp8(w, {o.Rounded(), s.k}, s.rows, to, o.scratch.data(), stream);
    }
    LinearGrouped({WeightKind::kBf16, s.n, s.k, o.w.data()}, s.groups, o.X(s), s.rows, to, stream);
  };
  CUDA_CHECK(cudaMemset(out.data(), 0xff, out.bytes()));
  launch(0, nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
  const double worst = WorstError(s, fp8, operands[0], Read<uint16_t>(out.data(), s.rows * s.n * s.groups).data());
  const bool good = worst >= 0 && worst <= 2e-6;
  const double floor_us = std::max((w_bytes + x_bytes + out_bytes) / 3e6, flops / 0.8e9);
  const int launches = static_cast<int>(std::clamp(4000.0 / floor_us, 4.0, 200.0));
  const Timing timing = TimeLaunches(launches, sets, 7, launch);
  report.Add({fp8            ? "linear fp8"
              : s.groups > 1 ? "linear bf16 grouped"
                             : "linear bf16",
              absl::StrCat(s.name, " ", s.rows, "x", s.n, "x", s.k, s.groups > 1 ? absl::StrCat("x", s.groups) : ""),
              timing, w_bytes + x_bytes + out_bytes, flops,
              good ? absl::StrCat("error ", worst) : absl::StrCat("WRONG ", worst)});
  return good ? 0 : 1;
}

int RunAll(BenchReport& report) {
  int wrong = 0;
  // Rows x outputs x K.
  for (const Shape& s :
       {Shape{"E1", 4096, 4096, 16384}, Shape{"E1", 4096, 16384, 4096}, Shape{"E1", 8192, 8192, 8192},
        Shape{"E1", 4096, 4096, 7168}, Shape{"wq_b", 4096, 32768, 1024}, Shape{"wo_b", 4096, 4096, 8192},
        Shape{"wq_a", 8192, 1024, 4096}, Shape{"shared w1", 8192, 2048, 4096}}) {
    wrong += Run(s, true, report);
  }
  for (const int64_t rows : {1, 8, 16, 32, 64, 128, 256}) {
    for (const Shape& s : {Shape{"wo_b", rows, 4096, 8192}, Shape{"wq_a", rows, 1024, 4096},
                           Shape{"wq_b", rows, 32768, 1024}, Shape{"shared w1", rows, 2048, 4096}}) {
      wrong += Run(s, true, report);
    }
  }
  for (const int64_t rows : {1, 16, 64, 4096}) {
    for (const Shape& s :
         {Shape{"wo_a", rows, 1024, 4096, 8}, Shape{"compressor", rows, 2048, 4096}, Shape{"gate", rows, 256, 4096}}) {
      wrong += Run(s, false, report);
    }
  }
  for (const int64_t rows : {1, 16, 64}) wrong += Run({"head", rows, 129280, 4096}, false, report);
  wrong += Run({"cube", 8192, 8192, 8192}, false, report);
  return wrong;
}

}  // namespace
}  // namespace millrace::cuda

int main(int argc, char** argv) { return millrace::cuda::BenchMain(argc, argv, millrace::cuda::RunAll); }
