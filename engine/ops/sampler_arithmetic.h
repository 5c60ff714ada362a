// SPDX-License-Identifier: Apache-2.0
// What fixes the bits of a draw, once for the CPU's sampler and the card's: the exponential, the blocks of its sums,
// the uniform number.
//
// A token must not depend on the machine that draws it, so exp is our own, in IEEE double arithmetic whose every
// product and sum is rounded by itself: the files that include this are built without contraction to FMA. Where dead
// lanes are masked and the exponent is added, machines differ: that is the caller's (sampler_weights_cpu.cc,
// sampler_cuda.cu).
#pragma once

#include <cstdint>

#include "engine/ops/sampler.h"

#ifdef __CUDACC__
#define MILLRACE_SAMPLER_INLINE __host__ __device__ inline
#else
#define MILLRACE_SAMPLER_INLINE inline __attribute__((always_inline))
#endif

namespace millrace {

inline constexpr float kGreedyTemperature = 1e-5f;  // vLLM's bound: dividing by less says nothing new
inline constexpr int kSamplerBlock = 1024;          // ids per partial sum: 127 blocks for the released vocabulary
inline constexpr int kSamplerLanes = 8;             // a block's sum has eight, id mod 8

// 53 bits: [0, 1).
inline double UniformDraw(const SamplingRequest& request) {
  const PhiloxWords words = Philox4x32(request.params.seed, request.token_index, request.choice);
  const uint64_t bits = static_cast<uint64_t>(words.v[1]) << 32 | words.v[0];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

inline constexpr double kLeastSamplerExponent = -708.0;  // where doubles end; what is below weighs nothing

// exp(x) = p * 2^n for kLeastSamplerExponent <= x <= 0, within 2 ulp: x = n ln 2 + r, and p a Taylor series of degree
// 13 in |r| <= 0.35 (next term 4e-18). Double is a double or a vector of them. `shifted` has n in its low mantissa
// bits: its bits, moved left by 52 and added to those of p, are the result's.
template <typename Double>
struct SamplerExponential {
  Double p, shifted;
};

template <typename Double>
MILLRACE_SAMPLER_INLINE SamplerExponential<Double> SamplerExpSeries(Double x) {
  const double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low mantissa bits
  const Double shifted = x * 0x1.71547652b82fep0 + kRound;
  const Double n = shifted - kRound;
  const Double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  // Even and odd terms apart: two chains of half the length.
  const Double q = r * r;
  Double odd = q * (1.0 / 6227020800.0) + 1.0 / 39916800.0;
  Double even = q * (1.0 / 479001600.0) + 1.0 / 3628800.0;
  odd = odd * q + 1.0 / 362880.0;
  even = even * q + 1.0 / 40320.0;
  odd = odd * q + 1.0 / 5040.0;
  even = even * q + 1.0 / 720.0;
  odd = odd * q + 1.0 / 120.0;
  even = even * q + 1.0 / 24.0;
  odd = odd * q + 1.0 / 6.0;
  even = even * q + 0.5;
  odd = odd * q + 1.0;
  even = even * q + 1.0;
  const Double p = odd * r + even;
  return {p, shifted};
}

}  // namespace millrace
