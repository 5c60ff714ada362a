// SPDX-License-Identifier: Apache-2.0
// The steps of one tile of mHC, from its streams to the layer's rounded input. For hyper_connection_cuda.cu, whose
// kernel says in what order they come.
#pragma once

#include "engine/ops/cuda_quantise.h"
#include "engine/ops/hyper_connection_parts.cuh"

namespace millrace::cuda {
namespace {

// One tile's work, step by step; MixKernel says in what order and where threads meet.
template <bool kHead, int kRows>
struct Mixer {
  static constexpr int kN = kHead ? kStreams : kMixes;
  static constexpr int kTiles = (kN + 7) / 8;
  static constexpr int kHalves = kRows / kProductRows;
  using Smem = MixSmem<kRows, kN>;

  const MixArgs& a;
  const Smem& s;
  const int slice, ctas, rank;
  const int64_t first_dim;                                                 // of this CTA
  const int r = threadIdx.x / kRowThreads, c = threadIdx.x % kRowThreads;  // row of a half, and place in a group
  FnStep<kTiles> fn[kStepsHeld];

  __device__ int steps() const { return slice / (16 * kWarps / kStreams); }  // of a warp

  // Four steps at a time are on their way together.
  __device__ void HoldFn(int pass) {
    constexpr int kTogether = 4;
#pragma unroll
    for (int first = 0; first < kStepsHeld; first += kTogether) {
      RawFn<kTiles> raw[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int step = threadIdx.x / 32 + kWarps * (pass * kStepsHeld + first + i), per_stream = slice / 16;
        LoadFn<kN>(a.w.fn, step < kStreams * per_stream ? a.dim : 0, step / per_stream,
                   first_dim + step % per_stream * 16, raw[i]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) CutFn(raw[i], fn[first + i]);
    }
  }
  // Brings what later loads will wait for into the L2 cache: all of this CTA's part of fn at once, rather than step by
  // step; and the streams of a tile to come.
  __device__ void PrefetchFn() const {
    const int lines = slice / 32;  // of 32 floats, in one stream of one row
    for (int i = threadIdx.x; i < kN * kStreams * lines; i += kThreads) {
      const int64_t d = first_dim + i % lines * 32;
      if (d < a.dim) sm90::PrefetchL2(a.w.fn + i / lines * a.dim + d);
    }
  }
  __device__ void PrefetchStreams(int64_t first_row) const {
    const int lines = slice / 64;  // of 64 values
    for (int i = threadIdx.x; i < kRows * (kStreams + 1) * lines; i += kThreads) {
      const int64_t row = first_row + i / lines / (kStreams + 1), d = first_dim + i % lines * 64;
      const int part = i / lines % (kStreams + 1);
      if (row >= a.rows || d >= a.dim) continue;
      if (part < kStreams) {
        sm90::PrefetchL2(a.streams + (row * kStreams + part) * a.dim + d);
      } else if (a.update.out != nullptr) {
        sm90::PrefetchL2(a.update.out + row * a.dim + d);
      }
    }
  }
  __device__ void LoadNorm() const {
    for (int i = threadIdx.x; i < slice; i += kThreads) s.norm[i] = first_dim + i < a.dim ? a.norm[first_dim + i] : 0;
  }

  // Streams of the tile into shared memory, updated; their squares into cta_sums of `parity`.
  __device__ void Load(int parity, int64_t first_row) {
#pragma unroll 1
    for (int half = 0; half < kHalves; ++half) {
      const int tile_row = half * kProductRows + r;
      const int64_t row = first_row + tile_row;
      float* update = s.update + tile_row * 20;
      const bool folds = a.update.out != nullptr && row < a.rows;
      if (folds) {
        update[4 + c] = a.update.comb[row * 16 + c];
        if (c < kStreams) update[c] = a.update.post[row * 4 + c];
      }
      __syncwarp();  // a row's sixteen threads are of one warp
      float squares = 0;
      // Two groups on their way together.
      for (int g = 0; g < slice; g += 2 * kGroup) {
        Eight x[2][kStreams] = {}, y[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t d = first_dim + g + i * kGroup + c * 8;
          if (row >= a.rows || d >= a.dim || g + i * kGroup >= slice) continue;
#pragma unroll
          for (int j = 0; j < kStreams; ++j) x[i][j] = LoadEight(a.streams + (row * kStreams + j) * a.dim + d);
          if (folds) y[i] = LoadResult(a.update, row, a.dim, d);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = g + i * kGroup + c * 8;
          if (g + i * kGroup >= slice) continue;
          if (folds && first_dim + at < a.dim) {
            Eight folded[kStreams];
#pragma unroll
            for (int k = 0; k < kStreams; ++k) folded[k] = Fold(y[i], x[i], k, update, update + 4);
#pragma unroll
            for (int k = 0; k < kStreams; ++k) {
              x[i][k] = folded[k];
              StoreEight(folded[k], a.streams + (row * kStreams + k) * a.dim + first_dim + at);
            }
          }
#pragma unroll
          for (int j = 0; j < kStreams; ++j) {
            StoreEight(x[i][j], s.x + tile_row * s.x_stride + j * slice + at);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              squares = fmaf(LowBf16(x[i][j].pair[n]), LowBf16(x[i][j].pair[n]), squares);
              squares = fmaf(HighBf16(x[i][j].pair[n]), HighBf16(x[i][j].pair[n]), squares);
            }
          }
        }
      }
      squares = RowSum(squares);
      if (c == 0) s.cta_sums[parity * Smem::kSums + tile_row * (kN + 1) + kN] = squares;
    }
  }

