// SPDX-License-Identifier: Apache-2.0
// What packed_experts_gemm_cuda.cu does with one block of K and with a pass's sums: widening, promotion, SwiGLU, and
// the transposition of results. Straight-line work on one thread's or one warp's values; rings and barriers are the
// kernel's.
#pragma once

#include "engine/ops/cuda_format.cuh"
#include "engine/ops/packed_experts_plan.h"
#include "engine/ops/sm90.cuh"

namespace millrace::cuda {

// The eight magnitudes of E2M1 times 2^-distance as BF16: their upper bytes, then their lower ones.
__device__ inline uint4 MagnitudeTable(int distance) {
  uint32_t bytes[2][2] = {};
  for (int code = 0; code < 8; ++code) {
    const uint32_t bits = __float_as_uint(DecodeE2m1(static_cast<uint8_t>(code)) * PowerOfTwo(-distance)) >> 16;
    bytes[0][code / 4] |= (bits >> 8) << (8 * (code % 4));
    bytes[1][code / 4] |= (bits & 0xff) << (8 * (code % 4));
  }
  return {bytes[0][0], bytes[0][1], bytes[1][0], bytes[1][1]};
}

// The left operand of one block, eight steps of 16, and what its sums are multiplied by: rows t % 32 / 4 and eight
// further of the warp's 16.
struct WidenedBlock {
  uint32_t a[32];
  float low, high;
};

// Four codes, in the lower nibbles of `selectors`, with their signs in the top bits of `signs`: two pairs of BF16.
__device__ inline void WidenFour(uint32_t selectors, uint32_t signs, uint4 table, uint32_t& first, uint32_t& second) {
  const uint32_t upper = __byte_perm(table.x, table.y, selectors) | signs;
  const uint32_t lower = __byte_perm(table.z, table.w, selectors);
  first = __byte_perm(lower, upper, 0x5140);
  second = __byte_perm(lower, upper, 0x7362);
}

// 2^(exponent byte - 127). The byte is never 255: a load refuses it.
__device__ inline float BlockScale(uint32_t scales) {
  const uint32_t byte = scales >> 24;
  return __uint_as_float(byte == 0 ? 0x00400000u : byte << 23);
}

// A record, for thread t of the warpgroup. Values come in FragmentPlace's order (cuda_quantise.h).
__device__ inline void Widen(const uint8_t* record, const uint4* table, int t, WidenedBlock& w) {
  const uint32_t* scales = reinterpret_cast<const uint32_t*>(record + kExpertCodeBytes) + t / 32 * 16 + t % 32 / 4;
  const uint32_t row_scales[2] = {scales[0], scales[8]};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 raw = *reinterpret_cast<const uint4*>(record + half * 2048 + t * 16);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i % 2, group = 2 * half + i / 2;  // of 32: two steps of 16
      const uint32_t word = words[i], selectors = word & 0x77777777u;
      const uint4 magnitudes = table[row_scales[row] >> (4 * group) & 15];
      uint32_t* a = w.a + 8 * group + row;
      WidenFour(selectors, word & 0x80808080u, magnitudes, a[0], a[2]);
      WidenFour(selectors >> 16, word << 4 & 0x80808080u, magnitudes, a[4], a[6]);
    }
  }
  w.low = BlockScale(row_scales[0]);
  w.high = BlockScale(row_scales[1]);
}

// Powers of two: a fused multiply-add rounds once, as an addition would.
template <int kN>
__device__ inline void Promote(const float* sums, const WidenedBlock& w, float* total) {
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) total[i] = fmaf(sums[i], (i & 2) != 0 ? w.high : w.low, total[i]);
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
