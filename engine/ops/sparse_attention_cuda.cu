// SPDX-License-Identifier: Apache-2.0
// Attention core on tensor cores: one block per (row, 32 heads), BF16 products summed in FP32.
//
// The list of a row is its 128 window slots, oldest first, then its entries ascending, in chunks of 64 places; a
// segment is 18 chunks. A segment is walked twice: first for its logits' maximum, then chunk by chunk for logits again,
// probabilities relative to the segment's maximum, rounded to BF16 (docs/adr/0003-segment-maximum.md), their unrounded
// sum, and values from zero. Keeping the logits would take more shared memory than there is, beside keys for 32 heads.
// Chunks merge in ascending order (Merge), those wholly before the sequence are not visited. Everything is cut by place
// in the list, so the bits depend on the row's list only, whatever else is in the pass. Where rows are few
// (SparseAttentionGroups) a block takes only some of the chunks: one launch leaves each chunk's maximum in the
// workspace, a second its sum and values, and CombineKernel merges them by the same functions: the same bits again.
//
// A block has 16 warps. The next chunk's bytes come by cp.async while this one's products run, four keys a warp: window
// keys are BF16 already and go where the products read them; entries go to `bodies`, whence the same warp widens them.
// For logits a warp has 16 heads x 32 keys x 128 dims, its part of the queries in registers all along, since reading
// them again for each chunk would cost more shared memory traffic than the keys; four such parts of the dims make a
// logit. The softmax has two heads a warp, which keeps their running maximum and sum. For values a warp has all heads x
// 32 dims. Keys lie in one of two buffers, so that three barriers a chunk suffice: keys are there, parts of logits are
// there, probabilities are there. Rows in shared memory are padded so that neither ldmatrix nor the parts of logits
// meet a bank twice.
//
// Bound, by count and not by profile, in cycles of shared memory a chunk: each walk 1,600 for logits (keys 1,000, parts
// 600) and 800 to widen, the second 1,000 more for values; the products themselves would take half of that.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_entry.cuh"
#include "engine/ops/cuda_sparse_attention.h"
#include "engine/ops/sm90.cuh"
#include "engine/status.h"

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

