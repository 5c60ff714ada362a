// SPDX-License-Identifier: Apache-2.0
// Attention core: one block per (row, group of heads), no tensor cores yet.
//
// The list of a row is its 128 window slots, oldest first, then its entries ascending; a segment is 1,152 places of
// that list. A segment keeps its logits in shared memory, so that probabilities are rounded relative to the segment's
// own maximum, and segments merge in ascending order: the list, and so the bits, depend on the row's position only.
//
// Logits: one warp a key, four keys in flight, queries in registers. Values: a quarter of the block takes every fourth
// place, eight dims a thread and eight keys in flight; the quarters are added in order. How many heads share a block
// changes no sum. Each key is read twice, from the window's BF16 rows or as stored. Bound: latency for few rows, the
// FP32 pipe for many.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_entry.cuh"
#include "engine/ops/cuda_sparse_attention.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSegment = 18 * 64;
constexpr int kQuarters = 4, kQuarterThreads = kThreads / kQuarters;
constexpr int kThreadDims = kHeadDim / kQuarterThreads;  // 8
constexpr int kEntryBody = kPlainDim + 2 * kRopeDim;

// Where the keys of one row lie. `places` (shared memory) names the entries of the current segment.
struct KeyList {
  const Bf16* window;  // key of position - 127; rows before the sequence are not read
  const uint8_t* pages;
  int64_t page_bytes, bodies, scales;
  int per_page;
  const uint32_t* places;  // page * per_page + index in the page
};

struct EntryAddress {
  const uint8_t* body;
  const uint8_t* scales;
};
__device__ inline EntryAddress FindEntry(const KeyList& list, int j) {
  const uint32_t at = list.places[j], in_page = at % list.per_page;
  const uint8_t* page = list.pages + at / list.per_page * list.page_bytes;
  return {page + list.bodies + in_page * kEntryBody, page + list.scales + in_page * 8};
}

// Sixteen consecutive values as loaded: BF16 in both words, or E4M3 in the first with its scale.
struct RawKey {
  uint4 a, b;
  float scale;  // 0: BF16
};
__device__ inline RawKey LoadRawKey(const KeyList& list, bool in_window, int64_t place, int j, int lane) {
  RawKey raw;
  const uint4* at;
  raw.scale = 0;
  if (in_window) {
    at = reinterpret_cast<const uint4*>(list.window + place * kHeadDim + lane * kLaneDims);
  } else {
    const EntryAddress entry = FindEntry(list, j);
    if (lane < kFirstRopeLane) {
      raw.a = *reinterpret_cast<const uint4*>(entry.body + lane * kLaneDims);
      raw.scale = DecodeE8m0(entry.scales[lane / 4]);
      return raw;
    }
    at = reinterpret_cast<const uint4*>(entry.body + kPlainDim + (lane - kFirstRopeLane) * kLaneDims * 2);
  }
  raw.a = at[0];
  raw.b = at[1];
  return raw;
}
__device__ inline void WidenRawKey(const RawKey& raw, LaneEntry& e) {
  const uint32_t words[8] = {raw.a.x, raw.a.y, raw.a.z, raw.a.w, raw.b.x, raw.b.y, raw.b.z, raw.b.w};
  if (raw.scale == 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      e.v[2 * i] = LowBf16(words[i]);
      e.v[2 * i + 1] = HighBf16(words[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) WidenE4m3(words[i], e.v + 4 * i);
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) e.v[i] *= raw.scale;
}

// Eight consecutive values, the same way.
struct RawValues {
  uint4 a;
  float scale;
};
__device__ inline RawValues LoadRawValues(const KeyList& list, bool in_window, int64_t place, int j, int dim) {
  RawValues raw;
  raw.scale = 0;
  if (in_window) {
    raw.a = *reinterpret_cast<const uint4*>(list.window + place * kHeadDim + dim);
    return raw;
  }
  const EntryAddress entry = FindEntry(list, j);
  if (dim >= kPlainDim) {
    raw.a = *reinterpret_cast<const uint4*>(entry.body + kPlainDim + (dim - kPlainDim) * 2);
    return raw;
  }
  const uint2 codes = *reinterpret_cast<const uint2*>(entry.body + dim);
  raw.a = {codes.x, codes.y, 0, 0};
  raw.scale = DecodeE8m0(entry.scales[dim / 64]);
  return raw;
}
__device__ inline void WidenRawValues(const RawValues& raw, float* v) {
  if (raw.scale != 0) {
    WidenE4m3(raw.a.x, v);
    WidenE4m3(raw.a.y, v + 4);
#pragma unroll
    for (int i = 0; i < kThreadDims; ++i) v[i] *= raw.scale;
    return;
  }
  const uint32_t words[4] = {raw.a.x, raw.a.y, raw.a.z, raw.a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = LowBf16(words[i]);
    v[2 * i + 1] = HighBf16(words[i]);
  }
}

// kHeads partial sums a lane to kHeads sums over the warp: halves of the heads change sides until each lane has one,
// which is then summed. Returns the sum of head lane / (32 / kHeads). The tree is one for every kHeads.
template <int kHeads>
__device__ inline float ReduceHeads(float (&x)[kHeads], int lane) {
  int distance = 16;
#pragma unroll
  for (int n = kHeads / 2; n > 0; n /= 2, distance /= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, upper ? x[i] : x[i + n], distance);
      x[i] = (upper ? x[i + n] : x[i]) + other;
    }
  }
  for (; distance > 0; distance /= 2) x[0] += __shfl_xor_sync(kFullWarp, x[0], distance);
  return x[0];
}

