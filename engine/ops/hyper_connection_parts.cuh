// SPDX-License-Identifier: Apache-2.0
// What a tile of mHC is made of: its arguments and shared memory, eight BF16 values at a time, fragments of fn in three
// parts, and the mix weights. For hyper_connection_mixer.cuh.
#pragma once

#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_hyper_connection.h"
#include "engine/ops/sm90.cuh"

namespace millrace::cuda {
namespace {

constexpr int kProductRows = 16;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRowThreads = kThreads / kProductRows;  // 16: eight dims each, a quantisation group together
constexpr int kGroup = 8 * kRowThreads;               // 128
constexpr int kMaxCluster = 16;
constexpr int kStepsHeld = 8;  // steps of 16 of K whose part of fn a warp holds at a time
constexpr int kParts = 3;
constexpr int kMixes = (2 + kStreams) * kStreams;  // 24: pre, post, comb
constexpr int kPostAt = kStreams, kCombAt = 2 * kStreams;

// Dims of one CTA, whole groups; and CTAs of a cluster.
constexpr int SliceDims(int64_t dim) {
  return static_cast<int>((dim + kGroup * kMaxCluster - 1) / (kGroup * kMaxCluster)) * kGroup;
}
constexpr int ClusterSize(int64_t dim) { return static_cast<int>((dim + SliceDims(dim) - 1) / SliceDims(dim)); }

struct MixArgs {
  Bf16* streams = nullptr;
  HyperUpdate update;
  HyperWeights w;
  const float* norm = nullptr;
  HyperParams params;
  int64_t rows = 0, dim = 0;
  HyperInput input;
  float *post = nullptr, *comb = nullptr;
};

// Shared memory of a CTA, for tiles of kRows rows and kN products a row.
template <int kRows, int kN>
struct MixSmem {
  // Of each row kN products, then the sum of squares; read by fours.
  static constexpr int kSums = kRows * (kN + 1);
  static_assert(kSums % 4 == 0);
  int x_stride, mixed_stride;  // elements of a row; 16 bytes of padding keep eight rows off one bank
  Bf16* x;                     // [kRows][4][slice]
  Bf16* mixed;                 // [kRows][slice]
  float* norm;                 // [slice]
  float* warp_sums;            // [kWarps][kRows][kN + 1]
  float* cta_sums;             // [2][kRows][kN + 1]: by parity of the tile
  float* totals;               // [kRows][kN + 1], over the cluster
  float* norm_sums;            // [2][kRows]
  float* update;               // [kRows][4 + 16]: post, comb
  float* pre;                  // [kRows][4]

  static constexpr int Bytes(int slice) {
    return kRows * (4 * slice + 8 + slice + 8) * 2 + 4 * (slice + (kWarps + 3) * kSums + 2 * kRows + kRows * (20 + 4));
  }
  __device__ MixSmem(uint8_t* at, int slice) {
    x_stride = 4 * slice + 8;
    mixed_stride = slice + 8;
    x = reinterpret_cast<Bf16*>(at);
    mixed = x + kRows * x_stride;
    norm = reinterpret_cast<float*>(mixed + kRows * mixed_stride);
    warp_sums = norm + slice;
    cta_sums = warp_sums + kWarps * kSums;
    totals = cta_sums + 2 * kSums;
    norm_sums = totals + kSums;
    update = norm_sums + 2 * kRows;
    pre = update + kRows * 20;
  }
};

__device__ inline float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ inline uint32_t PackBf16(Bf16 low, Bf16 high) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(low)) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
}

// Eight dims of a row as four pairs.
struct Eight {
  uint32_t pair[4];
};
__device__ inline Eight LoadEight(const Bf16* at) {
  const uint4 raw = *reinterpret_cast<const uint4*>(at);
  return {{raw.x, raw.y, raw.z, raw.w}};
}
__device__ inline void StoreEight(const Eight& e, Bf16* at) {
  *reinterpret_cast<uint4*>(at) = {e.pair[0], e.pair[1], e.pair[2], e.pair[3]};
}

// The sublayer's result of a row.
__device__ inline Eight LoadResult(const HyperUpdate& update, int64_t row, int64_t dim, int64_t d) {
  const Eight out = LoadEight(update.out + row * dim + d);
  if (update.top_k == 0) return out;
  float y[8] = {};
  for (int j = 0; j < update.top_k; ++j) {
    const Eight e = LoadEight(update.expert_rows + (row * update.top_k + j) * dim + d);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[2 * i] += LowBf16(e.pair[i]);
      y[2 * i + 1] += HighBf16(e.pair[i]);
    }
  }
  Eight sum;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum.pair[i] = PackBf16(ToBf16(y[2 * i] + LowBf16(out.pair[i])), ToBf16(y[2 * i + 1] + HighBf16(out.pair[i])));
  }
  return sum;
}

