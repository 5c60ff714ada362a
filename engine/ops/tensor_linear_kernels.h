// SPDX-License-Identifier: Apache-2.0
// What lies between the products of cuda_linear.h and their two kernels: one description of a dense product, launched
// by tensor_linear_cuda.cc. Not for other callers.
#pragma once

#include "engine/ops/cuda_linear.h"
#include "engine/ops/tensor_linear_plan.h"

namespace millrace::cuda {

// One product, or `groups` side by side in LinearGrouped's layout.
struct DenseProduct {
  Weight w;  // of one group
  int groups = 1;
  Bf16Rows x;  // in the order of fragments if w is FP8
  int64_t rows = 0;
  LinearOut out;
};

// Bound: the tensor cores. For more rows than a skinny product takes. w is BF16.
void LinearTile(const DenseProduct& p, const LinearPlan& plan, int multiprocessors, cudaStream_t stream);
// Bound: reading the weight once. For few rows.
void LinearSkinny(const DenseProduct& p, const LinearPlan& plan, cudaStream_t stream);

// An FP8 weight as BF16, scales included, in the order of fragments: exact. out [n, k].
void WidenWeight(const Weight& w, Bf16* out, cudaStream_t stream);

}  // namespace millrace::cuda