template <int kHeads>
struct AttentionSmem {
  union {
    float logits[kSegment][kHeads];               // then probabilities
    float quarters[kQuarters][kHeads][kHeadDim];  // sums of the segment's values, once probabilities are used
  };
  uint32_t places[kSegment];
  float max[kHeads], sum[kHeads];
};

template <int kHeads>
__global__ void __launch_bounds__(kThreads)
    AttentionKernel(LayerKind kind, PassView pass, PageLayerLayout page, const Bf16* q, int heads, const float* sink,
                    const Bf16* keys, SelectionView selection, RopeView rope, Bf16* out) {
  __shared__ __align__(16) AttentionSmem<kHeads> smem;
  const int64_t row = blockIdx.x;
  const int first_head = static_cast<int>(blockIdx.y) * kHeads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t position = pass.positions[row], sequence_index = pass.row_sequence[row];
  const SequenceView sequence = pass.sequences[sequence_index];
  const KeyList list{keys + WindowRow(sequence, sequence_index, position - (kWindow - 1)) * kHeadDim,
                     pass.pages,
                     pass.page_bytes,
                     page.bodies,
                     page.scales,
                     page.entries,
                     smem.places};
  const int64_t entries = kind == LayerKind::kWindow ? 0
                          : kind == LayerKind::kCsa  ? selection.counts[row]
                                                     : (position + 1) / 128;
  const int64_t places = kWindow + entries;
  const int masked = position < kWindow - 1 ? static_cast<int>(kWindow - 1 - position) : 0;  // before the sequence
  const float scale = 1.0f / sqrtf(static_cast<float>(kHeadDim));

  const int dim = static_cast<int>(threadIdx.x) * 2;  // of the sums this thread keeps across segments
  float running_max[kHeads], running_sum[kHeads], o[kHeads][2];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    running_max[h] = -INFINITY;
    running_sum[h] = o[h][0] = o[h][1] = 0;
  }

  for (int64_t begin = 0; begin < places; begin += kSegment) {
    const int n = static_cast<int>(min(static_cast<int64_t>(kSegment), places - begin));
    const int first = begin == 0 ? masked : 0;
    const int window_end = begin == 0 ? kWindow : 0;  // places of this segment that are the window's
    for (int j = window_end + static_cast<int>(threadIdx.x); j < n; j += kThreads) {
      const int64_t i = begin + j - kWindow;
      const int64_t entry = kind == LayerKind::kCsa ? selection.entries[row * selection.topk + i] : i;
      smem.places[j] = static_cast<uint32_t>(sequence.block_table[entry / page.entries]) * page.entries +
                       static_cast<uint32_t>(entry % page.entries);
    }
    LaneEntry query[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) LoadBf16Row(q + (row * heads + first_head + h) * kHeadDim, lane, query[h]);
    __syncthreads();

    constexpr int kInFlight = 4;
    for (int j0 = first + warp * kInFlight; j0 < n; j0 += kWarps * kInFlight) {
      RawKey raw[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int j = min(j0 + i, n - 1);
        raw[i] = LoadRawKey(list, j < window_end, begin + j, j, lane);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        LaneEntry key;
        WidenRawKey(raw[i], key);
        float dot[kHeads];
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          dot[h] = 0;
#pragma unroll
          for (int d = 0; d < kLaneDims; ++d) dot[h] = fmaf(query[h].v[d], key.v[d], dot[h]);
        }
        const float total = ReduceHeads<kHeads>(dot, lane);
        if (j0 + i < n && lane % (32 / kHeads) == 0) smem.logits[j0 + i][lane / (32 / kHeads)] = scale * total;
      }
    }
    __syncthreads();
    // One warp a head: maximum, probabilities (rounded in place) and their unrounded sum.
    if (warp < kHeads) {
      const int h = warp;
      float m = -INFINITY;
      for (int j = first + lane; j < n; j += 32) m = fmaxf(m, smem.logits[j][h]);
      m = WarpMax(m);
      float s = 0;
      for (int j = first + lane; j < n; j += 32) {
        const float p = ExpOrZero(smem.logits[j][h] - m);
        s += p;
        smem.logits[j][h] = RoundToBf16(p);
      }
      s = WarpSum(s);
      if (lane == 0) {
        smem.max[h] = m;
        smem.sum[h] = s;
      }
    }
    __syncthreads();

    // A place belongs to a quarter by its index in the list, so that a mask shifts nothing.
    const int quarter = static_cast<int>(threadIdx.x) / kQuarterThreads;
    const int quarter_dim = static_cast<int>(threadIdx.x) % kQuarterThreads * kThreadDims;
    float segment[kHeads][kThreadDims] = {};
    constexpr int kValuesInFlight = 8;
    for (int j0 = quarter; j0 < n; j0 += kQuarters * kValuesInFlight) {
      RawValues raw[kValuesInFlight];
#pragma unroll
      for (int i = 0; i < kValuesInFlight; ++i) {
        const int j = max(min(j0 + i * kQuarters, n - 1), first);
        raw[i] = LoadRawValues(list, j < window_end, begin + j, j, quarter_dim);
      }
#pragma unroll
      for (int i = 0; i < kValuesInFlight; ++i) {
        const int j = j0 + i * kQuarters;
        if (j < first || j >= n) continue;
        float v[kThreadDims];
        WidenRawValues(raw[i], v);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float p = smem.logits[j][h];
#pragma unroll
          for (int d = 0; d < kThreadDims; ++d) segment[h][d] = fmaf(p, v[d], segment[h][d]);
        }
      }
    }
    __syncthreads();  // probabilities have been used: their memory takes the quarters
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float4* to = reinterpret_cast<float4*>(&smem.quarters[quarter][h][quarter_dim]);
      to[0] = {segment[h][0], segment[h][1], segment[h][2], segment[h][3]};
      to[1] = {segment[h][4], segment[h][5], segment[h][6], segment[h][7]};
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float new_max = fmaxf(running_max[h], smem.max[h]);
      const float a = expf(running_max[h] - new_max), b = expf(smem.max[h] - new_max);
      running_max[h] = new_max;
      running_sum[h] = running_sum[h] * a + smem.sum[h] * b;
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        float total = smem.quarters[0][h][dim + d];
#pragma unroll
        for (int k = 1; k < kQuarters; ++k) total += smem.quarters[k][h][dim + d];
        o[h][d] = o[h][d] * a + total * b;
      }
    }
    __syncthreads();  // logits and places are written again
  }

