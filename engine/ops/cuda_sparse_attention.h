// SPDX-License-Identifier: Apache-2.0
// Attention core on the device: window, then entries, one softmax with the sink, inverse RoPE on the output. Twin of
// SparseAttention in ops.h in `release` numerics; contracts as in cuda_linear.h.
#pragma once

#include "engine/ops/cuda_indexer.h"
#include "engine/ops/cuda_pass.h"

namespace millrace::cuda {

// q [T, heads, 512] -> out [T, heads, 512]; `keys` as WindowAppend filled it. kWindow ignores
// `page` and `selection`; kHca takes every visible entry; kCsa the selected ones.
void SparseAttention(LayerKind kind, const PassView& pass, const PageLayerLayout& page, const Bf16* q, int heads,
                     const float* sink, const Bf16* keys, SelectionView selection, RopeView rope, Bf16* out,
                     cudaStream_t stream);

}  // namespace millrace::cuda