  // This CTA's share of the products, into cta_sums of `parity`.
  __device__ void Multiply(int parity) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int half = 0; half < kHalves; ++half) {
      float sum[kParts][kTiles][4] = {};
      for (int pass = 0; pass * kStepsHeld < steps(); ++pass) {
        if (steps() > kStepsHeld) HoldFn(pass);
#pragma unroll
        for (int i = 0; i < kStepsHeld; ++i) {
          if (pass * kStepsHeld + i >= steps()) break;
          uint32_t x[4];
          sm90::LoadMatrices(x, s.x + (half * kProductRows + lane % 16) * s.x_stride +
                                    (warp + kWarps * (pass * kStepsHeld + i)) * 16 + lane / 16 * 8);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              sm90::MultiplyAdd(sum[part][tile], x, fn[i].part[part][tile][0], fn[i].part[part][tile][1]);
            }
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = half * kProductRows + lane / 4 + i / 2 * 8, n = tile * 8 + lane % 4 * 2 + i % 2;
          if (n >= kN) continue;
          s.warp_sums[warp * Smem::kSums + row * (kN + 1) + n] = sum[0][tile][i] + (sum[1][tile][i] + sum[2][tile][i]);
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kN; i += kThreads) {
      const int at = i / kN * (kN + 1) + i % kN;
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += s.warp_sums[w * Smem::kSums + at];
      s.cta_sums[parity * Smem::kSums + at] = total;
    }
  }

  // Products and squares of the tile over the whole cluster.
  __device__ void Total(int parity) {
    for (int i = threadIdx.x * 4; i < Smem::kSums; i += kThreads * 4) {
      *reinterpret_cast<float4*>(s.totals + i) = ClusterSum4(s.cta_sums + parity * Smem::kSums + i, ctas);
    }
  }

  // What product `n` of tile row `row` comes to, times the row's RMS scale.
  __device__ float Scaled(int row, int n) const {
    const float* totals = s.totals + row * (kN + 1);
    return totals[n] * (1.0f / sqrtf(totals[kN] / static_cast<float>(kStreams * a.dim) + a.params.norm_eps));
  }

  __device__ void Pre() {
    if (threadIdx.x >= kRows * kStreams) return;
    const int j = threadIdx.x % kStreams;
    s.pre[threadIdx.x] = Sigmoid(Scaled(threadIdx.x / kStreams, j) * a.w.scale[0] + a.w.base[j]) + a.params.hc_eps;
  }

