// SPDX-License-Identifier: Apache-2.0
// Which tensor-core kernel a dense product takes and how it is cut: a pure function of the shape, no device needed.
//
// K is always cut into blocks of 128. A block is summed from zero by the tensor cores, multiplied by its scale and
// added to the total in FP32, blocks ascending. Both kernels do exactly that for each row, so the choice and the cut
// are about time only: `skinny` may spread blocks over the CTAs of a cluster because their sums are kept apart and
// added in order at the end.
#pragma once

#include <algorithm>
#include <cstdint>

namespace millrace::cuda {

constexpr int kBlockK = 128;        // of K in a block
constexpr int kBoxBytes = 128;      // of a row, what one tensor copy brings: half a block of BF16, a block of FP8
constexpr int kHalfK = 64;          // of K in a box of BF16
constexpr int kSkinnyOutputs = 64;  // weight rows of a skinny CTA: what one warpgroup product takes
constexpr int kLargeRows = 128;     // rows and outputs of a tile of the large kernel
constexpr int kLargeOutputs = 128;
constexpr int kAlwaysSkinnyRows = 64;
constexpr int kMostSkinnyCtas = 4;        // a multiprocessor's, at a time
constexpr int kMaxCluster = 8;            // what every card of this generation grants
constexpr int kCtaSmemBytes = 227 << 10;  // of one CTA

struct LinearPlan {
  bool skinny = false;
  int tokens = 0;   // skinny: rows of a CTA, 8, 16, 32 or 64
  int cluster = 1;  // skinny: CTAs that share the blocks of K; tiles: CTAs that share a weight tile
  int blocks = 0;   // blocks of K
  int per_cta = 0;  // skinny: blocks of one CTA, the last may have fewer
  int stages = 0;   // blocks in flight
  int smem_bytes = 0;
};

// Sums that a CTA of a cluster keeps: one per block of K for each of the outputs it closes.
constexpr int SkinnySumBytes(int tokens, int cluster, int blocks) {
  return cluster == 1 ? 0 : blocks * (kSkinnyOutputs * tokens / cluster) * 4;
}
// `value_bytes` of a weight: 1 FP8, 2 BF16.
constexpr int SkinnyWeightBytes(int value_bytes) { return kSkinnyOutputs * kBlockK * value_bytes; }
constexpr int SkinnyStageBytes(int tokens, int value_bytes) {
  return SkinnyWeightBytes(value_bytes) + tokens * 2 * kBoxBytes;
}

// `n` outputs and `k` per group. `multiprocessors` of the card.
inline LinearPlan PlanLinear(int64_t rows, int64_t n, int64_t k, int value_bytes, int groups, int multiprocessors) {
  LinearPlan p;
  p.blocks = static_cast<int>((k + kBlockK - 1) / kBlockK);
  const int64_t large_tiles = (rows + kLargeRows - 1) / kLargeRows * ((n + kLargeOutputs - 1) / kLargeOutputs) * groups;
  // A large tile needs enough of its kind to keep half the card busy; below, weights are better read by more CTAs.
  p.skinny = rows <= kAlwaysSkinnyRows || (rows <= 256 && large_tiles * 2 < multiprocessors);
  if (!p.skinny) {
    p.cluster = rows > kLargeRows ? 2 : 1;
    p.stages = 6;
    p.smem_bytes = p.stages * (kLargeRows + kLargeOutputs) * kBoxBytes + 2048;
    return p;
  }
  p.tokens = rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
  const int64_t tiles = (n + kSkinnyOutputs - 1) / kSkinnyOutputs * groups * ((rows + p.tokens - 1) / p.tokens);
  // CTAs that a multiprocessor is given at a time, and what each may take of its shared memory for stages: of a CTA's
  // share 1024 bytes align the tiles, 2048 are barriers and the system's.
  const auto per_multiprocessor = [&] { return (tiles * p.cluster + multiprocessors - 1) / multiprocessors; };
  const auto room = [&] {
    const int64_t share = std::clamp<int64_t>(per_multiprocessor(), 1, kMostSkinnyCtas);
    return static_cast<int>(kCtaSmemBytes / share) - 3072 - SkinnySumBytes(p.tokens, p.cluster, p.blocks);
  };
  for (p.cluster = kMaxCluster; p.cluster > 1; p.cluster /= 2) {
    p.per_cta = (p.blocks + p.cluster - 1) / p.cluster;
    // Little's law: about 48 KiB of weights in flight per multiprocessor reach the memory's rate. FP8 weights are
    // widened by the one warpgroup of a CTA, so several of them keep a multiprocessor busier than one; BF16 ones are
    // passed on.
    const int64_t most = value_bytes == 1 ? kMostSkinnyCtas : tiles * 4 <= multiprocessors ? 2 : 1;
    const int in_flight = 48 << 10, stage = SkinnyStageBytes(p.tokens, value_bytes);
    const int stages =
        std::max<int>(2, in_flight / static_cast<int>(per_multiprocessor()) / SkinnyWeightBytes(value_bytes));
    if (per_multiprocessor() <= most && room() >= std::min(p.per_cta, stages) * stage) break;
  }
  p.per_cta = (p.blocks + p.cluster - 1) / p.cluster;
  const int sums = SkinnySumBytes(p.tokens, p.cluster, p.blocks);
  p.stages = std::clamp(room() / SkinnyStageBytes(p.tokens, value_bytes), 2, std::min(std::max(p.per_cta, 2), 16));
  p.smem_bytes = p.stages * SkinnyStageBytes(p.tokens, value_bytes) + sums + 2048;
  return p;
}

}  // namespace millrace::cuda
