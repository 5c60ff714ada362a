// SPDX-License-Identifier: Apache-2.0
// Window and compressed KV: one warp an entry where a row stands alone, one block where channels are pooled.
//
// Entries of a pass are independent: each reads its tokens from the pass or, before the pass's first row, from the
// pending state, which is updated by a launch of its own afterwards. HCA keeps an online softmax per channel that
// starts anew every 128 tokens, so blocks of 128 are independent too. Everything is bound by the bytes of kv and score.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_compressor.h"
#include "engine/ops/cuda_entry.cuh"

namespace millrace::cuda {
namespace {

constexpr int kEntryBody = kPlainDim + 2 * kRopeDim, kEntryScales = 8;
constexpr int kIndexBody = kIndexDim / 2, kIndexScales = kIndexDim / 32;

struct RingAddress {
  uint8_t* body;
  uint8_t* scales;
};

__device__ inline RingAddress Ring(const SequenceView& s, const SlotLayerLayout& slot, int ring_slots,
                                   int64_t position) {
  const int64_t i = position % ring_slots;
  return {s.slot + slot.window_bodies + i * kEntryBody, s.slot + slot.window_scales + i * kEntryScales};
}

// Warps 0 .. T - 1 make the new keys, the others copy the old ones that the first rows still see.
__global__ void WindowKeysKernel(PassView pass, SlotLayerLayout slot, int ring_slots, Bf16Rows kv, const float* norm,
                                 float eps, RopeView rope, Bf16* keys) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  LaneEntry e;
  if (warp < pass.num_rows) {
    const int64_t sequence = pass.row_sequence[warp];
    LoadBf16Row(kv.data + warp * kv.ld, lane, e);
    NormEntry(e, norm, lane, eps);
    RotateEntry(e, lane, rope.cos + warp * 32, rope.sin + warp * 32, 1);
    SimulateEntry(e, lane);
    StoreBf16Row(e, lane, keys + WindowRow(pass.sequences[sequence], sequence, pass.positions[warp]) * kHeadDim);
    return;
  }
  const int64_t old = warp - pass.num_rows, sequence = old / (kWindow - 1);
  if (sequence >= pass.num_sequences) return;
  const SequenceView s = pass.sequences[sequence];
  const int64_t position = s.start - 1 - old % (kWindow - 1);
  if (position < 0) return;
  const RingAddress at = Ring(s, slot, ring_slots, position);
  LoadEntry(at.body, at.scales, lane, e);
  StoreBf16Row(e, lane, keys + WindowRow(s, sequence, position) * kHeadDim);
}

// After the old keys have been read: the ring may overwrite them.
__global__ void WindowStoreKernel(PassView pass, SlotLayerLayout slot, int ring_slots, const Bf16* keys) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= pass.num_rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t sequence = pass.row_sequence[row];
  const SequenceView s = pass.sequences[sequence];
  const int64_t position = pass.positions[row];
  if (s.start + s.count - position > ring_slots) return;  // a later row of this pass has the slot
  LaneEntry e;
  LoadBf16Row(keys + WindowRow(s, sequence, position) * kHeadDim, lane, e);
  const RingAddress at = Ring(s, slot, ring_slots, position);
  StoreEntry(e, lane, at.body, at.scales);
}

// A row of a block of four, wherever it is: in the pass, or pending in the slot.
struct BlockRow {
  const float* kv;
  const float* score;  // with ape already if pending
  bool pending;
};

// Row of position q, read for the entry that closes at block q / 4 or the one after. `half` 0 is the previous block's
// part. `prev` and `cur` are the slot's arrays: kv then score.
__device__ inline BlockRow FindBlockRow(const SequenceView& s, int64_t q, int64_t dim, F32Rows kv, F32Rows score,
                                        const float* prev, const float* cur, int half) {
  const int64_t width = 2 * dim;
  if (q >= s.start) {
    const int64_t row = s.row + q - s.start;
    return {kv.data + row * kv.ld + half * dim, score.data + row * score.ld + half * dim, false};
  }
  const int64_t j = q % 4;
  if (q / 4 == s.start / 4) return {cur + j * width + half * dim, cur + 4 * width + j * width + half * dim, true};
  return {prev + j * dim, prev + 4 * dim + j * dim, true};  // only first halves are kept of a closed block
}