  // The mix of this CTA's dims, and its squares into norm_sums of `parity`.
  __device__ void Mix(int parity) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int tile_row = half * kProductRows + r;
      const float4 pre4 = *reinterpret_cast<const float4*>(s.pre + tile_row * kStreams);
      const float pre[kStreams] = {pre4.x, pre4.y, pre4.z, pre4.w};
      float squares = 0;
      for (int g = 0; g < slice; g += kGroup) {
        const int at = g + c * 8;
        Eight x[kStreams], mixed;
#pragma unroll
        for (int j = 0; j < kStreams; ++j) x[j] = LoadEight(s.x + tile_row * s.x_stride + j * slice + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float low = __fmul_rn(LowBf16(x[0].pair[i]), pre[0]), high = __fmul_rn(HighBf16(x[0].pair[i]), pre[0]);
#pragma unroll
          for (int j = 1; j < kStreams; ++j) {
            low = fmaf(LowBf16(x[j].pair[i]), pre[j], low);
            high = fmaf(HighBf16(x[j].pair[i]), pre[j], high);
          }
          mixed.pair[i] = PackBf16(ToBf16(low), ToBf16(high));
          low = LowBf16(mixed.pair[i]);
          high = HighBf16(mixed.pair[i]);
          squares = fmaf(high, high, fmaf(low, low, squares));
        }
        StoreEight(mixed, s.mixed + tile_row * s.mixed_stride + at);
      }
      squares = RowSum(squares);
      if (c == 0) s.norm_sums[parity * kRows + tile_row] = squares;
    }
  }

  // Post and comb of the rows that fall to this CTA, by the upper four warps, four lanes a row: lane j has row j.
  __device__ void Coefficients(int64_t first_row) {
    if (threadIdx.x < kThreads / 2) return;
    const int j = threadIdx.x % kStreams, row = rank + (threadIdx.x - kThreads / 2) / kStreams * ctas;
    const bool real = row < kRows && first_row + row < a.rows;
    float comb[kStreams] = {};
    if (real) {
#pragma unroll
      for (int k = 0; k < kStreams; ++k) {
        const int n = kCombAt + j * kStreams + k;
        comb[k] = Scaled(row, n) * a.w.scale[2] + a.w.base[n];
      }
    }
    Sinkhorn(comb, a.params.sinkhorn_iters, a.params.hc_eps);
    if (!real) return;
    const int64_t at = (first_row + row) * kStreams + j;
    reinterpret_cast<float4*>(a.comb)[at] = {comb[0], comb[1], comb[2], comb[3]};
    a.post[at] = 2 * Sigmoid(Scaled(row, kPostAt + j) * a.w.scale[1] + a.w.base[kPostAt + j]);
  }

  // The norm of the whole row from the cluster's squares, and the result.
  __device__ void Store(int parity, int64_t first_row) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int tile_row = half * kProductRows + r;
      const int64_t row = first_row + tile_row;
      const float total = ClusterSum(s.norm_sums + parity * kRows + tile_row, ctas);
      const float scale = 1.0f / sqrtf(total / static_cast<float>(a.dim) + a.params.norm_eps);
      for (int g = 0; g < slice; g += kGroup) {
        const int at = g + c * 8;
        const int64_t d = first_dim + at;
        const bool inside = row < a.rows && d < a.dim;
        Eight u = {};
        if (inside) {
          const Eight mixed = LoadEight(s.mixed + tile_row * s.mixed_stride + at);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 norm = *reinterpret_cast<const float2*>(s.norm + at + 2 * i);
            u.pair[i] = PackBf16(ToBf16(LowBf16(mixed.pair[i]) * scale * norm.x),
                                 ToBf16(HighBf16(mixed.pair[i]) * scale * norm.y));
          }
          StoreEight(u, a.input.u + row * a.dim + d);
        }
        if constexpr (!kHead) StoreRounded(u, row, d, inside);
      }
    }
  }

  // A group of 128 is sixteen threads', each with eight values. All of them call it.
  __device__ void StoreRounded(const Eight& u, int64_t row, int64_t d, bool inside) {
    // Of the bits, not the values: a NaN must win so that the scale shows it.
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) amax = max(amax, max(u.pair[i] << 16 & 0x7fffffffu, u.pair[i] & 0x7fff0000u));
#pragma unroll
    for (int offset = kRowThreads / 2; offset > 0; offset /= 2) {
      amax = max(amax, __shfl_xor_sync(kFullWarp, amax, offset));
    }
    if (!inside) return;
    const int exponent = ActQuantScale(__uint_as_float(amax));
    const float inverse = PowerOfTwo(-exponent), quantum = PowerOfTwo(exponent);
    uint32_t codes[2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 scaled = {LowBf16(u.pair[i]) * inverse, HighBf16(u.pair[i]) * inverse};
      codes[i / 2] |= static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3))
                      << (16 * (i % 2));
    }
    // Dims in fours, the first and the second pair of each apart (cuda_quantise.h).
    Bf16* rounded = a.input.rounded + row * a.dim + FragmentPlace(d);
    *reinterpret_cast<uint2*>(rounded) = {ScaledBf16Pair(codes[0], quantum), ScaledBf16Pair(codes[1], quantum)};
    *reinterpret_cast<uint2*>(rounded + 8) = {ScaledBf16Pair(codes[0] >> 16, quantum),
                                              ScaledBf16Pair(codes[1] >> 16, quantum)};
  }
};

}  // namespace
}  // namespace millrace::cuda
