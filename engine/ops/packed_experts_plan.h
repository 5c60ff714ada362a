// SPDX-License-Identifier: Apache-2.0
// How routed experts are laid out and cut: the packed weight's layout and the tile choice, pure and testable without a
// device.
//
// A packed matrix holds the checkpoint's bytes of FP4 weights, no more: E2M1 codes and one scale per 32. Rows are
// gathered in tiles of 64, K in blocks of 128; one tile's block is a record, contiguous, in the order in which the
// threads of a warpgroup hold a product's left operand. Its scales become, per row, the largest exponent of the block's
// four groups and each group's distance below it, in four bits: a group's codes are widened to BF16 times 2^-distance.
// So a block of 128 is one sum with one scale.
#pragma once

#include <cstdint>

namespace millrace::cuda {

constexpr int kExpertTileRows = 64;  // of a packed tile: what one warpgroup product takes
constexpr int kExpertBlockK = 128;   // of K in a record
constexpr int kExpertCodeBytes = kExpertTileRows * kExpertBlockK / 2;
constexpr int kExpertScaleBytes = kExpertTileRows * 4;
constexpr int kExpertRecordBytes = kExpertCodeBytes + kExpertScaleBytes;
constexpr int kExpertItemTiles = 4;  // packed tiles of a work item: 256 rows, or 128 gate and 128 up rows
constexpr int kExpertItemRows = kExpertTileRows * kExpertItemTiles;
constexpr int kMaxExponentDistance = 15;

// Record and bytes of one expert's matrices. Gate and up share one, 128 rows of each an item; rows and K are padded
// with zeros to whole items and blocks.
constexpr int64_t ExpertBlocks(int64_t k) { return (k + kExpertBlockK - 1) / kExpertBlockK; }
constexpr int64_t GateUpItems(int64_t width) { return (width + 127) / 128; }
constexpr int64_t DownItems(int64_t hidden) { return (hidden + kExpertItemRows - 1) / kExpertItemRows; }
constexpr int64_t PackedGateUpBytes(int64_t hidden, int64_t width) {
  return GateUpItems(width) * kExpertItemTiles * ExpertBlocks(hidden) * kExpertRecordBytes;
}
constexpr int64_t PackedDownBytes(int64_t hidden, int64_t width) {
  return DownItems(hidden) * kExpertItemTiles * ExpertBlocks(width) * kExpertRecordBytes;
}

// Token tiles: `kFew` takes up to 16 rows of an expert with four warpgroups a CTA, each one packed tile; `kMany` up to
// 128 with two, which walk an item's tiles in two passes.
enum class ExpertPath { kFew, kMany };
constexpr int ExpertTileTokens(ExpertPath path) { return path == ExpertPath::kFew ? 16 : 128; }
constexpr ExpertPath ChooseExpertPath(int64_t pairs, int num_experts) {
  return pairs <= int64_t{8} * num_experts ? ExpertPath::kFew : ExpertPath::kMany;
}
// No more tiles than this can come out of any routing.
constexpr int64_t MaxExpertTiles(int64_t pairs, int num_experts, int tile_tokens) {
  const int64_t most = num_experts + pairs / tile_tokens;
  return pairs < most ? pairs : most;
}

}  // namespace millrace::cuda
