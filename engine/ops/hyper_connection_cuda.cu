// SPDX-License-Identifier: Apache-2.0
// mHC: fold the last sublayer's result into the streams, multiply them with the 24 rows of fn, mix, norm, quantise: one
// kernel, in which a row's streams are read and written once.
//
// A cluster of up to 16 CTAs takes 16 rows at a time; a CTA owns a range of dims of all four streams and that part of
// fn, so sums over a row meet in the cluster twice: the 24 products (with the sum of squares), and the squares of the
// mix. The products run on the tensor cores: streams are BF16, fn is cut into three BF16 parts that hold all of its 24
// bits, sums are FP32. A warp keeps its fragments of fn in registers for all rows. All sums are taken in one order that
// depends on D alone. Bound: the bytes of the streams, for one row two meetings of the cluster.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_hyper_connection.h"
#include "engine/ops/cuda_quantise.h"
#include "engine/ops/sm90.cuh"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kRows = 16;                         // of a tile: one product
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRowThreads = kThreads / kRows;     // 16: eight dims each, a quantisation group together
constexpr int kGroup = 8 * kRowThreads;           // 128
constexpr int kMaxCluster = 16;
constexpr int kStepsHeld = 8;                     // steps of 16 of K whose part of fn a warp holds at a time
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

// Shared memory of a CTA, for kN products a row.
template <int kN>
struct MixSmem {
  int x_stride, mixed_stride;  // elements of a row; 16 bytes of padding keep eight rows off one bank
  Bf16* x;                     // [kRows][4][slice]
  Bf16* mixed;                 // [kRows][slice]
  float* warp_sums;            // [kWarps][kRows][kN + 1]
  float* cta_sums;             // [2][kRows][kN + 1], the last column the squares: by parity of the tile
  float* totals;               // [kRows][kN + 1], over the cluster
  float* norm_sums;            // [2][kRows]
  float* update;               // [kRows][4 + 16]: post, comb
  float* pre;                  // [kRows][4]
  float* logits;               // [kRows][16] of comb

  static constexpr int Bytes(int slice) {
    return kRows * (4 * slice + 8 + slice + 8) * 2 +
           4 * ((kWarps + 3) * kRows * (kN + 1) + 2 * kRows + kRows * (20 + 4 + 16));
  }
  __device__ MixSmem(uint8_t* at, int slice) {
    x_stride = 4 * slice + 8;
    mixed_stride = slice + 8;
    x = reinterpret_cast<Bf16*>(at);
    mixed = x + kRows * x_stride;
    warp_sums = reinterpret_cast<float*>(mixed + kRows * mixed_stride);
    cta_sums = warp_sums + kWarps * kRows * (kN + 1);
    totals = cta_sums + 2 * kRows * (kN + 1);
    norm_sums = totals + kRows * (kN + 1);
    update = norm_sums + 2 * kRows;
    pre = update + kRows * 20;
    logits = pre + kRows * 4;
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

// Fragments of fn for one step of K: three parts of every tile of eight rows.
template <int kTiles>
struct FnStep {
  uint32_t part[kParts][kTiles][2];
};
template <int kN, int kTiles>
__device__ inline void LoadFn(const float* fn, int64_t dim, int stream, int64_t d, FnStep<kTiles>& step) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int n = tile * 8 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 w = {0, 0};
      if (n < kN && d < dim) {
        w = __ldg(reinterpret_cast<const float2*>(fn + (static_cast<int64_t>(n) * kStreams + stream) * dim + d +
                                                  lane % 4 * 2 + half * 8));
      }
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

// The whole matrix in one thread: sixteen independent chains.
__device__ inline void Sinkhorn(float (&c)[kStreams][kStreams], int iterations, float eps) {
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    const float max = fmaxf(fmaxf(c[j][0], c[j][1]), fmaxf(c[j][2], c[j][3]));
#pragma unroll
    for (int k = 0; k < kStreams; ++k) c[j][k] = expf(c[j][k] - max);
    const float sum = ((c[j][0] + c[j][1]) + c[j][2]) + c[j][3];
#pragma unroll
    for (int k = 0; k < kStreams; ++k) c[j][k] = c[j][k] / sum + eps;
  }
  for (int i = 0; i < iterations; ++i) {
    if (i > 0) {
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        const float inverse = __fdividef(1.0f, ((c[j][0] + c[j][1]) + c[j][2]) + c[j][3] + eps);
#pragma unroll
        for (int k = 0; k < kStreams; ++k) c[j][k] *= inverse;
      }
    }
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      const float inverse = __fdividef(1.0f, ((c[0][k] + c[1][k]) + c[2][k]) + c[3][k] + eps);
#pragma unroll
      for (int j = 0; j < kStreams; ++j) c[j][k] *= inverse;
    }
  }
}

