// SPDX-License-Identifier: Apache-2.0
// Attention core on the device: window, then entries, one softmax with the sink, inverse RoPE on the output. Twin of
// SparseAttention in ops.h in `release` numerics; contracts as in cuda_linear.h.
//
// Bits depend on the row's list only: neither on the other rows nor on whether the list is split.
#pragma once

#include <algorithm>

#include "engine/ops/cuda_indexer.h"
#include "engine/ops/cuda_pass.h"

namespace millrace::cuda {

inline constexpr int kAttentionHeads = 32;  // of a block
inline constexpr int kAttentionChunk = 64;  // places closed by themselves

constexpr int64_t SparseAttentionChunks(int64_t max_places) {
  return (max_places + kAttentionChunk - 1) / kAttentionChunk;
}

// Among how many blocks the chunks of a row's list are split; 1: one block walks the list. Splitting writes each
// chunk's values and reads them again, so it pays while whole lists leave most of a card's 132 multiprocessors idle.
inline constexpr int kAttentionBlocks = 128;                         // wanted when split
inline constexpr int64_t kMaxAttentionWorkspaceBytes = 256ll << 20;  // longer lists are not split
constexpr int kMinSplitChunks = 4;  // shorter lists are sooner walked than merged by another launch
constexpr int64_t SplitAttentionBytes(int64_t rows, int heads, int64_t max_places) {
  if (SparseAttentionChunks(max_places) < kMinSplitChunks) return 0;
  return rows * heads * SparseAttentionChunks(max_places) * (kHeadDim + 2) * static_cast<int64_t>(sizeof(float));
}
constexpr int64_t MaxSplitAttentionRows(int heads) {
  return kAttentionBlocks / 4 / ((heads + kAttentionHeads - 1) / kAttentionHeads);
}
constexpr int SparseAttentionGroups(int64_t rows, int heads, int64_t max_places) {
  const int64_t bytes = SplitAttentionBytes(rows, heads, max_places);
  if (rows > MaxSplitAttentionRows(heads) || bytes == 0 || bytes > kMaxAttentionWorkspaceBytes) return 1;
  const int64_t blocks = rows * ((heads + kAttentionHeads - 1) / kAttentionHeads);
  return static_cast<int>(std::min(kAttentionBlocks / blocks, SparseAttentionChunks(max_places)));
}

// Enough for every pass of up to `rows` rows whose lists have up to `max_places` places.
constexpr int64_t SparseAttentionWorkspaceBytes(int64_t rows, int heads, int64_t max_places) {
  return std::min(SplitAttentionBytes(std::min(rows, MaxSplitAttentionRows(heads)), heads, max_places),
                  kMaxAttentionWorkspaceBytes);
}

// q [T, heads, 512] -> out [T, heads, 512]; `keys` as WindowAppend filled it. kWindow ignores
// `page` and `selection`; kHca takes every visible entry; kCsa the selected ones. No row's list, the window's 128
// places and its entries, is longer than `max_places`. `workspace`: SparseAttentionWorkspaceBytes, 16-byte aligned;
// null: no list is split.
void SparseAttention(LayerKind kind, const PassView& pass, const PageLayerLayout& page, const Bf16* q, int heads,
                     const float* sink, const Bf16* keys, SelectionView selection, RopeView rope, int64_t max_places,
                     uint8_t* workspace, Bf16* out, cudaStream_t stream);

}  // namespace millrace::cuda