#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float z = running_sum[h] + expf(sink[first_head + h] - running_max[h]);
    float a = RoundToBf16(o[h][0] / z), b = RoundToBf16(o[h][1] / z);
    if (dim >= kPlainDim) {
      const int64_t pair = row * 32 + (dim - kPlainDim) / 2;
      RotatePair(a, b, rope.cos[pair], -rope.sin[pair]);
    }
    *reinterpret_cast<__nv_bfloat162*>(out + (row * heads + first_head + h) * kHeadDim + dim) = {ToBf16(a), ToBf16(b)};
  }
}

// Heads that share a block: four read keys less often, two fill the card with few rows.
int ChooseHeads(int64_t rows, int heads) { return rows * heads / 4 >= 132 ? 4 : 2; }

}  // namespace

void SparseAttention(LayerKind kind, const PassView& pass, const PageLayerLayout& page, const Bf16* q, int heads,
                     const float* sink, const Bf16* keys, SelectionView selection, RopeView rope, Bf16* out,
                     cudaStream_t stream) {
  if (pass.num_rows == 0) return;
  CHECK(heads % 4 == 0, "an engine checks this when it is made");
  const auto launch = [&](auto kernel, int group) {
    const dim3 grid(static_cast<unsigned>(pass.num_rows), static_cast<unsigned>(heads / group));
    kernel<<<grid, kThreads, 0, stream>>>(kind, pass, page, q, heads, sink, keys, selection, rope, out);
    CUDA_CHECK(cudaGetLastError());
  };
  if (ChooseHeads(pass.num_rows, heads) == 4) {
    launch(AttentionKernel<4>, 4);
  } else {
    launch(AttentionKernel<2>, 2);
  }
}

}  // namespace millrace::cuda
