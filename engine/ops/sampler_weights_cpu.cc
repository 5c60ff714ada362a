// SPDX-License-Identifier: Apache-2.0
// The same source for the baseline's registers and for AVX2's, chosen at run time: see sampler_weights_cpu.h.
//
// Built without contraction to FMA (CMakeLists.txt): no machine may fuse what another does not.
#include "engine/ops/sampler_weights_cpu.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "engine/ops/sampler_arithmetic.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace millrace {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// A machine register's worth of numbers: the baseline's and AVX2's. (GCC ignores a size that depends on a template.)
struct Vector16 {
  static constexpr int kFloats = 4, kDoubles = 2;
  using Float = float __attribute__((vector_size(16)));
  using Int = int32_t __attribute__((vector_size(16)));
  using Double = double __attribute__((vector_size(16)));
  using Long = int64_t __attribute__((vector_size(16)));
  using HalfFloat = float __attribute__((vector_size(8)));
};
struct Vector32 {
  static constexpr int kFloats = 8, kDoubles = 4;
  using Float = float __attribute__((vector_size(32)));
  using Int = int32_t __attribute__((vector_size(32)));
  using Double = double __attribute__((vector_size(32)));
  using Long = int64_t __attribute__((vector_size(32)));
  using HalfFloat = float __attribute__((vector_size(16)));
};

// exp(x) for x <= 0, 0 below kLeastSamplerExponent and for NaN.
template <typename V>
ALWAYS_INLINE typename V::Double Exp(typename V::Double x) {
  using Double = typename V::Double;
  using Long = typename V::Long;
  const Long live = x >= kLeastSamplerExponent;
  const Double clamped =
      reinterpret_cast<Double>(reinterpret_cast<Long>(x) & live);  // the dead compute exp(0) meanwhile
  const SamplerExponential<Double> e = SamplerExpSeries(clamped);
  const Long bits = reinterpret_cast<Long>(e.p) + (reinterpret_cast<Long>(e.shifted) << 52);
  return reinterpret_cast<Double>(bits & live);
}

template <typename V>
ALWAYS_INLINE MaxOfRow FindMaxBody(absl::Span<const float> logits) {
  typename V::Float max = typename V::Float{} - kInf;
  typename V::Int good = ~typename V::Int{};
  const int64_t size = logits.size();
  int64_t i = 0;
  for (; i + V::kFloats <= size; i += V::kFloats) {
    typename V::Float v;
    std::memcpy(&v, logits.data() + i, sizeof(v));
    good &= v <= std::numeric_limits<float>::max();  // false for NaN and +inf
    max = v > max ? v : max;
  }
  MaxOfRow result = {-kInf, true};
  auto add = [&result](float value, bool finite) {
    result.value = std::max(result.value, value);
    result.finite = result.finite && finite;
  };
  for (int lane = 0; lane < V::kFloats; ++lane) add(max[lane], good[lane] != 0);
  for (; i < size; ++i) add(logits[i], logits[i] <= std::numeric_limits<float>::max());
  return result;
}

// weights[i] = exp((logits[i] - max) * inv_temperature), block_sums one per kSamplerBlock ids.
template <typename V>
ALWAYS_INLINE void WeighBody(absl::Span<const float> logits, float max, double inv_temperature, double* weights,
                             double* block_sums) {
  constexpr int kParts = 8 / V::kDoubles;  // registers that make up the eight lanes
  const int64_t size = logits.size();
  for (int64_t begin = 0; begin < size; begin += kSamplerBlock) {
    const int64_t end = std::min<int64_t>(begin + kSamplerBlock, size);
    typename V::Double sums[kParts] = {};
    auto weigh_eight = [&](const float* in, double* out) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        typename V::HalfFloat x;
        std::memcpy(&x, in + part * V::kDoubles, sizeof(x));
        const typename V::Double logit = __builtin_convertvector(x, typename V::Double);
        const typename V::Double w = Exp<V>((logit - static_cast<double>(max)) * inv_temperature);
        sums[part] += w;
        std::memcpy(out + part * V::kDoubles, &w, sizeof(w));
      }
    };
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) weigh_eight(logits.data() + i, weights + i);
    if (i < end) {
      // The last few are computed in a copy padded with -inf, which weighs nothing.
      float in[8] = {-kInf, -kInf, -kInf, -kInf, -kInf, -kInf, -kInf, -kInf};
      double out[8];
      std::copy(logits.begin() + i, logits.begin() + end, in);
      weigh_eight(in, out);
      std::copy(out, out + (end - i), weights + i);
    }
    double lanes[8];
    std::memcpy(lanes, sums, sizeof(lanes));
    *block_sums++ = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
}

// The same source for the baseline and for AVX2, chosen at run time; the bits are the same.
#if defined(__x86_64__)
__attribute__((target("avx2"))) MaxOfRow FindMaxAvx2(absl::Span<const float> logits) {
  return FindMaxBody<Vector32>(logits);
}
__attribute__((target("avx2"))) void WeighAvx2(absl::Span<const float> logits, float max, double inv_temperature,
                                               double* weights, double* block_sums) {
  WeighBody<Vector32>(logits, max, inv_temperature, weights, block_sums);
}
bool HaveAvx2() {
  static const bool have = __builtin_cpu_supports("avx2");
  return have;
}
#endif

}  // namespace

MaxOfRow FindMax(absl::Span<const float> logits) {
#if defined(__x86_64__)
  if (HaveAvx2()) return FindMaxAvx2(logits);
#endif
  return FindMaxBody<Vector16>(logits);
}

double Weigh(absl::Span<const float> logits, float max, double inv_temperature, RowWeights& out) {
  out.weights.resize(logits.size());
  out.block_sums.resize((logits.size() + kSamplerBlock - 1) / kSamplerBlock);
  double* weights = out.weights.data();
  double* block_sums = out.block_sums.data();
#if defined(__x86_64__)
  if (HaveAvx2()) {
    WeighAvx2(logits, max, inv_temperature, weights, block_sums);
  } else {
    WeighBody<Vector16>(logits, max, inv_temperature, weights, block_sums);
  }
#else
  WeighBody<Vector16>(logits, max, inv_temperature, weights, block_sums);
#endif
  double sum = 0;
  for (double s : out.block_sums) sum += s;
  return sum;
}

}  // namespace millrace
