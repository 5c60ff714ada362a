// SPDX-License-Identifier: Apache-2.0
// Lightning indexer: queries to FP4 codes, scores by integer dot products, exact selection.
//
// E2M1 values are halves of small integers, so a group of 32 products is an exact int32 sum (dp4a); scales are powers
// of two. Scoring is bound by the integer pipe in prefill and by the 68 bytes of each key in decode. Selection reads
// the scores of a row three times: two rounds of a 256-bin histogram find the k-th best 16-bit score, then one ordered
// compaction writes indices ascending, ties from the lowest.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_entry.cuh"
#include "engine/ops/cuda_indexer.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kScoreThreads = 256;
constexpr int kTopKThreads = 1024;

// Twice the value of an E2M1 code, in -12 .. 12.
__device__ inline int TwiceE2m1(uint32_t code) {
  const int magnitude = static_cast<int>((0xc8643210u >> (4 * (code & 7u))) & 15u);
  return (code & 8u) != 0 ? -magnitude : magnitude;
}

// One warp per (row, head).
__global__ void IndexQueryKernel(Bf16Rows q, int heads, int64_t rows, RopeView rope, int8_t* codes, float* scales) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (warp >= rows * heads) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = warp / heads;
  const uint2 raw = *reinterpret_cast<const uint2*>(q.data + row * q.ld + warp % heads * kIndexDim + lane * 4);
  LaneIndexKey x{{LowBf16(raw.x), HighBf16(raw.x), LowBf16(raw.y), HighBf16(raw.y)}};
  RotateIndex(x, lane, rope.cos + row * 32, rope.sin + row * 32);
  HadamardIndex(x, lane);
  const int exponent = IndexGroupExponent(x);
  const float inverse = PowerOfTwo(-exponent);
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    packed |= static_cast<uint32_t>(TwiceE2m1(EncodeE2m1(x.v[i] * inverse)) & 0xff) << (8 * i);
  }
  reinterpret_cast<uint32_t*>(codes)[warp * 32 + lane] = packed;
  if (lane % 8 == 0) scales[warp * 4 + lane / 8] = PowerOfTwo(exponent);
}

// Rows first .. first + gridDim.y - 1 against the keys they see; rows whose choice is everything are skipped.
__global__ void __launch_bounds__(kScoreThreads)
    IndexScoreKernel(PassView pass, PageLayerLayout page, const int8_t* q, const float* q_scales, F32Rows weights,
                     int heads, float scale, int topk, int64_t first, uint16_t* scores, int64_t max_entries) {
  extern __shared__ __align__(16) uint8_t smem[];
  const int64_t row = first + blockIdx.y;
  const int64_t n = (static_cast<int64_t>(pass.positions[row]) + 1) / 4;
  if (n <= topk || static_cast<int64_t>(blockIdx.x) * kScoreThreads >= n) return;
  int4* q_codes = reinterpret_cast<int4*>(smem);                                       // [heads][8]
  float* factors = reinterpret_cast<float*>(smem + static_cast<size_t>(heads) * 128);  // [heads][4], a quarter of it
  float* head_weights = factors + heads * 4;                                           // [heads]
  for (int i = threadIdx.x; i < heads * 8; i += kScoreThreads) {
    q_codes[i] = reinterpret_cast<const int4*>(q)[row * heads * 8 + i];
  }
  for (int i = threadIdx.x; i < heads * 4; i += kScoreThreads) factors[i] = q_scales[row * heads * 4 + i] * 0.25f;
  for (int i = threadIdx.x; i < heads; i += kScoreThreads) {
    head_weights[i] = RoundToBf16(RoundToBf16(weights.data[row * weights.ld + i]) * scale);
  }
  __syncthreads();

  const SequenceView s = pass.sequences[pass.row_sequence[row]];
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kScoreThreads + threadIdx.x; e < n;
       e += static_cast<int64_t>(gridDim.x) * kScoreThreads) {
    const uint8_t* base = pass.pages + s.block_table[e / kCsaEntriesPerPage] * pass.page_bytes;
    const int64_t in_page = e % kCsaEntriesPerPage;
    const uint4* body = reinterpret_cast<const uint4*>(base + page.index_bodies + in_page * (kIndexDim / 2));
    const uint32_t key_scales = *reinterpret_cast<const uint32_t*>(base + page.index_scales + in_page * 4);
    int key[32];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const uint4 raw = body[v];
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t packed = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            packed |= static_cast<uint32_t>(TwiceE2m1(words[w] >> (16 * half + 4 * i)) & 0xff) << (8 * i);
          }
          key[v * 8 + w * 2 + half] = static_cast<int>(packed);
        }
      }
    }
    float key_factor[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) key_factor[g] = DecodeE8m0(static_cast<uint8_t>(key_scales >> (8 * g)));
    float score = 0;
    for (int h = 0; h < heads; ++h) {
      float dot = 0;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        int sum = 0;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const int4 codes = q_codes[h * 8 + g * 2 + v];
          sum = __dp4a(codes.x, key[g * 8 + v * 4], sum);
          sum = __dp4a(codes.y, key[g * 8 + v * 4 + 1], sum);
          sum = __dp4a(codes.z, key[g * 8 + v * 4 + 2], sum);
          sum = __dp4a(codes.w, key[g * 8 + v * 4 + 3], sum);
        }
        dot = __fadd_rn(dot, __fmul_rn(static_cast<float>(sum), __fmul_rn(factors[h * 4 + g], key_factor[g])));
      }
      score = fmaf(head_weights[h], fmaxf(dot, 0.0f), score);
    }
    scores[blockIdx.y * max_entries + e] = __bfloat16_as_ushort(ToBf16(score));
  }
}