// Stream k after the update. `post` [4] and `comb` [4][4].
__device__ inline Eight Fold(const Eight& y, const Eight (&old)[kStreams], int k, const float* post,
                             const float* comb) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float low = __fmul_rn(post[k], LowBf16(y.pair[i])), high = __fmul_rn(post[k], HighBf16(y.pair[i]));
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      low = fmaf(comb[j * kStreams + k], LowBf16(old[j].pair[i]), low);
      high = fmaf(comb[j * kStreams + k], HighBf16(old[j].pair[i]), high);
    }
    out.pair[i] = PackBf16(ToBf16(low), ToBf16(high));
  }
  return out;
}

// Sum over the 16 threads of a row; all get it.
__device__ inline float RowSum(float x) {
#pragma unroll
  for (int offset = kRowThreads / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Sum over the cluster, ascending, of the float at `at` of each CTA. All loads are under way before the first is added.
__device__ inline float ClusterSum(const float* at, int ctas) {
  float values[kMaxCluster], sum = 0;
#pragma unroll
  for (int rank = 0; rank < kMaxCluster; ++rank) {
    values[rank] = rank < ctas ? sm90::LoadRemote(sm90::RemoteAddress(at, rank)) : 0.0f;
  }
#pragma unroll
  for (int rank = 0; rank < kMaxCluster; ++rank) sum += values[rank];
  return sum;
}

// The same of four floats.
__device__ inline float4 ClusterSum4(const float* at, int ctas) {
  float4 values[kMaxCluster], sum = {0, 0, 0, 0};
#pragma unroll
  for (int rank = 0; rank < kMaxCluster; ++rank) {
    values[rank] = rank < ctas ? sm90::LoadRemote4(sm90::RemoteAddress(at, rank)) : float4{0, 0, 0, 0};
  }
#pragma unroll
  for (int rank = 0; rank < kMaxCluster; ++rank) {
    sum = {sum.x + values[rank].x, sum.y + values[rank].y, sum.z + values[rank].z, sum.w + values[rank].w};
  }
  return sum;
}

// Fragments of fn for one step of K: three parts of every tile of eight rows.
template <int kTiles>
struct FnStep {
  uint32_t part[kParts][kTiles][2];
};
// What a lane reads of fn for one step, as it lies.
template <int kTiles>
struct RawFn {
  float2 w[kTiles][2];
};
template <int kN, int kTiles>
__device__ inline void LoadFn(const float* fn, int64_t dim, int stream, int64_t d, RawFn<kTiles>& raw) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int n = tile * 8 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raw.w[tile][half] = {0, 0};
      if (n >= kN || d >= dim) continue;
      const float* at = fn + (static_cast<int64_t>(n) * kStreams + stream) * dim + d + lane % 4 * 2 + half * 8;
      raw.w[tile][half] = __ldg(reinterpret_cast<const float2*>(at));
    }
  }
}
template <int kTiles>
__device__ inline void CutFn(const RawFn<kTiles>& raw, FnStep<kTiles>& step) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 w = raw.w[tile][half];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const Bf16 low = ToBf16(w.x), high = ToBf16(w.y);
        step.part[part][tile][half] = PackBf16(low, high);
        w.x -= ToFloat(low);
        w.y -= ToFloat(high);
      }
    }
  }
}

__device__ inline float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four lanes hold a matrix, one row each. Every lane of the warp calls it.
__device__ inline void Sinkhorn(float (&c)[kStreams], int iterations, float eps) {
  const float max = fmaxf(fmaxf(c[0], c[1]), fmaxf(c[2], c[3]));
#pragma unroll
  for (int k = 0; k < kStreams; ++k) c[k] = expf(c[k] - max);
  const float sum = (c[0] + c[1]) + (c[2] + c[3]);
#pragma unroll
  for (int k = 0; k < kStreams; ++k) c[k] = c[k] / sum + eps;
  for (int i = 0; i < iterations; ++i) {
    if (i > 0) {
      const float inverse = Reciprocal((c[0] + c[1]) + (c[2] + c[3]) + eps);
#pragma unroll
      for (int k = 0; k < kStreams; ++k) c[k] *= inverse;
    }
    float column[kStreams];
#pragma unroll
    for (int k = 0; k < kStreams; ++k) column[k] = c[k] + __shfl_xor_sync(kFullWarp, c[k], 1);
#pragma unroll
    for (int k = 0; k < kStreams; ++k) column[k] += __shfl_xor_sync(kFullWarp, column[k], 2);
#pragma unroll
    for (int k = 0; k < kStreams; ++k) c[k] *= Reciprocal(column[k] + eps);
  }
}

}  // namespace
}  // namespace millrace::cuda
