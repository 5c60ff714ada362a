// SPDX-License-Identifier: Apache-2.0
// Attention core on tensor cores: one block per (row, sixteen heads), BF16 products summed in FP32.
//
// The list of a row is its 128 window slots, oldest first, then its entries ascending, in tiles of 64; a segment is 18
// tiles. A segment is walked twice: first for its logits, which stay in shared memory so that probabilities are rounded
// relative to the segment's own maximum, then for its values. Segments merge in ascending order. Everything is cut by
// place in the list, so the bits depend on the row's position only, whatever else is in the pass.
//
// Shared memory: one tile of keys as BF16 (64 rows, padded by 16 bytes so that ldmatrix meets no bank twice), the
// segment's logits as FP32 and its probabilities as BF16, the entries' places. All eight warps widen a tile (eight keys
// each) and meet at a barrier; then a warp has eight keys of the logits, or 64 dims of the values. Queries stay in
// registers as fragments of m16n8k16. Bound: reading and widening keys, twice; loads are not overlapped with products.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_entry.cuh"
#include "engine/ops/cuda_sparse_attention.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kHeads = 16;  // rows of one product
constexpr int kTile = 64, kSegment = 18 * kTile;
constexpr int kEntryBody = kPlainDim + 2 * kRopeDim;
constexpr int kKeysPerWarp = kTile / kWarps;     // 8: columns of a logit product
constexpr int kDimsPerWarp = kHeadDim / kWarps;  // 64
constexpr int kKSteps = kHeadDim / 16;
constexpr int kKeyStride = kHeadDim + 8;  // BF16 values; likewise below
constexpr int kLogitStride = kSegment + 4, kProbabilityStride = kSegment + 8;

struct Smem {
  Bf16 keys[kTile][kKeyStride];
  float logits[kHeads][kLogitStride];
  Bf16 probabilities[kHeads][kProbabilityStride];
  uint32_t places[kSegment];  // page * entries per page + index in the page
  float max[kHeads], sum[kHeads];
};
static_assert(sizeof(Smem) <= 227 << 10, "one block a multiprocessor");

// Where the keys of one row lie.
struct KeyList {
  const Bf16* window;  // key of position - 127; rows before the sequence are not read
  const uint8_t* pages;
  int64_t page_bytes, bodies, scales;
  int per_page;
};

// Sixteen consecutive values of a key as loaded: BF16 in both words, or E4M3 in the first with its scale.
struct RawKey {
  uint4 a, b;
  float scale;  // 0: BF16
};

// `place` of the segment that begins at `begin`; `valid` false: zeros.
__device__ inline RawKey LoadRawKey(const KeyList& list, const uint32_t* places, int64_t begin, int place, bool valid,
                                    int lane) {
  RawKey raw = {{0, 0, 0, 0}, {0, 0, 0, 0}, 0};
  if (!valid) return raw;
  const uint4* at;
  if (begin + place < kWindow) {
    at = reinterpret_cast<const uint4*>(list.window + (begin + place) * kHeadDim + lane * kLaneDims);
  } else {
    const uint32_t entry = places[place], in_page = entry % list.per_page;
    const uint8_t* page = list.pages + entry / list.per_page * list.page_bytes;
    const uint8_t* body = page + list.bodies + in_page * kEntryBody;
    if (lane < kFirstRopeLane) {
      raw.a = *reinterpret_cast<const uint4*>(body + lane * kLaneDims);
      raw.scale = DecodeE8m0(page[list.scales + in_page * 8 + lane / 4]);
      return raw;
    }
    at = reinterpret_cast<const uint4*>(body + kPlainDim + (lane - kFirstRopeLane) * kLaneDims * 2);
  }
  raw.a = at[0];
  raw.b = at[1];
  return raw;
}

// Two floats that BF16 holds exactly, as a pair.
__device__ inline uint32_t PackExact(float low, float high) {
  return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
}

__device__ inline void StoreRawKey(const RawKey& raw, Bf16* row, int lane) {
  uint4* to = reinterpret_cast<uint4*>(row + lane * kLaneDims);
  if (raw.scale == 0) {
    to[0] = raw.a;
    to[1] = raw.b;
    return;
  }
  float v[kLaneDims];
  WidenE4m3(raw.a.x, v);
  WidenE4m3(raw.a.y, v + 4);
  WidenE4m3(raw.a.z, v + 8);
  WidenE4m3(raw.a.w, v + 12);
  uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) pairs[i] = PackExact(v[2 * i] * raw.scale, v[2 * i + 1] * raw.scale);
  to[0] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  to[1] = {pairs[4], pairs[5], pairs[6], pairs[7]};
}