// BF16 bits to integers of the same order.
__device__ inline uint32_t OrderedBits(uint16_t bits) {
  return (bits & 0x8000u) != 0 ? static_cast<uint16_t>(~bits) : bits | 0x8000u;
}

// Exclusive prefix sums of two flags over the block, and their totals.
struct TwoCounts {
  int above, tied;
};
__device__ inline TwoCounts ExclusiveCounts(bool above, bool tied, TwoCounts* warp_counts, TwoCounts& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned above_mask = __ballot_sync(kFullWarp, above), tied_mask = __ballot_sync(kFullWarp, tied);
  if (lane == 0) warp_counts[warp] = {__popc(above_mask), __popc(tied_mask)};
  __syncthreads();
  TwoCounts before = {0, 0};
  total = {0, 0};
  for (int w = 0; w < kTopKThreads / 32; ++w) {
    const TwoCounts c = warp_counts[w];
    if (w < warp) before = {before.above + c.above, before.tied + c.tied};
    total = {total.above + c.above, total.tied + c.tied};
  }
  const unsigned lower = (1u << lane) - 1;
  return {before.above + __popc(above_mask & lower), before.tied + __popc(tied_mask & lower)};
}

// Finds the bin that holds the `wanted`-th largest of a histogram of 256 and how many are wanted inside it. One warp;
// lane 31 has the eight highest bins.
__device__ inline void FindBin(const int* histogram, int wanted, int& bin, int& wanted_inside) {
  const int lane = threadIdx.x, first = lane * 8;
  int mine = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) mine += histogram[first + i];
  int from_above = mine;  // in this lane's bins and all higher ones
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_down_sync(kFullWarp, from_above, offset);
    if (lane + offset < 32) from_above += other;
  }
  if (from_above < wanted || from_above - mine >= wanted) return;
  int left = wanted - (from_above - mine), b = first + 7;
  while (histogram[b] < left) left -= histogram[b--];
  bin = b;
  wanted_inside = left;
}

