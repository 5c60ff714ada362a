// SPDX-License-Identifier: Apache-2.0
// Number formats and reductions inside kernels. The scalar definitions are rounding.h's, the same functions the CPU
// computes with (constexpr, so the device compiler takes them too); what is here adds loads, stores and warps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "engine/ops/rounding.h"

namespace millrace::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline __nv_bfloat16 ToBf16(float x) { return __float2bfloat16_rn(x); }
__device__ inline float RoundToBf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// Two BF16 in a 32-bit word, the first in the low half.
__device__ inline float LowBf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float HighBf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two E4M3 codes to floats, exactly; the first is the low byte.
__device__ inline float2 WidenE4m3Pair(uint16_t codes) {
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3);
  return __half22float2(__half2(halves));
}

// Four E4M3 codes of a word.
__device__ inline void WidenE4m3(uint32_t codes, float* out) {
  const float2 low = WidenE4m3Pair(static_cast<uint16_t>(codes)), high = WidenE4m3Pair(codes >> 16);
  out[0] = low.x;
  out[1] = low.y;
  out[2] = high.x;
  out[3] = high.y;
}

// Codes 2 * half and the next of a word of four E4M3 codes, as a pair of BF16, exactly; no code may be NaN, which a
// load refuses. The bits of a code, shifted into those of BF16, are its value times 2^-120.
__device__ inline uint32_t WidenE4m3ToBf16(uint32_t codes, int half) {
  const uint32_t high = __byte_perm(codes, 0, half == 0 ? 0x1404 : 0x3424);  // each in the upper byte of 16 bits
  const uint32_t shifted = (high & 0x80008000u) | (high >> 4 & 0x07f007f0u);
  const __nv_bfloat162 scale = __halves2bfloat162(__ushort_as_bfloat16(0x7b80), __ushort_as_bfloat16(0x7b80));  // 2^120
  const __nv_bfloat162 value = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&shifted), scale);
  return *reinterpret_cast<const uint32_t*>(&value);
}

// Two floats as a pair of BF16: rounded, and where BF16 holds them exactly.
__device__ inline uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t ExactBf16Pair(float low, float high) {
  return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
}

// Two E4M3 codes times a power of two, as a pair of BF16, exactly.
__device__ inline uint32_t ScaledBf16Pair(uint32_t codes, float scale) {
  const float2 v = WidenE4m3Pair(static_cast<uint16_t>(codes));
  return ExactBf16Pair(v.x * scale, v.y * scale);
}

// Sum over the lanes of a warp; every lane gets it. One fixed tree.
__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}
__device__ inline float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// Sum over a block of `kThreads`, warps added in ascending order; every thread gets it. `scratch` holds kThreads / 32
// floats and may be reused after the next barrier.
template <int kThreads>
__device__ inline float BlockSum(float x, float* scratch) {
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  return total;
}

// A group of 128 activations, four a lane, as E4M3 codes and their scale, which every lane gets.
__device__ inline uint32_t QuantiseGroup(const float (&v)[4], float& scale) {
  // Of the bits, not the values: a NaN must win so that the scale shows it.
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) amax = max(amax, __float_as_uint(v[i]) & 0x7fffffffu);
  amax = __reduce_max_sync(kFullWarp, amax);
  const int exponent = ActQuantScale(__uint_as_float(amax));
  const float inverse = PowerOfTwo(-exponent);
  scale = PowerOfTwo(exponent);
  const uint32_t low = __nv_cvt_float2_to_fp8x2({v[0] * inverse, v[1] * inverse}, __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2({v[2] * inverse, v[3] * inverse}, __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// Four values of a quantised group as BF16, to their FragmentPlace (cuda_quantise.h): pairs, the second eight further.
__device__ inline void StoreRoundedFour(uint32_t codes, float scale, __nv_bfloat16* at) {
  reinterpret_cast<uint32_t*>(at)[0] = ScaledBf16Pair(codes, scale);
  reinterpret_cast<uint32_t*>(at)[4] = ScaledBf16Pair(codes >> 16, scale);
}

// exp(x) for x <= 0 as the CPU twins have it: 0 below -87.
__device__ inline float ExpOrZero(float x) { return x > -87.0f ? expf(x) : 0.0f; }

}  // namespace millrace::cuda
