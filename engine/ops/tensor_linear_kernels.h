// SPDX-License-Identifier: Apache-2.0
// The two kernels behind cuda_tensor_linear.h, as tensor_linear_cuda.cc launches them. Not for other callers.
#pragma once

#include "engine/ops/cuda_tensor_linear.h"
#include "engine/ops/tensor_linear_plan.h"

namespace millrace::cuda {

// Bound: the tensor cores. For more rows than a skinny product takes.
void LinearTile(const DenseProduct& p, const LinearPlan& plan, int multiprocessors, cudaStream_t stream);
// Bound: reading the weight once. For few rows.
void LinearSkinny(const DenseProduct& p, const LinearPlan& plan, cudaStream_t stream);

}  // namespace millrace::cuda