// Softmax over the rows of channel c and the weighted sum: as vec::PoolRows.
__device__ inline float PoolChannel(const SequenceView& s, int64_t closing, int64_t dim, int64_t c, F32Rows kv,
                                    F32Rows score, const float* ape, const float* prev, const float* cur) {
  float scores[8], values[8];
  const int64_t first = closing - 7;
  float max = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t q = first + i;
    const int half = i < 4 ? 0 : 1;
    scores[i] = -INFINITY;
    values[i] = 0;
    if (q >= 0) {  // block 0 has no previous block
      const BlockRow row = FindBlockRow(s, q, dim, kv, score, prev, cur, half);
      values[i] = row.kv[c];
      scores[i] = row.score[c];
      if (!row.pending) scores[i] += ape[q % 4 * 2 * dim + half * dim + c];
    }
    max = i == 0 ? scores[i] : fmaxf(max, scores[i]);
  }
  float sum = 0, total = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (first + i < 0) continue;
    const float e = ExpOrZero(scores[i] - max);
    sum += e;
    total = fmaf(e, values[i], total);
  }
  return total / sum;
}

// cos and sin for an entry that begins at `position`; lane i computes pair i.
__device__ inline void EntryAngles(const RopeTable& rope, int64_t position, int lane, float* cos_out, float* sin_out) {
  const float angle = static_cast<float>(position) * rope.f[lane];
  double s, c;
  sincos(static_cast<double>(angle), &s, &c);
  cos_out[lane] = static_cast<float>(c);
  sin_out[lane] = static_cast<float>(s);
  __syncwarp();
}

__device__ inline void FinishEntry(const float* pooled, const float* norm, float eps, const RopeTable& rope,
                                   int64_t position, int lane, float* cos, float* sin, uint8_t* body, uint8_t* scales) {
  EntryAngles(rope, position, lane, cos, sin);
  LaneEntry e;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) e.v[i] = RoundToBf16(pooled[lane * kLaneDims + i]);
  NormEntry(e, norm, lane, eps);
  RotateEntry(e, lane, cos, sin, 1);
  SimulateEntry(e, lane);
  StoreEntry(e, lane, body, scales);
}

__device__ inline void FinishIndexKey(const float* pooled, const float* norm, float eps, const RopeTable& rope,
                                      int64_t position, int lane, float* cos, float* sin, uint8_t* body,
                                      uint8_t* scales) {
  EntryAngles(rope, position, lane, cos, sin);
  LaneIndexKey x;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x.v[i] = RoundToBf16(pooled[lane * 4 + i]);
    squares = fmaf(x.v[i], x.v[i], squares);
  }
  const float scale = 1.0f / sqrtf(WarpSum(squares) / kIndexDim + eps);
#pragma unroll
  for (int i = 0; i < 4; ++i) x.v[i] = RoundToBf16(x.v[i] * scale * norm[lane * 4 + i]);
  RotateIndex(x, lane, cos, sin);
  HadamardIndex(x, lane);
  // Through the format and then into it, as the CPU: the scale is chosen anew from simulated values.
  int exponent = IndexGroupExponent(x);
  float inverse = PowerOfTwo(-exponent), factor = PowerOfTwo(exponent);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float v = DecodeE2m1(EncodeE2m1(x.v[i] * inverse)) * factor;
    x.v[i] = v == 0 ? 0.0f : v;  // stored keys have no negative zero
  }
  exponent = IndexGroupExponent(x);
  inverse = PowerOfTwo(-exponent);
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed |= static_cast<uint32_t>(EncodeE2m1(x.v[i] * inverse)) << (4 * i);
  *reinterpret_cast<uint16_t*>(body + lane * 2) = static_cast<uint16_t>(packed);
  if (lane % 8 == 0) scales[lane / 8] = EncodeE8m0(exponent);
}

constexpr int kCsaThreads = 128;

// One block a row; only rows that close a block of four have anything to do.
__global__ void __launch_bounds__(kCsaThreads)
    CsaEntriesKernel(PassView pass, PageLayerLayout page, SlotLayerLayout slot, F32Rows kv, F32Rows score,
                     F32Rows index_kv, F32Rows index_score, PoolWeights main, PoolWeights index, RopeTable rope,
                     float eps) {
  __shared__ float pooled[kHeadDim], pooled_index[kIndexDim];
  __shared__ float cos[2][32], sin[2][32];
  const int64_t position = pass.positions[blockIdx.x];
  if (position % 4 != 3) return;
  const SequenceView s = pass.sequences[pass.row_sequence[blockIdx.x]];
  const auto state = [&](int64_t offset) { return reinterpret_cast<const float*>(s.slot + offset); };
  for (int c = threadIdx.x; c < kHeadDim; c += kCsaThreads) {
    pooled[c] = PoolChannel(s, position, kHeadDim, c, kv, score, main.ape, state(slot.csa_prev), state(slot.csa_cur));
  }
  pooled_index[threadIdx.x] = PoolChannel(s, position, kIndexDim, threadIdx.x, index_kv, index_score, index.ape,
                                          state(slot.index_prev), state(slot.index_cur));
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp > 1) return;
  const int64_t n = position / 4, in_page = n % kCsaEntriesPerPage;
  uint8_t* base = pass.pages + s.block_table[n / kCsaEntriesPerPage] * pass.page_bytes;
  if (warp == 0) {
    FinishEntry(pooled, main.norm, eps, rope, n * 4, lane, cos[0], sin[0], base + page.bodies + in_page * kEntryBody,
                base + page.scales + in_page * kEntryScales);
  } else {
    FinishIndexKey(pooled_index, index.norm, eps, rope, n * 4, lane, cos[1], sin[1],
                   base + page.index_bodies + in_page * kIndexBody, base + page.index_scales + in_page * kIndexScales);
  }
}

