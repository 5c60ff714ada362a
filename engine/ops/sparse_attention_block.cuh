// SPDX-License-Identifier: Apache-2.0
// What a block of the attention core is made of: its shared memory, the list of a row's places and which of them a walk
// visits, the merge of chunks, and where keys come from. For sparse_attention_cuda.cu, which says what it does with
// them.
#pragma once

#include "engine/ops/cuda_entry.cuh"
#include "engine/ops/cuda_sparse_attention.h"
#include "engine/ops/sm90.cuh"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kHeads = kAttentionHeads, kChunk = kAttentionChunk;
constexpr int kSegment = 18;  // chunks
constexpr int kWindowChunks = kWindow / kChunk;
constexpr int kEntryBody = kPlainDim + 2 * kRopeDim;
constexpr int kPieces = kHeadDim / 8;          // of a key, eight values or 16 bytes of BF16 each
constexpr int kPlainPieces = kPlainDim / 8;    // of them from E4M3
constexpr int kKeysPerWarp = kChunk / kWarps;  // fetched and widened
// Logits: 2 halves of the heads x 2 halves of the keys x 4 parts of the dims.
constexpr int kParts = 4, kPartDims = kHeadDim / kParts, kPartKeys = 32, kPartHeads = 16;
static_assert(kHeads / kPartHeads * (kChunk / kPartKeys) * kParts == kWarps);
constexpr int kHeadsPerWarp = kHeads / kWarps;   // of the softmax
constexpr int kDimsPerWarp = kHeadDim / kWarps;  // of the values
constexpr int kKeyStride = kHeadDim + 8;         // BF16 values; likewise below
constexpr int kLogitStride = kChunk + 8, kProbabilityStride = kChunk + 8;

struct Smem {
  alignas(16) Bf16 keys[2][kChunk][kKeyStride];
  alignas(16) uint8_t bodies[kChunk][kEntryBody];
  alignas(16) uint8_t scales[kChunk][8];
  alignas(16) float logits[kParts][kHeads][kLogitStride];
  alignas(16) Bf16 probabilities[kHeads][kProbabilityStride];
  float keep[kHeads], add[kHeads];  // of the merge: factors of what is there and of the chunk
  float normaliser[kHeads];
};
static_assert(sizeof(Smem) <= 227 << 10, "one block a multiprocessor");

// What a row attends to: places [masked, places), places below kWindow are window slots.
struct RowList {
  int places, masked;
  __device__ int first_chunk() const { return masked / kChunk; }
  __device__ int chunks() const { return (places + kChunk - 1) / kChunk; }
};

__device__ inline RowList ListOf(LayerKind kind, int position, const SelectionView& selection, int64_t row) {
  const int entries = kind == LayerKind::kWindow ? 0
                      : kind == LayerKind::kCsa  ? selection.counts[row]
                                                 : (position + 1) / 128;
  return {kWindow + entries, max(kWindow - 1 - position, 0)};
}

// What a launch does with the chunks of a list: everything, or one of the two walks of a list that is split.
enum class Walk { kWhole, kMaxima, kValues };

// Unmerged chunks of a pass whose lists are split.
struct Partials {
  float* values;         // [rows, heads, chunks, 512]
  float *maxima, *sums;  // [rows, heads, chunks]
  int chunks;            // of the longest list there can be
};

// A block's way through a list: chunks apart by `step`, or, whole, each segment's for its maximum and then for its
// values.
struct Step {
  int chunk;
  bool values;
};
__device__ inline Step Next(const RowList& list, Walk walk, int step, Step s) {
  if (walk != Walk::kWhole) return {s.chunk + step, s.values};
  const int begin = s.chunk / kSegment * kSegment, end = min(begin + kSegment, list.chunks());
  if (s.chunk + 1 < end) return {s.chunk + 1, s.values};
  if (s.values) return {end, false};
  return {max(begin, list.first_chunk()), true};
}

// The state of one head. Roundings are spelled out: the compiler must not fuse in one kernel what it does not in the
// other.
struct Running {
  float max = -INFINITY, sum = 0;
};
struct MergeFactors {
  float keep, add;
};
__device__ inline MergeFactors Merge(Running& r, float max, float sum) {
  const float new_max = fmaxf(r.max, max);
  const MergeFactors f{expf(__fsub_rn(r.max, new_max)), expf(__fsub_rn(max, new_max))};
  r.max = new_max;
  r.sum = __fmaf_rn(r.sum, f.keep, __fmul_rn(sum, f.add));
  return f;
}
__device__ inline float MergeValue(float o, float keep, float value, float add) {
  return __fmaf_rn(o, keep, __fmul_rn(value, add));
}
__device__ inline float Normaliser(const Running& r, float sink) {
  return __fadd_rn(r.sum, expf(__fsub_rn(sink, r.max)));
}
// Dims `dim` and the next of one head of `row`; `out` is where that head begins.
__device__ inline void StorePair(float a, float b, float normaliser, int dim, int64_t row, const RopeView& rope,
                                 Bf16* out) {
  a = RoundToBf16(__fdiv_rn(a, normaliser));
  b = RoundToBf16(__fdiv_rn(b, normaliser));
  if (dim >= kPlainDim) {
    const int64_t pair = row * (kRopeDim / 2) + (dim - kPlainDim) / 2;
    RotatePair(a, b, rope.cos[pair], -rope.sin[pair]);
  }
  *reinterpret_cast<__nv_bfloat162*>(out + dim) = {ToBf16(a), ToBf16(b)};
}

