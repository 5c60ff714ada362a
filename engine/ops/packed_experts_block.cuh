// SPDX-License-Identifier: Apache-2.0
// What packed_experts_gemm_cuda.cu does with one block of K and with a pass's sums: widening, promotion, SwiGLU, and
// the transposition of results. Straight-line work on one thread's or one warp's values; rings and barriers are the
// kernel's.
#pragma once

#include "engine/ops/cuda_format.cuh"
#include "engine/ops/packed_experts_plan.h"
#include "engine/ops/sm90.cuh"

namespace millrace::cuda {

// A row's eight magnitudes times 2^(kWidenedExponent - distance), as E4M3.
__device__ inline uint2 MagnitudeTable(int distance) {
  uint32_t words[2] = {};
  for (int code = 0; code < 8; ++code) {
    const float value = DecodeE2m1(static_cast<uint8_t>(code)) * PowerOfTwo(kWidenedExponent - distance);
    words[code / 4] |= static_cast<uint32_t>(EncodeE4m3(value)) << (8 * (code % 4));
  }
  return {words[0], words[1]};
}

// The left operand of one block, and what its sums are multiplied by: rows t % 32 / 4 and eight further of the
// warp's 16.
struct WidenedBlock {
  uint32_t a[16];
  float low, high;
};

__device__ inline void WidenEight(uint32_t word, uint2 magnitudes, uint32_t& first, uint32_t& second) {
  const uint32_t selectors = word & 0x77777777u;
  first = __byte_perm(magnitudes.x, magnitudes.y, selectors) | (word & 0x80808080u);
  second = __byte_perm(magnitudes.x, magnitudes.y, selectors >> 16) | (word << 4 & 0x80808080u);
}

// 2^(exponent byte - 127 - kWidenedExponent). The byte is never 255: a load refuses it.
__device__ inline float BlockScale(uint32_t scales) {
  const uint32_t byte = scales >> 24;
  return __uint_as_float(byte == 0 ? 0x00400000u : byte << 23) * (1.0f / (1 << kWidenedExponent));
}

__device__ inline void Widen(const uint8_t* record, const uint2* table, int t, WidenedBlock& w) {
  const uint4 early = *reinterpret_cast<const uint4*>(record + t * 16);
  const uint4 late = *reinterpret_cast<const uint4*>(record + 2048 + t * 16);
  const uint32_t* scales = reinterpret_cast<const uint32_t*>(record + kExpertCodeBytes) + t / 32 * 16 + t % 32 / 4;
  const uint32_t low = scales[0], high = scales[8];
  const uint32_t words[8] = {early.x, early.y, early.z, early.w, late.x, late.y, late.z, late.w};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    WidenEight(words[2 * step], table[low >> (4 * step) & 15], w.a[4 * step], w.a[4 * step + 2]);
    WidenEight(words[2 * step + 1], table[high >> (4 * step) & 15], w.a[4 * step + 1], w.a[4 * step + 3]);
  }
  w.low = BlockScale(low);
  w.high = BlockScale(high);
}

// Scales are laid out by column pair: a thread's columns 8j + 2c and the next for all j lie in a row.
template <int kN>
__device__ inline void Promote(const float* sums, const WidenedBlock& w, const float* token_scales, float* total) {
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const float2 s = *reinterpret_cast<const float2*>(token_scales + 2 * j);
    // All factors are powers of two: exact, so the order of multiplication does not matter.
    total[4 * j] = fmaf(sums[4 * j], w.low * s.x, total[4 * j]);
    total[4 * j + 1] = fmaf(sums[4 * j + 1], w.low * s.y, total[4 * j + 1]);
    total[4 * j + 2] = fmaf(sums[4 * j + 2], w.high * s.x, total[4 * j + 2]);
    total[4 * j + 3] = fmaf(sums[4 * j + 3], w.high * s.y, total[4 * j + 3]);
  }
}

__device__ inline uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline float Activate(float gate, float up, float weight, float limit) {
  gate = fminf(RoundToBf16(gate), limit);
  up = fminf(fmaxf(RoundToBf16(up), -limit), limit);
  const float e = __expf(fminf(-gate, 87.0f));
  return __fmul_rn(__fmul_rn(__fdividef(gate, 1.0f + e), up), weight);
}

// kN columns of eight 16-bit values each, transposed to rows of `stride` bytes: column c of matrix j is row 8j + c.
template <int kN>
__device__ inline void StoreColumns(const uint32_t* matrices, uint8_t* at, int stride, int lane) {
#pragma unroll
  for (int j = 0; j + 3 < kN / 8; j += 4) {
    sm90::StoreTransposed4(at + (8 * (j + lane / 8) + lane % 8) * stride, matrices[j], matrices[j + 1], matrices[j + 2],
                           matrices[j + 3]);
  }
#pragma unroll
  for (int j = kN / 32 * 4; j < kN / 8; ++j) sm90::StoreTransposed1(at + (8 * j + lane % 8) * stride, matrices[j]);
}

}  // namespace millrace::cuda
