// SPDX-License-Identifier: Apache-2.0
// One KV entry of 512 values in the registers of a warp: 16 consecutive dims a lane, lanes 28 to 31 hold the rotated
// ones, a group of 64 that shares an FP8 scale is four lanes. And one index key of 128 values: four a lane. Storage
// formats and their values are the CPU's, byte for byte (compressor_cpu.cc).
#pragma once

#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_pass.h"

namespace millrace::cuda {

constexpr int kLaneDims = kHeadDim / 32;
constexpr int kFirstRopeLane = kPlainDim / kLaneDims;

struct LaneEntry {
  float v[kLaneDims];
};

__device__ inline void LoadBf16Row(const Bf16* row, int lane, LaneEntry& e) {
  const uint4* at = reinterpret_cast<const uint4*>(row + lane * kLaneDims);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 raw = at[half];
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      e.v[half * 8 + 2 * i] = LowBf16(pairs[i]);
      e.v[half * 8 + 2 * i + 1] = HighBf16(pairs[i]);
    }
  }
}

__device__ inline void StoreBf16Row(const LaneEntry& e, int lane, Bf16* row) {
  uint4* at = reinterpret_cast<uint4*>(row + lane * kLaneDims);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = PackBf16(e.v[half * 8 + 2 * i], e.v[half * 8 + 2 * i + 1]);
    at[half] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// RMSNorm over the 512 values, one rounding; `weight` null: none.
__device__ inline void NormEntry(LaneEntry& e, const float* weight, int lane, float eps) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) squares = fmaf(e.v[i], e.v[i], squares);
  const float scale = 1.0f / sqrtf(WarpSum(squares) / kHeadDim + eps);
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    float v = e.v[i] * scale;
    if (weight != nullptr) v *= weight[lane * kLaneDims + i];
    e.v[i] = RoundToBf16(v);
  }
}

// One pair by the angle whose cos and sin are given; products and sums rounded one by one, as on the CPU.
__device__ inline void RotatePair(float& a, float& b, float cos, float sin) {
  const float x = a, y = b;
  a = RoundToBf16(__fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin)));
  b = RoundToBf16(__fadd_rn(__fmul_rn(x, sin), __fmul_rn(y, cos)));
}

// RoPE of the last 64 dims; cos and sin [32] of the row, sign -1 is the inverse.
__device__ inline void RotateEntry(LaneEntry& e, int lane, const float* cos, const float* sin, float sign) {
  if (lane < kFirstRopeLane) return;
#pragma unroll
  for (int i = 0; i < kLaneDims / 2; ++i) {
    const int pair = (lane - kFirstRopeLane) * (kLaneDims / 2) + i;
    RotatePair(e.v[2 * i], e.v[2 * i + 1], cos[pair], sign * sin[pair]);
  }
}

// Exponent of the FP8 scale of this lane's group of 64. All lanes call it; lanes of rotated dims get no meaning.
__device__ inline int GroupExponent(const LaneEntry& e) {
  float amax = 0;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) amax = fmaxf(amax, fabsf(e.v[i]));
  amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, 1));
  amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, 2));
  return ActQuantScale(amax);
}

// FP8 simulation of the first 448 dims.
__device__ inline void SimulateEntry(LaneEntry& e, int lane) {
  const int exponent = GroupExponent(e);
  if (lane >= kFirstRopeLane) return;
  const float inverse = PowerOfTwo(-exponent), scale = PowerOfTwo(exponent);
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) e.v[i] = DecodeE4m3(EncodeE4m3(e.v[i] * inverse)) * scale;
}

// 584 bytes: codes and BF16 to `body` (16-byte aligned), scales to `scales`. Scales are chosen anew from the simulated
// values, as the CPU does: same values, and the same bytes.
__device__ inline void StoreEntry(const LaneEntry& e, int lane, uint8_t* body, uint8_t* scales) {
  const int exponent = GroupExponent(e);
  if (lane >= kFirstRopeLane) {
    StoreBf16Row(e, lane - kFirstRopeLane, reinterpret_cast<Bf16*>(body + kPlainDim));
    if (lane == kFirstRopeLane) scales[kPlainDim / 64] = 0;
    return;
  }
  const float inverse = PowerOfTwo(-exponent);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    words[i / 4] |= static_cast<uint32_t>(EncodeE4m3(e.v[i] * inverse)) << (8 * (i % 4));
  }
  *reinterpret_cast<uint4*>(body + lane * kLaneDims) = {words[0], words[1], words[2], words[3]};
  if (lane % 4 == 0) scales[lane / 4] = EncodeE8m0(exponent);
}

__device__ inline void LoadEntry(const uint8_t* body, const uint8_t* scales, int lane, LaneEntry& e) {
  if (lane >= kFirstRopeLane) {
    return LoadBf16Row(reinterpret_cast<const Bf16*>(body + kPlainDim), lane - kFirstRopeLane, e);
  }
  const uint4 raw = *reinterpret_cast<const uint4*>(body + lane * kLaneDims);
  WidenE4m3(raw.x, e.v);
  WidenE4m3(raw.y, e.v + 4);
  WidenE4m3(raw.z, e.v + 8);
  WidenE4m3(raw.w, e.v + 12);
  const float scale = DecodeE8m0(scales[lane / 4]);
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) e.v[i] *= scale;
}

// Four of the 128 values of an index query or key.
struct LaneIndexKey {
  float v[4];
};

// Natural-order Hadamard over sqrt(128), rounded; the stages in the CPU's order.
__device__ inline void HadamardIndex(LaneIndexKey& x, int lane) {
  const auto butterfly = [](float& a, float& b) {
    const float sum = a + b, difference = a - b;
    a = sum;
    b = difference;
  };
  butterfly(x.v[0], x.v[1]);
  butterfly(x.v[2], x.v[3]);
  butterfly(x.v[0], x.v[2]);
  butterfly(x.v[1], x.v[3]);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, x.v[i], distance);
      x.v[i] = upper ? other - x.v[i] : x.v[i] + other;
    }
  }
  const float norm = sqrtf(static_cast<float>(kIndexDim));
#pragma unroll
  for (int i = 0; i < 4; ++i) x.v[i] = RoundToBf16(x.v[i] / norm);
}

// Exponent of the FP4 scale of this lane's group of 32 (eight lanes).
__device__ inline int IndexGroupExponent(const LaneIndexKey& x) {
  float amax = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) amax = fmaxf(amax, fabsf(x.v[i]));
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, distance));
  return Fp4Scale(amax);
}

__device__ inline void RotateIndex(LaneIndexKey& x, int lane, const float* cos, const float* sin) {
  if (lane < 16) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pair = (lane - 16) * 2 + i;
    RotatePair(x.v[2 * i], x.v[2 * i + 1], cos[pair], sin[pair]);
  }
}

}  // namespace millrace::cuda
