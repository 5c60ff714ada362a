// SPDX-License-Identifier: Apache-2.0
// Attention core: one block per (row, group of heads), no tensor cores yet.
//
// The list of a row is its 128 window slots, oldest first, then its entries ascending; a segment is 1,152 places of
// that list. A segment keeps its logits in shared memory, so that probabilities are rounded relative to the segment's
// own maximum, and segments merge in ascending order: the list, and so the bits, depend on the row's position only.
// Logits: one warp a key, queries in registers. Values: two dims a thread, all keys in order. Each key is read twice,
// from the window's BF16 rows or as stored; the FP32 pipe is the bound.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_entry.cuh"
#include "engine/ops/cuda_sparse_attention.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSegment = 18 * 64;

struct ListView {
  LayerKind kind;
  const PassView& pass;
  const PageLayerLayout& page;
  const SequenceView& sequence;
  const Bf16* window;      // key of position - 127; rows before the sequence are not read
  const int32_t* entries;  // selected, or null: entry i is i
};

struct KeyAddress {
  const Bf16* row;  // a window key, or null
  const uint8_t* body;
  const uint8_t* scales;
};

__device__ inline KeyAddress FindKey(const ListView& list, int64_t place) {
  if (place < kWindow) return {list.window + place * kHeadDim, nullptr, nullptr};
  const int64_t i = place - kWindow, entry = list.entries == nullptr ? i : list.entries[i];
  const int64_t per_page = list.page.entries, in_page = entry % per_page;
  const uint8_t* base = list.pass.pages + list.sequence.block_table[entry / per_page] * list.pass.page_bytes;
  return {nullptr, base + list.page.bodies + in_page * (kPlainDim + 2 * kRopeDim),
          base + list.page.scales + in_page * 8};
}

// Values at dims 2 * threadIdx.x and the next.
__device__ inline float2 LoadTwoDims(const KeyAddress& key) {
  const int dim = static_cast<int>(threadIdx.x) * 2;
  uint32_t pair;
  if (key.row != nullptr) {
    pair = *reinterpret_cast<const uint32_t*>(key.row + dim);
  } else if (dim >= kPlainDim) {
    pair = *reinterpret_cast<const uint32_t*>(key.body + kPlainDim + (dim - kPlainDim) * 2);
  } else {
    const float2 wide = WidenE4m3Pair(*reinterpret_cast<const uint16_t*>(key.body + dim));
    const float scale = DecodeE8m0(key.scales[dim / 64]);
    return {wide.x * scale, wide.y * scale};
  }
  return {LowBf16(pair), HighBf16(pair)};
}