// Pending rows after the pass: cur[j] is the newest row of position j mod 4, prev the first halves of the last closed
// block. Each (j, channel) is one thread's, so reading cur before writing it needs no barrier.
__device__ inline void UpdatePending(const SequenceView& s, int64_t dim, F32Rows kv, F32Rows score, const float* ape,
                                     float* prev, float* cur) {
  const int64_t width = 2 * dim, end = s.start + s.count, closed = end / 4;
  for (int64_t i = threadIdx.x; i < 4 * width; i += blockDim.x) {
    const int64_t j = i / width, c = i % width;
    const auto new_kv = [&](int64_t q) { return kv.data[(s.row + q - s.start) * kv.ld + c]; };
    const auto new_score = [&](int64_t q) {
      return score.data[(s.row + q - s.start) * score.ld + c] + ape[j * width + c];
    };
    if (closed > s.start / 4 && c < dim) {
      const int64_t q = 4 * (closed - 1) + j;
      prev[j * dim + c] = q >= s.start ? new_kv(q) : cur[i];
      prev[4 * dim + j * dim + c] = q >= s.start ? new_score(q) : cur[4 * width + i];
    }
    const int64_t newest = (end - 1 - j) >= 0 ? (end - 1 - j) / 4 * 4 + j : -1;
    if (newest >= s.start) {
      cur[i] = new_kv(newest);
      cur[4 * width + i] = new_score(newest);
    }
  }
}

__global__ void CsaPendingKernel(PassView pass, SlotLayerLayout slot, F32Rows kv, F32Rows score, F32Rows index_kv,
                                 F32Rows index_score, const float* ape, const float* index_ape) {
  const SequenceView s = pass.sequences[blockIdx.x];
  const auto state = [&](int64_t offset) { return reinterpret_cast<float*>(s.slot + offset); };
  UpdatePending(s, kHeadDim, kv, score, ape, state(slot.csa_prev), state(slot.csa_cur));
  UpdatePending(s, kIndexDim, index_kv, index_score, index_ape, state(slot.index_prev), state(slot.index_cur));
}

// One channel a thread. Block x of a sequence has the x-th run of rows that share a block of 128 tokens; block 0 has
// the last run too, because the first reads the pending state that the last one overwrites.
__global__ void __launch_bounds__(kHeadDim)
    HcaKernel(PassView pass, PageLayerLayout page, SlotLayerLayout slot, F32Rows kv, F32Rows score, PoolWeights w,
              RopeTable rope, float eps) {
  __shared__ float pooled[kHeadDim];
  __shared__ float cos[32], sin[32];
  const SequenceView s = pass.sequences[blockIdx.y];
  const int64_t end = s.start + s.count, first_block = s.start / 128, runs = (end - 1) / 128 - first_block + 1;
  const int c = threadIdx.x;
  float* state = reinterpret_cast<float*>(s.slot + slot.hca_state);
  for (int64_t run = blockIdx.x; run < runs; run = run == 0 ? runs - 1 : runs) {
    if (run == runs - 1 && blockIdx.x != 0) return;
    const int64_t block = first_block + run;
    const int64_t from = max(s.start, block * 128), to = min(end, block * 128 + 128);
    float max_score = -INFINITY, sum = 0, weighted = 0;
    if (from % 128 != 0) {
      max_score = state[c];
      sum = state[kHeadDim + c];
      weighted = state[2 * kHeadDim + c];
    }
    for (int64_t p = from; p < to; ++p) {
      const int64_t row = s.row + p - s.start;
      const float x = score.data[row * score.ld + c] + w.ape[p % 128 * kHeadDim + c];
      const float new_max = fmaxf(x, max_score);
      const float keep = ExpOrZero(max_score - new_max), add = ExpOrZero(x - new_max);
      max_score = new_max;
      sum = fmaf(sum, keep, add);
      weighted = fmaf(weighted, keep, __fmul_rn(add, kv.data[row * kv.ld + c]));
    }
    if (run == runs - 1) {
      state[c] = max_score;
      state[kHeadDim + c] = sum;
      state[2 * kHeadDim + c] = weighted;
    }
    if (to % 128 == 0) {
      pooled[c] = weighted / sum;
      __syncthreads();
      if (threadIdx.x < 32) {
        uint8_t* base = pass.pages + s.block_table[block] * pass.page_bytes;
        FinishEntry(pooled, w.norm, eps, rope, block * 128, static_cast<int>(threadIdx.x), cos, sin, base + page.bodies,
                    base + page.scales);
      }
      __syncthreads();
    }
    if (run == runs - 1) return;
  }
}

