// SPDX-License-Identifier: Apache-2.0
// Window and compressed KV on the device: what is stored for a token, and how tokens are pooled into entries. Twins of
// ops.h in `release` numerics; contracts as in cuda_linear.h. Cache bytes are those of cache_layout.h, the same as the
// CPU's. Each launcher is called once per layer and pass, before that layer's attention.
#pragma once

#include "engine/ops/cuda_linear.h"
#include "engine/ops/cuda_pass.h"

namespace millrace::cuda {

// kv [T, 512] (output of wkv) -> norm, RoPE, FP8 simulation; fills `keys` (cuda_pass.h, WindowRow) with the old and new
// keys and writes the newest into each sequence's ring of `ring_slots`.
void WindowAppend(const PassView& pass, const SlotLayerLayout& slot, int ring_slots, Bf16Rows kv, const float* norm,
                  float eps, RopeView rope, Bf16* keys, cudaStream_t stream);

struct PoolWeights {
  const float* ape = nullptr;   // [ratio, width]
  const float* norm = nullptr;  // [head]
};

// CSA: kv and score F32 [T, 1024] main and [T, 256] index (scores without ape). Updates pending rows and writes every
// entry and index key that these rows complete.
void CompressCsa(const PassView& pass, const PageLayerLayout& page, const SlotLayerLayout& slot, F32Rows kv,
                 F32Rows score, F32Rows index_kv, F32Rows index_score, const PoolWeights& main,
                 const PoolWeights& index, const RopeTable& rope, float eps, cudaStream_t stream);

// HCA, online per channel: kv and score F32 [T, 512].
void CompressHca(const PassView& pass, const PageLayerLayout& page, const SlotLayerLayout& slot, F32Rows kv,
                 F32Rows score, const PoolWeights& w, const RopeTable& rope, float eps, cudaStream_t stream);

// Streams of each sequence's last row, BF16 [4, D], to `offset` in its slot.
void StoreLastStreams(const PassView& pass, const Bf16* streams, int64_t width, int64_t offset, cudaStream_t stream);

// Rows of an MTP pass whose sequences lag the backbone's by one: streams of position p from the backbone's pass, or
// from the slot where p is before its first row. out [T of mtp, width].
void GatherLastStreams(const PassView& mtp, const PassView& backbone, const int32_t* backbone_sequence,
                       const Bf16* streams, int64_t width, int64_t offset, Bf16* out, cudaStream_t stream);

}  // namespace millrace::cuda
