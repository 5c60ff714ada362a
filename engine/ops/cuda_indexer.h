// SPDX-License-Identifier: Apache-2.0
// Lightning indexer on the device: which compressed entries each row of a CSA layer attends to. Twin of IndexSelect in
// ops.h; contracts as in cuda_linear.h.
//
// Scores are exact integer dot products of FP4 codes per group of 32, scaled and added in the CPU's order, so given the
// same inputs the selection is the CPU's, bit for bit. The choice is exact: higher BF16 score first, ties to the lower
// index, then ascending.
#pragma once

#include "engine/ops/cuda_linear.h"
#include "engine/ops/cuda_pass.h"

namespace millrace::cuda {

// What attention reads: row r takes entries[r * topk .. + counts[r]).
struct SelectionView {
  int32_t* entries = nullptr;  // [T, topk], ascending
  int32_t* counts = nullptr;   // [T]
  int topk = 0;
};

struct IndexWorkspace {
  int8_t* q = nullptr;         // [T, heads, 128]: codes times two
  float* q_scales = nullptr;   // [T, heads, 4]
  uint16_t* scores = nullptr;  // [tile_rows, max_entries], BF16
  int64_t tile_rows = 0;       // rows scored at a time
  int64_t max_entries = 0;     // of the longest sequence there can be
};

// q [T, heads, 128] (output of wq_b), weights [T, heads] (output of weights_proj), both BF16.
void IndexSelect(const PassView& pass, const PageLayerLayout& page, Bf16Rows q, F32Rows weights, int heads,
                 RopeView rope, const IndexWorkspace& workspace, SelectionView selection, cudaStream_t stream);

// The exact top k of one BF16 score row per block, as IndexSelect uses it: scores [rows, ld], of which row r has
// lengths[r]. Alone for its test.
void TopK(const uint16_t* scores, int64_t ld, const int32_t* lengths, int64_t rows, SelectionView selection,
          cudaStream_t stream);

}  // namespace millrace::cuda