__device__ inline void SelectRow(const uint16_t* scores, int64_t n, int topk, int32_t* out) {
  __shared__ int histogram[256];
  __shared__ int bin, wanted;
  __shared__ TwoCounts warp_counts[kTopKThreads / 32];
  uint32_t threshold = 0;
  int remaining = topk;
  for (int round = 0; round < 2; ++round) {
    const int shift = round == 0 ? 8 : 0;
    for (int i = threadIdx.x; i < 256; i += kTopKThreads) histogram[i] = 0;
    __syncthreads();
    for (int64_t e = threadIdx.x; e < n; e += kTopKThreads) {
      const uint32_t bits = OrderedBits(scores[e]);
      if (round == 0 || bits >> 8 == threshold) atomicAdd(&histogram[(bits >> shift) & 255u], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) FindBin(histogram, remaining, bin, wanted);
    __syncthreads();
    threshold = threshold << 8 | static_cast<uint32_t>(bin);
    remaining = wanted;
    __syncthreads();
  }
  // `remaining` of the entries that tie with the threshold are taken, lowest first.
  int taken_above = 0, seen_tied = 0;
  for (int64_t e0 = 0; e0 < n; e0 += kTopKThreads) {
    const int64_t e = e0 + threadIdx.x;
    const uint32_t bits = e < n ? OrderedBits(scores[e]) : 0;
    const bool above = e < n && bits > threshold, tied = e < n && bits == threshold;
    TwoCounts total;
    const TwoCounts before = ExclusiveCounts(above, tied, warp_counts, total);
    const int tied_before = seen_tied + before.tied;
    if (above || (tied && tied_before < remaining)) {
      out[taken_above + before.above + min(tied_before, remaining)] = static_cast<int32_t>(e);
    }
    taken_above += total.above;
    seen_tied += total.tied;
    __syncthreads();  // warp_counts is written again
  }
}

__device__ inline void SelectOrAll(const uint16_t* scores, int64_t n, int topk, int32_t* out, int32_t* count) {
  if (threadIdx.x == 0) *count = static_cast<int32_t>(min(n, static_cast<int64_t>(topk)));
  if (n <= topk) {
    for (int64_t e = threadIdx.x; e < n; e += kTopKThreads) out[e] = static_cast<int32_t>(e);
    return;
  }
  SelectRow(scores, n, topk, out);
}

__global__ void __launch_bounds__(kTopKThreads) IndexTopKKernel(PassView pass, int64_t first, const uint16_t* scores,
                                                                int64_t max_entries, SelectionView selection) {
  const int64_t row = first + blockIdx.x;
  SelectOrAll(scores + blockIdx.x * max_entries, (static_cast<int64_t>(pass.positions[row]) + 1) / 4, selection.topk,
              selection.entries + row * selection.topk, selection.counts + row);
}

__global__ void __launch_bounds__(kTopKThreads)
    TopKKernel(const uint16_t* scores, int64_t ld, const int32_t* lengths, SelectionView selection) {
  SelectOrAll(scores + blockIdx.x * ld, lengths[blockIdx.x], selection.topk,
              selection.entries + static_cast<int64_t>(blockIdx.x) * selection.topk, selection.counts + blockIdx.x);
}

}  // namespace

void IndexSelect(const PassView& pass, const PageLayerLayout& page, Bf16Rows q, F32Rows weights, int heads,
                 RopeView rope, const IndexWorkspace& workspace, SelectionView selection, cudaStream_t stream) {
  if (pass.num_rows == 0) return;
  IndexQueryKernel<<<static_cast<unsigned>((pass.num_rows * heads + 7) / 8), 256, 0, stream>>>(
      q, heads, pass.num_rows, rope, workspace.q, workspace.q_scales);
  CUDA_CHECK(cudaGetLastError());
  const float scale = static_cast<float>(1.0 / sqrt(static_cast<double>(kIndexDim)) / sqrt(static_cast<double>(heads)));
  // Enough blocks for the longest sequence there can be, up to a few per multiprocessor; more keys are a loop.
  const int64_t blocks = (workspace.max_entries + kScoreThreads - 1) / kScoreThreads;
  for (int64_t first = 0; first < pass.num_rows; first += workspace.tile_rows) {
    const int64_t rows = std::min(workspace.tile_rows, pass.num_rows - first);
    const int64_t most = std::max<int64_t>(1, 1024 / rows);
    const dim3 grid(static_cast<unsigned>(std::min(blocks, most)), static_cast<unsigned>(rows));
    IndexScoreKernel<<<grid, kScoreThreads, static_cast<size_t>(heads) * (128 + 16 + 4), stream>>>(
        pass, page, workspace.q, workspace.q_scales, weights, heads, scale, selection.topk, first, workspace.scores,
        workspace.max_entries);
    CUDA_CHECK(cudaGetLastError());
    IndexTopKKernel<<<static_cast<unsigned>(rows), kTopKThreads, 0, stream>>>(pass, first, workspace.scores,
                                                                              workspace.max_entries, selection);
    CUDA_CHECK(cudaGetLastError());
  }
}

void TopK(const uint16_t* scores, int64_t ld, const int32_t* lengths, int64_t rows, SelectionView selection,
          cudaStream_t stream) {
  if (rows == 0) return;
  TopKKernel<<<static_cast<unsigned>(rows), kTopKThreads, 0, stream>>>(scores, ld, lengths, selection);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