// Where the keys of one row lie and how they come to shared memory. Each warp answers for its own keys of a chunk,
// places kKeysPerWarp * warp and on; lane i looks up key i % kKeysPerWarp.
struct KeySource {
  RowList list;
  const Bf16* window;       // key of position - 127; rows before the sequence are not read
  const int32_t* selected;  // null: every entry in turn
  const int32_t* block_table;
  const uint8_t* pages;
  int64_t page_bytes, bodies, scales;
  int page_shift;  // log2 of a page's entries

  // The lane's entry of `chunk`; -1: none. Loaded long before Place needs it.
  __device__ int Entry(int chunk) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int place = chunk * kChunk + warp * kKeysPerWarp + lane % kKeysPerWarp;
    if (chunk < kWindowChunks || place >= list.places) return -1;
    return selected != nullptr ? selected[place - kWindow] : place - kWindow;
  }
  // Its place in the pool: page * entries per page + index in the page; -1: none.
  __device__ int Place(int entry) const {
    if (entry < 0) return -1;
    return (block_table[entry >> page_shift] << page_shift) + (entry & ((1 << page_shift) - 1));
  }
  // Begins to copy `chunk`, whose places the lanes hold. Window keys to `keys`, what lies before the sequence as zeros.
  __device__ void Fetch(int chunk, int lane_place, Bf16 (*keys)[kKeyStride], Smem& smem) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (chunk >= list.chunks()) return;
#pragma unroll
    for (int i = 0; i < kKeysPerWarp; ++i) {
      const int key = warp * kKeysPerWarp + i;
      if (chunk < kWindowChunks) {
        const int slot = chunk * kChunk + key;
        uint4* to = reinterpret_cast<uint4*>(keys[key]);
        const uint4* from = reinterpret_cast<const uint4*>(window) + static_cast<int64_t>(slot) * kPieces;
#pragma unroll
        for (int piece = lane; piece < kPieces; piece += 32) {
          if (slot >= list.masked) {
            sm90::Copy16(to + piece, from + piece);
          } else {
            to[piece] = {0, 0, 0, 0};
          }
        }
        continue;
      }
      const int place = __shfl_sync(kFullWarp, lane_place, i);
      if (place < 0) continue;
      const uint8_t* page = pages + (place >> page_shift) * page_bytes;
      const int in_page = place & ((1 << page_shift) - 1);
      const uint8_t* body = page + bodies + in_page * kEntryBody;
      sm90::Copy16(smem.bodies[key] + lane * 16, body + lane * 16);
      if (lane < kEntryBody / 16 - 32) sm90::Copy16(smem.bodies[key] + (32 + lane) * 16, body + (32 + lane) * 16);
      if (lane == 31) sm90::Copy8(smem.scales[key], page + scales + in_page * 8);
    }
  }
};

// The warp's keys of a chunk of entries, from `bodies` to `keys`; places past the list become zeros.
__device__ inline void WidenKeys(const RowList& list, int chunk, Bf16 (*keys)[kKeyStride], const Smem& smem) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kKeysPerWarp; ++i) {
    const int key = warp * kKeysPerWarp + i;
    const bool exists = chunk * kChunk + key < list.places;
#pragma unroll
    for (int piece = lane; piece < kPieces; piece += 32) {
      uint4 v = {0, 0, 0, 0};
      if (exists && piece < kPlainPieces) {
        const uint2 codes = *reinterpret_cast<const uint2*>(smem.bodies[key] + piece * 8);
        const float scale = DecodeE8m0(smem.scales[key][piece / 8]);
        float x[8];
        WidenE4m3(codes.x, x);
        WidenE4m3(codes.y, x + 4);
        v = {ExactBf16Pair(x[0] * scale, x[1] * scale), ExactBf16Pair(x[2] * scale, x[3] * scale),
             ExactBf16Pair(x[4] * scale, x[5] * scale), ExactBf16Pair(x[6] * scale, x[7] * scale)};
      } else if (exists) {
        v = *reinterpret_cast<const uint4*>(smem.bodies[key] + kPlainDim + (piece - kPlainPieces) * 16);
      }
      *reinterpret_cast<uint4*>(keys[key] + piece * 8) = v;
    }
  }
}

}  // namespace
}  // namespace millrace::cuda