// kHeads partial sums a lane to kHeads sums over the warp: halves of the heads change sides until each lane has one,
// which is then summed. Returns the sum of head lane / (32 / kHeads).
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
__global__ void __launch_bounds__(kThreads, 1)
    AttentionKernel(LayerKind kind, PassView pass, PageLayerLayout page, const Bf16* q, int heads, const float* sink,
                    const Bf16* keys, SelectionView selection, RopeView rope, Bf16* out) {
  __shared__ __align__(16) float logits[kSegment][kHeads];
  __shared__ float segment_max[kHeads], segment_sum[kHeads];
  const int64_t row = blockIdx.x;
  const int first_head = static_cast<int>(blockIdx.y) * kHeads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t position = pass.positions[row], sequence_index = pass.row_sequence[row];
  const SequenceView sequence = pass.sequences[sequence_index];
  const ListView list{kind,
                      pass,
                      page,
                      sequence,
                      keys + WindowRow(sequence, sequence_index, position - (kWindow - 1)) * kHeadDim,
                      kind == LayerKind::kCsa ? selection.entries + row * selection.topk : nullptr};
  const int64_t entries = kind == LayerKind::kWindow ? 0
                          : kind == LayerKind::kCsa  ? selection.counts[row]
                                                     : (position + 1) / 128;
  const int64_t places = kWindow + entries;
  const int64_t masked = position < kWindow - 1 ? kWindow - 1 - position : 0;  // slots before the sequence

  LaneEntry query[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) LoadBf16Row(q + (row * heads + first_head + h) * kHeadDim, lane, query[h]);

  float max[kHeads], sum[kHeads], o[kHeads][2];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    max[h] = -INFINITY;
    sum[h] = o[h][0] = o[h][1] = 0;
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(kHeadDim));

  for (int64_t begin = 0; begin < places; begin += kSegment) {
    const int n = static_cast<int>(min(static_cast<int64_t>(kSegment), places - begin));
    const int first = begin == 0 ? static_cast<int>(masked) : 0;
    for (int j = first + warp; j < n; j += kWarps) {
      const KeyAddress at = FindKey(list, begin + j);
      LaneEntry key;
      if (at.row != nullptr) {
        LoadBf16Row(at.row, lane, key);
      } else {
        LoadEntry(at.body, at.scales, lane, key);
      }
      float dot[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        dot[h] = 0;
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) dot[h] = fmaf(query[h].v[i], key.v[i], dot[h]);
      }
      const float total = ReduceHeads<kHeads>(dot, lane);
      if (lane % (32 / kHeads) == 0) logits[j][lane / (32 / kHeads)] = scale * total;
    }
    __syncthreads();
    // One warp a head: maximum, probabilities (rounded in place) and their unrounded sum.
    for (int h = warp; h < kHeads; h += kWarps) {
      float m = -INFINITY;
      for (int j = first + lane; j < n; j += 32) m = fmaxf(m, logits[j][h]);
      m = WarpMax(m);
      float s = 0;
      for (int j = first + lane; j < n; j += 32) {
        const float p = ExpOrZero(logits[j][h] - m);
        s += p;
        logits[j][h] = RoundToBf16(p);
      }
      s = WarpSum(s);
      if (lane == 0) {
        segment_max[h] = m;
        segment_sum[h] = s;
      }
    }
    __syncthreads();
    float segment[kHeads][2] = {};
    for (int j = first; j < n; ++j) {
      const float2 value = LoadTwoDims(FindKey(list, begin + j));
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        segment[h][0] = fmaf(logits[j][h], value.x, segment[h][0]);
        segment[h][1] = fmaf(logits[j][h], value.y, segment[h][1]);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float new_max = fmaxf(max[h], segment_max[h]);
      const float a = expf(max[h] - new_max), b = expf(segment_max[h] - new_max);
      max[h] = new_max;
      sum[h] = sum[h] * a + segment_sum[h] * b;
      o[h][0] = o[h][0] * a + segment[h][0] * b;
      o[h][1] = o[h][1] * a + segment[h][1] * b;
    }
    __syncthreads();  // logits are written again
  }

  const int dim = static_cast<int>(threadIdx.x) * 2;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float z = sum[h] + expf(sink[first_head + h] - max[h]);
    float a = RoundToBf16(o[h][0] / z), b = RoundToBf16(o[h][1] / z);
    if (dim >= kPlainDim) {
      const int64_t pair = row * 32 + (dim - kPlainDim) / 2;
      RotatePair(a, b, rope.cos[pair], -rope.sin[pair]);
    }
    *reinterpret_cast<__nv_bfloat162*>(out + (row * heads + first_head + h) * kHeadDim + dim) = {ToBf16(a), ToBf16(b)};
  }
}

}  // namespace

void SparseAttention(LayerKind kind, const PassView& pass, const PageLayerLayout& page, const Bf16* q, int heads,
                     const float* sink, const Bf16* keys, SelectionView selection, RopeView rope, Bf16* out,
                     cudaStream_t stream) {
  if (pass.num_rows == 0) return;
  CHECK(heads % 4 == 0, "attention heads come in fours");
  const auto launch = [&](auto kernel, int group) {
    const dim3 grid(static_cast<unsigned>(pass.num_rows), static_cast<unsigned>(heads / group));
    kernel<<<grid, kThreads, 0, stream>>>(kind, pass, page, q, heads, sink, keys, selection, rope, out);
    CUDA_CHECK(cudaGetLastError());
  };
  if (heads % 8 == 0) {
    launch(AttentionKernel<8>, 8);
  } else {
    launch(AttentionKernel<4>, 4);
  }
}

}  // namespace millrace::cuda