template <bool kHead>
struct Mixer {
  static constexpr int kN = kHead ? kStreams : kMixes;
  static constexpr int kTiles = (kN + 7) / 8;

  const MixArgs& a;
  const MixSmem<kN>& s;
  const int slice, ctas, rank;
  const int64_t first_dim;  // of this CTA
  const int r = threadIdx.x / kRowThreads, c = threadIdx.x % kRowThreads;  // this thread's row, and place in a group
  FnStep<kTiles> fn[kStepsHeld];

  __device__ int steps() const { return slice / (16 * kWarps / kStreams); }  // of a warp
  __device__ void HoldFn(int pass) {
#pragma unroll
    for (int i = 0; i < kStepsHeld; ++i) {
      const int step = threadIdx.x / 32 + kWarps * (pass * kStepsHeld + i), per_stream = slice / 16;
      LoadFn<kN>(a.w.fn, step < kStreams * per_stream ? a.dim : 0, step / per_stream,
                 first_dim + step % per_stream * 16, fn[i]);
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

  // Streams of the tile into shared memory, updated; their squares.
  __device__ float Load(int64_t row) {
    if (a.update.out != nullptr && row < a.rows) {
      s.update[r * 20 + 4 + c] = a.update.comb[row * 16 + c];
      if (c < kStreams) s.update[r * 20 + c] = a.update.post[row * 4 + c];
    }
    __syncwarp();  // a row's sixteen threads are of one warp
    float squares = 0;
    for (int g = 0; g < slice; g += kGroup) {
      const int at = g + c * 8;
      const int64_t d = first_dim + at;
      Eight x[kStreams] = {};
      if (row < a.rows && d < a.dim) {
        Bf16* streams = a.streams + row * kStreams * a.dim + d;
#pragma unroll
        for (int j = 0; j < kStreams; ++j) x[j] = LoadEight(streams + j * a.dim);
        if (a.update.out != nullptr) {
          const Eight y = LoadResult(a.update, row, a.dim, d);
          Eight folded[kStreams];
#pragma unroll
          for (int k = 0; k < kStreams; ++k) folded[k] = Fold(y, x, k, s.update + r * 20, s.update + r * 20 + 4);
#pragma unroll
          for (int k = 0; k < kStreams; ++k) {
            x[k] = folded[k];
            StoreEight(x[k], streams + k * a.dim);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        StoreEight(x[j], s.x + r * s.x_stride + j * slice + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          squares = fmaf(LowBf16(x[j].pair[i]), LowBf16(x[j].pair[i]), squares);
          squares = fmaf(HighBf16(x[j].pair[i]), HighBf16(x[j].pair[i]), squares);
        }
      }
    }
    return RowSum(squares);
  }

  // This CTA's share of the products, into cta_sums of `parity`.
  __device__ void Multiply(int parity, float squares) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum[kParts][kTiles][4] = {};
    for (int pass = 0; pass * kStepsHeld < steps(); ++pass) {
      if (steps() > kStepsHeld) HoldFn(pass);
#pragma unroll
      for (int i = 0; i < kStepsHeld; ++i) {
        if (pass * kStepsHeld + i >= steps()) break;
        uint32_t x[4];
        sm90::LoadMatrices(x, s.x + lane % 16 * s.x_stride + (warp + kWarps * (pass * kStepsHeld + i)) * 16 +
                                  lane / 16 * 8);
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
        const int row = lane / 4 + i / 2 * 8, n = tile * 8 + lane % 4 * 2 + i % 2;
        if (n < kN) {
          s.warp_sums[(warp * kRows + row) * (kN + 1) + n] = sum[0][tile][i] + (sum[1][tile][i] + sum[2][tile][i]);
        }
      }
    }
    __syncthreads();
    float* mine = s.cta_sums + parity * kRows * (kN + 1);
    for (int i = threadIdx.x; i < kRows * kN; i += kThreads) {
      const int at = i / kN * (kN + 1) + i % kN;
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += s.warp_sums[w * kRows * (kN + 1) + at];
      mine[at] = total;
    }
    if (c == 0) mine[r * (kN + 1) + kN] = squares;
  }

  // Products and squares of the tile over the whole cluster.
  __device__ void Total(int parity) {
    for (int i = threadIdx.x; i < kRows * (kN + 1); i += kThreads) {
      s.totals[i] = ClusterSum(s.cta_sums + parity * kRows * (kN + 1) + i, ctas);
    }
  }

  // What product `n` of tile row `row` comes to, times the row's RMS scale.
  __device__ float Scaled(int row, int n) const {
    const float* totals = s.totals + row * (kN + 1);
    return totals[n] * (1.0f / sqrtf(totals[kN] / static_cast<float>(kStreams * a.dim) + a.params.norm_eps));
  }

  // The mix of this CTA's dims; its squares.
  __device__ float Mix() {
    const float* pre = s.pre + r * kStreams;
    float squares = 0;
    for (int g = 0; g < slice; g += kGroup) {
      const int at = g + c * 8;
      Eight x[kStreams], mixed;
#pragma unroll
      for (int j = 0; j < kStreams; ++j) x[j] = LoadEight(s.x + r * s.x_stride + j * slice + at);
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
      StoreEight(mixed, s.mixed + r * s.mixed_stride + at);
    }
    return RowSum(squares);
  }

  // Post and comb of the rows that fall to this CTA, by the upper four warps, sixteen lanes a row.
  __device__ void Coefficients(int64_t first_row) {
    const int half = threadIdx.x / 16 - kThreads / 32, n = threadIdx.x % 16;
    if (half < 0) return;
    for (int q = half; q < kRows; q += kThreads / 32) {
      const int row = rank + q * ctas;
      const bool real = row < kRows && first_row + row < a.rows;
      if (real) {
        s.logits[row * 16 + n] = Scaled(row, kCombAt + n) * a.w.scale[2] + a.w.base[kCombAt + n];
        if (n < kStreams) {
          a.post[(first_row + row) * kStreams + n] =
              2 * Sigmoid(Scaled(row, kPostAt + n) * a.w.scale[1] + a.w.base[kPostAt + n]);
        }
      }
      __syncwarp();
      if (real && n == 0) {
        float m[kStreams][kStreams];
#pragma unroll
        for (int i = 0; i < 16; ++i) m[i / kStreams][i % kStreams] = s.logits[row * 16 + i];
        Sinkhorn(m, a.params.sinkhorn_iters, a.params.hc_eps);
        float4* comb = reinterpret_cast<float4*>(a.comb + (first_row + row) * 16);
#pragma unroll
        for (int j = 0; j < kStreams; ++j) comb[j] = {m[j][0], m[j][1], m[j][2], m[j][3]};
      }
      __syncwarp();
    }
  }

  // The norm of the whole row from the cluster's squares, and the result.
  __device__ void Store(int parity, int64_t row) {
    const float total = ClusterSum(s.norm_sums + parity * kRows + r, ctas);
    const float scale = 1.0f / sqrtf(total / static_cast<float>(a.dim) + a.params.norm_eps);
    for (int g = 0; g < slice; g += kGroup) {
      const int at = g + c * 8;
      const int64_t d = first_dim + at;
      const bool inside = row < a.rows && d < a.dim;
      Eight u = {};
      if (inside) {
        const Eight mixed = LoadEight(s.mixed + r * s.mixed_stride + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 norm = __ldg(reinterpret_cast<const float2*>(a.norm + d) + i);
          u.pair[i] = PackBf16(ToBf16(LowBf16(mixed.pair[i]) * scale * norm.x),
                               ToBf16(HighBf16(mixed.pair[i]) * scale * norm.y));
        }
        StoreEight(u, a.input.u + row * a.dim + d);
      }
      if constexpr (kHead) continue;
      // Of the bits, not the values: a NaN must win so that the scale shows it.
      uint32_t amax = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) amax = max(amax, max(u.pair[i] << 16 & 0x7fffffffu, u.pair[i] & 0x7fff0000u));
#pragma unroll
      for (int offset = kRowThreads / 2; offset > 0; offset /= 2) {
        amax = max(amax, __shfl_xor_sync(kFullWarp, amax, offset));
      }
      const int exponent = ActQuantScale(__uint_as_float(amax));
      const float inverse = PowerOfTwo(-exponent);
      if (!inside) continue;
      uint32_t codes[2] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 scaled = {LowBf16(u.pair[i]) * inverse, HighBf16(u.pair[i]) * inverse};
        codes[i / 2] |= static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3))
                        << (16 * (i % 2));
      }
      // Dims in fours, the first and the second pair of each apart (cuda_quantise.h).
      const float quantum = PowerOfTwo(exponent);
      Bf16* rounded = a.input.rounded + row * a.dim + FragmentPlace(d);
      *reinterpret_cast<uint2*>(rounded) = {ScaledBf16Pair(codes[0], quantum), ScaledBf16Pair(codes[1], quantum)};
      *reinterpret_cast<uint2*>(rounded + 8) = {ScaledBf16Pair(codes[0] >> 16, quantum),
                                                ScaledBf16Pair(codes[1] >> 16, quantum)};
      if (a.input.codes == nullptr) continue;
      *reinterpret_cast<uint2*>(a.input.codes + row * a.dim + d) = {codes[0], codes[1]};
      if (c == 0) a.input.scales[row * ((a.dim + kGroup - 1) / kGroup) + d / kGroup] = quantum;
    }
  }
};

