// SPDX-License-Identifier: Apache-2.0
// The rows of one pass and the cache they touch, as kernels see them: device twin of Pass in ops.h.
//
// Everything that changes from step to step lies in device memory behind these pointers; what a launch takes by value
// (row and sequence counts, offsets of a layer) depends on the batch's shape only, so that a step of one shape can be
// captured once and replayed. Rows may belong to no real sequence (padding of a captured shape): they point at a
// scratch slot and position 0, which touches no page.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/cache/cache_layout.h"

namespace millrace::cuda {

using Bf16 = __nv_bfloat16;

// Fixed by the architecture and checked when an engine is made: kernels are written for these.
inline constexpr int kHeadDim = 512, kRopeDim = 64, kPlainDim = kHeadDim - kRopeDim;
inline constexpr int kIndexDim = 128;
inline constexpr int kWindow = 128;

// The rows of one sequence in a pass, and where its state lies.
struct SequenceView {
  int64_t row = 0;    // first row in the pass
  int64_t count = 0;  // rows
  int64_t start = 0;  // position of the first row
  uint8_t* slot = nullptr;
  const int32_t* block_table = nullptr;  // pool index of page p (tokens 128p ...)
};

struct PassView {
  int64_t num_rows = 0;
  int num_sequences = 0;
  const int32_t* token_ids = nullptr;     // [T]
  const int32_t* positions = nullptr;     // [T]
  const int32_t* row_sequence = nullptr;  // [T], index into sequences
  const SequenceView* sequences = nullptr;
  uint8_t* pages = nullptr;  // page i of the pool at pages + i * page_bytes
  int64_t page_bytes = 0;
};

// cos and sin of every row, F32 [T, 32].
struct RopeView {
  const float* cos = nullptr;
  const float* sin = nullptr;
};

// Inverse frequencies of the 32 pairs, passed by value.
struct RopeTable {
  float f[32] = {};
};

// BF16 keys of the window, [T + num_sequences * (kWindow - 1), kHeadDim]: sequence i's key of position p is at row
// WindowRow(sequence, i, p), for positions start - 127 and up.
__host__ __device__ inline int64_t WindowRow(const SequenceView& s, int64_t sequence, int64_t position) {
  return s.row + (sequence + 1) * (kWindow - 1) + position - s.start;
}

}  // namespace millrace::cuda