// Tile `tile` of the segment into shared memory; places below `first` and from `n` on become zeros, which add nothing.
__device__ inline void LoadTile(const KeyList& list, Smem& smem, int64_t begin, int tile, int first, int n) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kInFlight = 4;
#pragma unroll
  for (int half = 0; half < kKeysPerWarp / kInFlight; ++half) {
    RawKey raw[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int place = tile * kTile + warp * kKeysPerWarp + half * kInFlight + i;
      raw[i] = LoadRawKey(list, smem.places, begin, place, place >= first && place < n, lane);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      StoreRawKey(raw[i], smem.keys[warp * kKeysPerWarp + half * kInFlight + i], lane);
    }
  }
}

// PTX, in one place.
__device__ inline uint32_t SmemAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ inline void LoadMatrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(SmemAddress(row)));
}
__device__ inline void LoadMatricesTransposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(SmemAddress(row)));
}
__device__ inline void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// In a product's result, a lane has heads lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and the next.
__global__ void __launch_bounds__(kThreads, 1)
    AttentionKernel(LayerKind kind, PassView pass, PageLayerLayout page, const Bf16* q, int heads, const float* sink,
                    const Bf16* keys, SelectionView selection, RopeView rope, Bf16* out) {
  extern __shared__ __align__(16) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  const int64_t row = blockIdx.x;
  const int first_head = static_cast<int>(blockIdx.y) * kHeads, num_heads = min(kHeads, heads - first_head);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t position = pass.positions[row], sequence_index = pass.row_sequence[row];
  const SequenceView sequence = pass.sequences[sequence_index];
  const KeyList list{keys + WindowRow(sequence, sequence_index, position - (kWindow - 1)) * kHeadDim,
                     pass.pages,
                     pass.page_bytes,
                     page.bodies,
                     page.scales,
                     page.entries};
  const int64_t entries = kind == LayerKind::kWindow ? 0
                          : kind == LayerKind::kCsa  ? selection.counts[row]
                                                     : (position + 1) / 128;
  const int64_t places = kWindow + entries;
  const int masked = position < kWindow - 1 ? static_cast<int>(kWindow - 1 - position) : 0;  // before the sequence
  const float scale = 1.0f / sqrtf(static_cast<float>(kHeadDim));

  // Queries pass through the tile's memory once, heads that do not exist as zeros.
  for (int i = threadIdx.x; i < kHeads * (kHeadDim / 8); i += kThreads) {
    const int h = i / (kHeadDim / 8), at = i % (kHeadDim / 8) * 8;
    *reinterpret_cast<uint4*>(&smem.keys[h][at]) =
        h < num_heads ? *reinterpret_cast<const uint4*>(q + (row * heads + first_head + h) * kHeadDim + at)
                      : uint4{0, 0, 0, 0};
  }
  __syncthreads();
  uint32_t query[kKSteps][4];
#pragma unroll
  for (int k = 0; k < kKSteps; ++k) LoadMatrices(query[k], &smem.keys[lane % 16][k * 16 + lane / 16 * 8]);
  __syncthreads();

  float running_max[2] = {-INFINITY, -INFINITY}, running_sum[2] = {0, 0};
  float o[kDimsPerWarp / 8][4] = {};
  for (int64_t begin = 0; begin < places; begin += kSegment) {
    const int n = static_cast<int>(min(static_cast<int64_t>(kSegment), places - begin));
    const int first = begin == 0 ? masked : 0, tiles = (n + kTile - 1) / kTile;
    for (int j = (begin == 0 ? kWindow : 0) + static_cast<int>(threadIdx.x); j < n; j += kThreads) {
      const int64_t i = begin + j - kWindow;
      const int64_t entry = kind == LayerKind::kCsa ? selection.entries[row * selection.topk + i] : i;
      smem.places[j] = static_cast<uint32_t>(sequence.block_table[entry / page.entries]) * page.entries +
                       static_cast<uint32_t>(entry % page.entries);
    }
    __syncthreads();

    for (int tile = 0; tile < tiles; ++tile) {
      LoadTile(list, smem, begin, tile, first, n);
      __syncthreads();
      // Four chains of products, so that one does not wait for the other; added in order.
      float c[4][4] = {};
#pragma unroll
      for (int k = 0; k < kKSteps; k += 2) {
        uint32_t key[4];  // two steps of k
        LoadMatrices(key, &smem.keys[warp * kKeysPerWarp + lane % 8][k * 16 + lane / 8 * 8]);
        MultiplyAdd(c[k % 4], query[k], key[0], key[1]);
        MultiplyAdd(c[k % 4 + 1], query[k + 1], key[2], key[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = lane / 4 + i / 2 * 8, j = tile * kTile + warp * kKeysPerWarp + lane % 4 * 2 + i % 2;
        smem.logits[h][j] = scale * ((c[0][i] + c[1][i]) + (c[2][i] + c[3][i]));
      }
      __syncthreads();  // the tile is written again
    }

    // Two heads a warp: maximum, probabilities and their unrounded sum. Places outside [first, n) weigh nothing.
    for (int h = warp * 2; h < warp * 2 + 2; ++h) {
      float m = -INFINITY;
      for (int j = first + lane; j < n; j += 32) m = fmaxf(m, smem.logits[h][j]);
      m = WarpMax(m);
      float s = 0;
      for (int j = lane; j < tiles * kTile; j += 32) {
        const float p = j >= first && j < n ? ExpOrZero(smem.logits[h][j] - m) : 0.0f;
        s += p;
        smem.probabilities[h][j] = ToBf16(p);
      }
      s = WarpSum(s);
      if (lane == 0) {
        smem.max[h] = m;
        smem.sum[h] = s;
      }
    }
    __syncthreads();

    float segment[kDimsPerWarp / 8][4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      LoadTile(list, smem, begin, tile, first, n);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kTile; k += 16) {
        uint32_t p[4];
        LoadMatrices(p, &smem.probabilities[lane % 16][tile * kTile + k + lane / 16 * 8]);
#pragma unroll
        for (int d = 0; d < kDimsPerWarp; d += 16) {
          uint32_t value[4];  // sixteen keys of two columns of eight dims
          LoadMatricesTransposed(value, &smem.keys[k + lane % 16][warp * kDimsPerWarp + d + lane / 16 * 8]);
          MultiplyAdd(segment[d / 8], p, value[0], value[1]);
          MultiplyAdd(segment[d / 8 + 1], p, value[2], value[3]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int h = lane / 4 + half * 8;
      const float new_max = fmaxf(running_max[half], smem.max[h]);
      const float a = expf(running_max[half] - new_max), b = expf(smem.max[h] - new_max);
      running_max[half] = new_max;
      running_sum[half] = running_sum[half] * a + smem.sum[h] * b;
#pragma unroll
      for (int d = 0; d < kDimsPerWarp / 8; ++d) {
        o[d][half * 2] = o[d][half * 2] * a + segment[d][half * 2] * b;
        o[d][half * 2 + 1] = o[d][half * 2 + 1] * a + segment[d][half * 2 + 1] * b;
      }
    }
    __syncthreads();  // places, logits and maxima are written again
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int h = lane / 4 + half * 8;
    if (h >= num_heads) continue;
    const float z = running_sum[half] + expf(sink[first_head + h] - running_max[half]);
#pragma unroll
    for (int d = 0; d < kDimsPerWarp / 8; ++d) {
      const int dim = warp * kDimsPerWarp + d * 8 + lane % 4 * 2;
      float a = RoundToBf16(o[d][half * 2] / z), b = RoundToBf16(o[d][half * 2 + 1] / z);
      if (dim >= kPlainDim) {
        const int64_t pair = row * 32 + (dim - kPlainDim) / 2;
        RotatePair(a, b, rope.cos[pair], -rope.sin[pair]);
      }
      *reinterpret_cast<__nv_bfloat162*>(out + (row * heads + first_head + h) * kHeadDim + dim) = {ToBf16(a),
                                                                                                   ToBf16(b)};
    }
  }
}

}  // namespace

void SparseAttention(LayerKind kind, const PassView& pass, const PageLayerLayout& page, const Bf16* q, int heads,
                     const float* sink, const Bf16* keys, SelectionView selection, RopeView rope, Bf16* out,
                     cudaStream_t stream) {
  if (pass.num_rows == 0) return;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(AttentionKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Smem));
  CUDA_CHECK(allowed);
  const dim3 grid(static_cast<unsigned>(pass.num_rows), static_cast<unsigned>((heads + kHeads - 1) / kHeads));
  AttentionKernel<<<grid, kThreads, sizeof(Smem), stream>>>(kind, pass, page, q, heads, sink, keys, selection, rope,
                                                            out);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