template <bool kHead>
__global__ void __launch_bounds__(kThreads, 1) MixKernel(const __grid_constant__ MixArgs a) {
  using M = Mixer<kHead>;
  extern __shared__ __align__(16) uint8_t smem[];
  const int slice = SliceDims(a.dim), ctas = ClusterSize(a.dim), rank = static_cast<int>(sm90::ClusterRank());
  const MixSmem<M::kN> s(smem, slice);
  M mixer{a, s, slice, ctas, rank, static_cast<int64_t>(rank) * slice};
  mixer.PrefetchFn();
  mixer.HoldFn(0);  // does not depend on the kernel before
  sm90::WaitForPreviousKernel();
  int parity = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x / ctas) * kRows; first < a.rows;
       first += static_cast<int64_t>(gridDim.x / ctas) * kRows, parity ^= 1) {
    const int64_t row = first + mixer.r;
    mixer.PrefetchStreams(first + static_cast<int64_t>(gridDim.x / ctas) * kRows);
    const float squares = mixer.Load(row);
    __syncthreads();
    mixer.Multiply(parity, squares);
    sm90::ClusterArrive();
    sm90::ClusterWait();
    mixer.Total(parity);
    __syncthreads();
    if (threadIdx.x < kRows * kStreams) {
      const int j = threadIdx.x % kStreams;
      s.pre[threadIdx.x] =
          Sigmoid(mixer.Scaled(threadIdx.x / kStreams, j) * a.w.scale[0] + a.w.base[j]) + a.params.hc_eps;
    }
    __syncthreads();
    const float mixed_squares = mixer.Mix();
    if (mixer.c == 0) s.norm_sums[parity * kRows + mixer.r] = mixed_squares;
    sm90::ClusterArrive();
    if constexpr (!kHead) mixer.Coefficients(first);
    sm90::ClusterWait();
    mixer.Store(parity, row);
    // Sums of the other parity may be written from here on: their readers met again since. x, mixed and pre are this
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

// How many clusters of this size the card holds at once.
template <bool kHead>
int MostClusters(cudaLaunchConfig_t config, int ctas) {
  static int most[kMaxCluster + 1] = {};  // engine thread only
  if (most[ctas] == 0) {
    CUDA_CHECK(cudaFuncSetAttribute(MixKernel<kHead>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    CUDA_CHECK(cudaFuncSetAttribute(MixKernel<kHead>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    MixSmem<Mixer<kHead>::kN>::Bytes(SliceDims(8192))));
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&most[ctas], MixKernel<kHead>, &config));
    CHECK(most[ctas] > 0, "a cluster of this size fits no card of this generation");
  }
  return most[ctas];
}

template <bool kHead>
void LaunchMix(const MixArgs& a, cudaStream_t stream) {
  const int ctas = ClusterSize(a.dim);
  cudaLaunchAttribute attributes[1];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = MixSmem<Mixer<kHead>::kN>::Bytes(SliceDims(a.dim));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  const int64_t clusters = std::min<int64_t>((a.rows + kRows - 1) / kRows, MostClusters<kHead>(config, ctas));
  config.gridDim = dim3(static_cast<unsigned>(clusters * ctas));
  CUDA_CHECK(cudaLaunchKernelEx(&config, MixKernel<kHead>, a));
}

}  // namespace

void HyperConnectionPre(Bf16* streams, const HyperUpdate& update, const HyperWeights& w, const float* norm,
                        const HyperParams& params, int64_t rows, int64_t dim, const HyperInput& input, float* post,
                        float* comb, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(dim % 32 == 0 && dim <= 8192, "an engine checks this when it is made");
  LaunchMix<false>({streams, update, w, norm, params, rows, dim, input, post, comb}, stream);
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