// In a product's result, a lane has rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and the next.
__global__ void __launch_bounds__(kThreads, 1)
    AttentionKernel(LayerKind kind, PassView pass, PageLayerLayout page, const Bf16* q, int heads, const float* sink,
                    const Bf16* window_keys, SelectionView selection, RopeView rope, Walk walk, Partials partials,
                    Bf16* out) {
  extern __shared__ __align__(16) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  const int64_t row = blockIdx.x;
  const int first_head = static_cast<int>(blockIdx.y) * kHeads, num_heads = min(kHeads, heads - first_head);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, apart = static_cast<int>(gridDim.z);
  const int position = pass.positions[row], sequence_index = pass.row_sequence[row];
  const RowList list = ListOf(kind, position, selection, row);
  Step step{list.first_chunk() + static_cast<int>(blockIdx.z), walk == Walk::kValues};
  if (step.chunk >= list.chunks()) return;
  const SequenceView& sequence = pass.sequences[sequence_index];
  const KeySource source{list,
                         window_keys + WindowRow(sequence, sequence_index, position - (kWindow - 1)) * kHeadDim,
                         kind == LayerKind::kCsa ? selection.entries + row * selection.topk : nullptr,
                         sequence.block_table,
                         pass.pages,
                         pass.page_bytes,
                         page.bodies,
                         page.scales,
                         page.entries > 0 ? 31 - __clz(page.entries) : 0};

  // This warp's part of the queries, heads that do not exist as zeros. Asked for before keys, whose places take two
  // loads.
  const int logit_heads = warp / (kWarps / 2) * kPartHeads, logit_keys = warp / kParts % 2 * kPartKeys,
            part = warp % kParts;
  uint32_t query[kPartDims / 16][4];
#pragma unroll
  for (int k = 0; k < kPartDims / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = logit_heads + lane / 4 + i % 2 * 8, dim = part * kPartDims + k * 16 + i / 2 * 8 + lane % 4 * 2;
      query[k][i] =
          h < num_heads ? *reinterpret_cast<const uint32_t*>(q + (row * heads + first_head + h) * kHeadDim + dim) : 0;
    }
  }

  // Look-ups run ahead of copies: an entry two chunks, its place one.
  source.Fetch(step.chunk, source.Place(source.Entry(step.chunk)), smem.keys[0], smem);
  Step ahead = Next(list, walk, apart, step);
  int entry = source.Entry(ahead.chunk), place = source.Place(entry);
  ahead = Next(list, walk, apart, ahead);
  entry = source.Entry(ahead.chunk);

  Running running[kHeadsPerWarp];
  float segment_max[kHeadsPerWarp] = {-INFINITY, -INFINITY};
  static_assert(kHeadsPerWarp == 2);
  float o[kHeads / 16][kDimsPerWarp / 8][4] = {};
  for (int buffer = 0; step.chunk < list.chunks(); step = Next(list, walk, apart, step), buffer ^= 1) {
    const int chunk = step.chunk;
    sm90::WaitForCopies();
    __syncwarp();
    if (chunk >= kWindowChunks) WidenKeys(list, chunk, smem.keys[buffer], smem);
    __syncthreads();  // this chunk's keys are there; nobody reads the last one's
    source.Fetch(Next(list, walk, apart, step).chunk, place, smem.keys[buffer ^ 1], smem);
    place = source.Place(entry);
    ahead = Next(list, walk, apart, ahead);
    entry = source.Entry(ahead.chunk);

    // The segment's maximum, one chunk a lane, or where it begins.
    const int begin = chunk / kSegment * kSegment;
#pragma unroll
    for (int i = 0; i < kHeadsPerWarp; ++i) {
      if (walk == Walk::kValues) {
        const int h = warp * kHeadsPerWarp + i, other = begin + lane;
        const bool there = h < num_heads && lane < kSegment && other >= list.first_chunk() && other < list.chunks();
        segment_max[i] = there ? partials.maxima[(row * heads + first_head + h) * partials.chunks + other] : -INFINITY;
      } else if (!step.values && chunk == max(begin, list.first_chunk())) {
        segment_max[i] = -INFINITY;
      }
    }

    {
      float c[kPartKeys / 8][4] = {};
#pragma unroll
      for (int k = 0; k < kPartDims / 16; k += 2) {
#pragma unroll
        for (int n = 0; n < kPartKeys / 8; ++n) {
          uint32_t key[4];  // eight keys, two steps of k
          sm90::LoadMatrices(
              key, &smem.keys[buffer][logit_keys + n * 8 + lane % 8][part * kPartDims + k * 16 + lane / 8 * 8]);
          sm90::MultiplyAdd(c[n], query[k], key[0], key[1]);
          sm90::MultiplyAdd(c[n], query[k + 1], key[2], key[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kPartKeys / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<float2*>(
              &smem.logits[part][logit_heads + lane / 4 + half * 8][logit_keys + n * 8 + lane % 4 * 2]) = {
              c[n][half * 2], c[n][half * 2 + 1]};
        }
      }
    }
    __syncthreads();  // parts of logits are there

    // A lane has two places. Those outside the list weigh nothing.
    const int first = list.masked - chunk * kChunk, end = list.places - chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kHeadsPerWarp; ++i) {
      const int h = warp * kHeadsPerWarp + i, j = lane * 2;
      float2 x[kParts];
#pragma unroll
      for (int p = 0; p < kParts; ++p) x[p] = *reinterpret_cast<const float2*>(&smem.logits[p][h][j]);
      const float scale = 1.0f / sqrtf(static_cast<float>(kHeadDim));
      const bool valid[2] = {j >= first && j < end, j + 1 >= first && j + 1 < end};
      const float logit[2] = {__fmul_rn(scale, __fadd_rn(__fadd_rn(x[0].x, x[1].x), __fadd_rn(x[2].x, x[3].x))),
                              __fmul_rn(scale, __fadd_rn(__fadd_rn(x[0].y, x[1].y), __fadd_rn(x[2].y, x[3].y)))};
      if (!step.values) {
        const float max = WarpMax(fmaxf(valid[0] ? logit[0] : -INFINITY, valid[1] ? logit[1] : -INFINITY));
        segment_max[i] = fmaxf(segment_max[i], max);
        if (walk == Walk::kMaxima && lane == 0 && h < num_heads) {
          partials.maxima[(row * heads + first_head + h) * partials.chunks + chunk] = max;
        }
        continue;
      }
      const float max = walk == Walk::kValues ? WarpMax(segment_max[i]) : segment_max[i];
      const float p0 = valid[0] ? ExpOrZero(__fsub_rn(logit[0], max)) : 0.0f;
      const float p1 = valid[1] ? ExpOrZero(__fsub_rn(logit[1], max)) : 0.0f;
      const float sum = WarpSum(__fadd_rn(p0, p1));
      *reinterpret_cast<__nv_bfloat162*>(&smem.probabilities[h][j]) = {ToBf16(p0), ToBf16(p1)};
      if (walk == Walk::kValues) {
        if (lane == 0 && h < num_heads) {
          partials.sums[(row * heads + first_head + h) * partials.chunks + chunk] = sum;
        }
      } else {
        const MergeFactors f = Merge(running[i], max, sum);
        if (lane == 0) {
          smem.keep[h] = f.keep;
          smem.add[h] = f.add;
        }
      }
    }
    if (!step.values) continue;
    __syncthreads();  // probabilities and factors are there

    float value[kHeads / 16][kDimsPerWarp / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      uint32_t v[kDimsPerWarp / 16][4];  // sixteen keys of two columns of eight dims each
#pragma unroll
      for (int d = 0; d < kDimsPerWarp / 16; ++d) {
        sm90::LoadMatricesTransposed(v[d],
                                     &smem.keys[buffer][k + lane % 16][warp * kDimsPerWarp + d * 16 + lane / 16 * 8]);
      }
#pragma unroll
      for (int m = 0; m < kHeads / 16; ++m) {
        uint32_t p[4];
        sm90::LoadMatrices(p, &smem.probabilities[m * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int d = 0; d < kDimsPerWarp / 16; ++d) {
          sm90::MultiplyAdd(value[m][d * 2], p, v[d][0], v[d][1]);
          sm90::MultiplyAdd(value[m][d * 2 + 1], p, v[d][2], v[d][3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kHeads / 16; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int h = m * 16 + lane / 4 + half * 8;
        if (walk == Walk::kValues) {
          if (h >= num_heads) continue;
          float* to = partials.values + ((row * heads + first_head + h) * partials.chunks + chunk) * kHeadDim +
                      warp * kDimsPerWarp + lane % 4 * 2;
#pragma unroll
          for (int d = 0; d < kDimsPerWarp / 8; ++d) {
            *reinterpret_cast<float2*>(to + d * 8) = {value[m][d][half * 2], value[m][d][half * 2 + 1]};
          }
          continue;
        }
        const float keep = smem.keep[h], add = smem.add[h];
#pragma unroll
        for (int d = 0; d < kDimsPerWarp / 8; ++d) {
          o[m][d][half * 2] = MergeValue(o[m][d][half * 2], keep, value[m][d][half * 2], add);
          o[m][d][half * 2 + 1] = MergeValue(o[m][d][half * 2 + 1], keep, value[m][d][half * 2 + 1], add);
        }
      }
    }
  }
  if (walk != Walk::kWhole) return;

  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kHeadsPerWarp; ++i) {
      const int h = warp * kHeadsPerWarp + i;
      if (h < num_heads) smem.normaliser[h] = Normaliser(running[i], sink[first_head + h]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kHeads / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int h = m * 16 + lane / 4 + half * 8;
      if (h >= num_heads) continue;
      const float normaliser = smem.normaliser[h];
      Bf16* to = out + (row * heads + first_head + h) * kHeadDim;
#pragma unroll
      for (int d = 0; d < kDimsPerWarp / 8; ++d) {
        StorePair(o[m][d][half * 2], o[m][d][half * 2 + 1], normaliser, warp * kDimsPerWarp + d * 8 + lane % 4 * 2, row,
                  rope, to);
      }
    }
  }
}

// One block per (row, head), four dims a thread.
constexpr int kCombineThreads = kHeadDim / 4;
__global__ void __launch_bounds__(kCombineThreads)
    CombineKernel(LayerKind kind, PassView pass, int heads, const float* sink, SelectionView selection, RopeView rope,
                  Partials partials, Bf16* out) {
  const int64_t row = blockIdx.x, at = row * heads + blockIdx.y;
  const int dim = static_cast<int>(threadIdx.x) * 4;
  const RowList list = ListOf(kind, pass.positions[row], selection, row);
  const float* values = partials.values + at * partials.chunks * kHeadDim + dim;
  const float *maxima = partials.maxima + at * partials.chunks, *sums = partials.sums + at * partials.chunks;
  Running running;
  float o[4] = {}, max = -INFINITY;
  constexpr int kInFlight = 8;
  for (int chunk = list.first_chunk(); chunk < list.chunks(); chunk += kInFlight) {
    float4 v[kInFlight];
    float sum[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (chunk + i >= list.chunks()) break;
      v[i] = *reinterpret_cast<const float4*>(values + static_cast<int64_t>(chunk + i) * kHeadDim);
      sum[i] = sums[chunk + i];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (chunk + i >= list.chunks()) break;
      if (chunk + i == list.first_chunk() || (chunk + i) % kSegment == 0) {
        const int end = min((chunk + i) / kSegment * kSegment + kSegment, list.chunks());
        max = -INFINITY;
        for (int j = chunk + i; j < end; ++j) max = fmaxf(max, maxima[j]);
      }
      const MergeFactors f = Merge(running, max, sum[i]);
      o[0] = MergeValue(o[0], f.keep, v[i].x, f.add);
      o[1] = MergeValue(o[1], f.keep, v[i].y, f.add);
      o[2] = MergeValue(o[2], f.keep, v[i].z, f.add);
      o[3] = MergeValue(o[3], f.keep, v[i].w, f.add);
    }
  }
  const float normaliser = Normaliser(running, sink[blockIdx.y]);
  Bf16* to = out + at * kHeadDim;
  StorePair(o[0], o[1], normaliser, dim, row, rope, to);
  StorePair(o[2], o[3], normaliser, dim + 2, row, rope, to);
}

}  // namespace

void SparseAttention(LayerKind kind, const PassView& pass, const PageLayerLayout& page, const Bf16* q, int heads,
                     const float* sink, const Bf16* keys, SelectionView selection, RopeView rope, int64_t max_places,
                     uint8_t* workspace, Bf16* out, cudaStream_t stream) {
  if (pass.num_rows == 0) return;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(AttentionKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Smem));
  CUDA_CHECK(allowed);
  const int groups = workspace == nullptr ? 1 : SparseAttentionGroups(pass.num_rows, heads, max_places);
  const auto rows = static_cast<unsigned>(pass.num_rows);
  const dim3 grid(rows, static_cast<unsigned>((heads + kHeads - 1) / kHeads), static_cast<unsigned>(groups));
  Partials partials{};
  const auto launch = [&](Walk walk) {
    AttentionKernel<<<grid, kThreads, sizeof(Smem), stream>>>(kind, pass, page, q, heads, sink, keys, selection, rope,
                                                              walk, partials, out);
    CUDA_CHECK(cudaGetLastError());
  };
  if (groups == 1) return launch(Walk::kWhole);
  partials.chunks = static_cast<int>(SparseAttentionChunks(max_places));
  const int64_t chunks = pass.num_rows * heads * partials.chunks;
  partials.values = reinterpret_cast<float*>(workspace);
  partials.maxima = partials.values + chunks * kHeadDim;
  partials.sums = partials.maxima + chunks;
  launch(Walk::kMaxima);
  launch(Walk::kValues);
  CombineKernel<<<dim3(rows, static_cast<unsigned>(heads)), kCombineThreads, 0, stream>>>(
      kind, pass, heads, sink, selection, rope, partials, out);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
