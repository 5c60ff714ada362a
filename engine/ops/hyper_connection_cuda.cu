// SPDX-License-Identifier: Apache-2.0
// mHC: fold the last sublayer's result into the streams, multiply them with the 24 rows of fn, mix, norm, quantise: one
// kernel, in which a row's streams are read and written once.
//
// A cluster of up to 16 CTAs takes 16 or 32 rows at a time; a CTA owns a range of dims of all four streams and that
// part of fn, so sums over a row meet in the cluster twice: the 24 products (with the sum of squares), and the squares
// of the mix. The products run on the tensor cores: streams are BF16, fn is cut into three BF16 parts that hold all of
// its 24 bits, sums are FP32. A warp keeps its fragments of fn in registers for all rows. All sums are taken in one
// order that depends on D alone. Bound: the bytes of the streams, for one row two meetings of the cluster.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_hyper_connection.h"
#include "engine/ops/cuda_quantise.h"
#include "engine/ops/sm90.cuh"
#include "engine/status.h"

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

template <bool kHead, int kRows>
__global__ void __launch_bounds__(kThreads, 1) MixKernel(const __grid_constant__ MixArgs a) {
  using M = Mixer<kHead, kRows>;
  extern __shared__ __align__(16) uint8_t smem[];
  const int slice = SliceDims(a.dim), ctas = ClusterSize(a.dim), rank = static_cast<int>(sm90::ClusterRank());
  const typename M::Smem s(smem, slice);
  M mixer{a, s, slice, ctas, rank, static_cast<int64_t>(rank) * slice};
  // Weights do not depend on the kernel before.
  mixer.PrefetchFn();
  mixer.LoadNorm();
  mixer.HoldFn(0);
  sm90::WaitForPreviousKernel();
  const int64_t step = static_cast<int64_t>(gridDim.x / ctas) * kRows;
  int parity = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x / ctas) * kRows; first < a.rows; first += step, parity ^= 1) {
    mixer.PrefetchStreams(first + step);
    mixer.Load(parity, first);
    __syncthreads();
    mixer.Multiply(parity);
    sm90::ClusterArrive();
    sm90::ClusterWait();
    mixer.Total(parity);
    __syncthreads();
    mixer.Pre();
    __syncthreads();
    mixer.Mix(parity);
    sm90::ClusterArrive();
    if constexpr (!kHead) mixer.Coefficients(first);
    sm90::ClusterWait();
    mixer.Store(parity, first);
    // Sums of the other parity may be written from here on: their readers met again since. x, mixed and totals are this
    // CTA's own, and its threads meet before anyone reads another's.
    __syncthreads();
  }
  // Nobody leaves while others read its sums.
  sm90::ClusterArrive();
  sm90::ClusterWait();
}

// Eight dims a thread.
__global__ void __launch_bounds__(kThreads) PostKernel(HyperUpdate update, int64_t dim, Bf16* streams) {
  const int64_t row = blockIdx.y, d = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (d >= dim) return;
  Bf16* at = streams + row * kStreams * dim + d;
  Eight x[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) x[j] = LoadEight(at + j * dim);
  const Eight y = LoadResult(update, row, dim, d);
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    StoreEight(Fold(y, x, k, update.post + row * kStreams, update.comb + row * kStreams * kStreams), at + k * dim);
  }
}

__global__ void PrefetchKernel(const float* fn, int64_t count) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 32;  // a line of 128 bytes a thread
  if (i < count) sm90::PrefetchL2(fn + i);
}

// How many clusters of this size the card holds at once.
template <bool kHead, int kRows>
int MostClusters(cudaLaunchConfig_t config, int ctas) {
  static int most[kMaxCluster + 1] = {};  // engine thread only
  if (most[ctas] == 0) {
    constexpr int kMostBytes = MixSmem<kRows, Mixer<kHead, kRows>::kN>::Bytes(SliceDims(8192));
    static_assert(kMostBytes <= 227 << 10);
    CUDA_CHECK(cudaFuncSetAttribute(MixKernel<kHead, kRows>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    CUDA_CHECK(cudaFuncSetAttribute(MixKernel<kHead, kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes));
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&most[ctas], MixKernel<kHead, kRows>, &config));
    CHECK(most[ctas] > 0, "a cluster of this size fits no card of this generation");
  }
  return most[ctas];
}

template <bool kHead, int kRows>
void LaunchTiles(const MixArgs& a, cudaStream_t stream) {
  const int ctas = ClusterSize(a.dim);
  cudaLaunchAttribute attributes[1];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = MixSmem<kRows, Mixer<kHead, kRows>::kN>::Bytes(SliceDims(a.dim));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  const int64_t clusters = std::min<int64_t>((a.rows + kRows - 1) / kRows, MostClusters<kHead, kRows>(config, ctas));
  config.gridDim = dim3(static_cast<unsigned>(clusters * ctas));
  CUDA_CHECK(cudaLaunchKernelEx(&config, MixKernel<kHead, kRows>, a));
}

// Larger tiles share the meetings of the cluster among more rows.
template <bool kHead>
void LaunchMix(const MixArgs& a, cudaStream_t stream) {
  if (a.rows <= 128) return LaunchTiles<kHead, 16>(a, stream);
  LaunchTiles<kHead, 32>(a, stream);
}

}  // namespace

void HyperConnectionPre(Bf16* streams, const HyperUpdate& update, const HyperWeights& w, const float* norm,
                        const HyperParams& params, int64_t rows, int64_t dim, const HyperInput& input, float* post,
                        float* comb, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(dim % 32 == 0 && dim <= 8192, "an engine checks this when it is made");
  LaunchMix<false>({streams, update, w, norm, params, rows, dim, input, post, comb}, stream);
}

void HyperPrefetch(const HyperWeights& w, int64_t dim, cudaStream_t stream) {
  const int64_t count = kMixes * kStreams * dim;
  PrefetchKernel<<<static_cast<unsigned>((count + 32 * kThreads - 1) / (32 * kThreads)), kThreads, 0, stream>>>(w.fn,
                                                                                                                count);
  CUDA_CHECK(cudaGetLastError());
}

void HyperConnectionPost(const HyperUpdate& update, int64_t rows, int64_t dim, Bf16* streams, cudaStream_t stream) {
  if (rows == 0 || update.out == nullptr) return;
  const dim3 grid(static_cast<unsigned>((dim / 8 + kThreads - 1) / kThreads), static_cast<unsigned>(rows));
  PostKernel<<<grid, kThreads, 0, stream>>>(update, dim, streams);
  CUDA_CHECK(cudaGetLastError());
}

void HyperHead(const Bf16* streams, const HyperWeights& w, const float* norm, const HyperParams& params, int64_t rows,
               int64_t dim, Bf16* z, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(dim % 32 == 0 && dim <= 8192, "an engine checks this when it is made");
  // Without an update the streams are only read.
  LaunchMix<true>({const_cast<Bf16*>(streams), {}, w, norm, params, rows, dim, {.u = z}, nullptr, nullptr}, stream);
}

}  // namespace millrace::cuda