__global__ void StoreLastStreamsKernel(PassView pass, const Bf16* streams, int64_t width, int64_t offset) {
  const SequenceView s = pass.sequences[blockIdx.x];
  const uint4* from = reinterpret_cast<const uint4*>(streams + (s.row + s.count - 1) * width);
  uint4* to = reinterpret_cast<uint4*>(s.slot + offset);
  for (int64_t i = threadIdx.x; i < width / 8; i += blockDim.x) to[i] = from[i];
}

__global__ void GatherLastStreamsKernel(PassView mtp, PassView backbone, const int32_t* backbone_sequence,
                                        const Bf16* streams, int64_t width, int64_t offset, Bf16* out) {
  const int64_t row = blockIdx.x;
  const SequenceView s = backbone.sequences[backbone_sequence[mtp.row_sequence[row]]];
  const int64_t position = mtp.positions[row];
  const uint4* from = position < s.start
                          ? reinterpret_cast<const uint4*>(s.slot + offset)
                          : reinterpret_cast<const uint4*>(streams + (s.row + position - s.start) * width);
  uint4* to = reinterpret_cast<uint4*>(out + row * width);
  for (int64_t i = threadIdx.x; i < width / 8; i += blockDim.x) to[i] = from[i];
}

unsigned Blocks(int64_t warps) { return static_cast<unsigned>((warps + 7) / 8); }

}  // namespace

void WindowAppend(const PassView& pass, const SlotLayerLayout& slot, int ring_slots, Bf16Rows kv, const float* norm,
                  float eps, RopeView rope, Bf16* keys, cudaStream_t stream) {
  if (pass.num_rows == 0) return;
  WindowKeysKernel<<<Blocks(pass.num_rows + int64_t{kWindow - 1} * pass.num_sequences), 256, 0, stream>>>(
      pass, slot, ring_slots, kv, norm, eps, rope, keys);
  CUDA_CHECK(cudaGetLastError());
  WindowStoreKernel<<<Blocks(pass.num_rows), 256, 0, stream>>>(pass, slot, ring_slots, keys);
  CUDA_CHECK(cudaGetLastError());
}

void CompressCsa(const PassView& pass, const PageLayerLayout& page, const SlotLayerLayout& slot, F32Rows kv,
                 F32Rows score, F32Rows index_kv, F32Rows index_score, const PoolWeights& main,
                 const PoolWeights& index, const RopeTable& rope, float eps, cudaStream_t stream) {
  if (pass.num_rows == 0) return;
  CsaEntriesKernel<<<static_cast<unsigned>(pass.num_rows), kCsaThreads, 0, stream>>>(
      pass, page, slot, kv, score, index_kv, index_score, main, index, rope, eps);
  CUDA_CHECK(cudaGetLastError());
  CsaPendingKernel<<<static_cast<unsigned>(pass.num_sequences), 512, 0, stream>>>(pass, slot, kv, score, index_kv,
                                                                                  index_score, main.ape, index.ape);
  CUDA_CHECK(cudaGetLastError());
}

void CompressHca(const PassView& pass, const PageLayerLayout& page, const SlotLayerLayout& slot, F32Rows kv,
                 F32Rows score, const PoolWeights& w, const RopeTable& rope, float eps, cudaStream_t stream) {
  if (pass.num_rows == 0) return;
  // As many runs as the rows could have if they were one sequence's.
  const dim3 grid(static_cast<unsigned>(pass.num_rows / 128 + 2), static_cast<unsigned>(pass.num_sequences));
  HcaKernel<<<grid, kHeadDim, 0, stream>>>(pass, page, slot, kv, score, w, rope, eps);
  CUDA_CHECK(cudaGetLastError());
}

void StoreLastStreams(const PassView& pass, const Bf16* streams, int64_t width, int64_t offset, cudaStream_t stream) {
  if (pass.num_rows == 0) return;
  StoreLastStreamsKernel<<<static_cast<unsigned>(pass.num_sequences), 256, 0, stream>>>(pass, streams, width, offset);
  CUDA_CHECK(cudaGetLastError());
}

void GatherLastStreams(const PassView& mtp, const PassView& backbone, const int32_t* backbone_sequence,
                       const Bf16* streams, int64_t width, int64_t offset, Bf16* out, cudaStream_t stream) {
  if (mtp.num_rows == 0) return;
  GatherLastStreamsKernel<<<static_cast<unsigned>(mtp.num_rows), 256, 0, stream>>>(mtp, backbone, backbone_sequence,
                                                                                   streams, width, offset, out);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
