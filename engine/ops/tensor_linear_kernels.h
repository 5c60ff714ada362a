// SPDX-License-Identifier: Apache-2.0
// What lies between the products of cuda_linear.h and their two kernels: one description of a dense product, launched
// by tensor_linear_cuda.cc. For the kernels, their tests and benchmarks; the engine calls cuda_linear.h.
#pragma once

#include "engine/ops/cuda_linear.h"
#include "engine/ops/tensor_linear_plan.h"

namespace millrace::cuda {

// One product, or `groups` side by side in LinearGrouped's layout. Operands are E4M3 codes with scales, or BF16 without.
struct DenseProduct {
  WeightKind kind = WeightKind::kFp8;  // kFp8 or kBf16
  Weight w;                            // of one group
  int groups = 1;
  const void* x = nullptr;  // [rows, x_ld] codes or BF16
  int64_t x_ld = 0;
  const float* x_scales = nullptr;  // FP8: [rows, x_scales_ld]
  int64_t x_scales_ld = 0;
  int64_t rows = 0;
  LinearOut out;
};

// Chooses the kernel.
void TensorLinear(const DenseProduct& p, cudaStream_t stream);

// Bound: the tensor cores. For more rows than a skinny product takes.
void LinearTile(const DenseProduct& p, const LinearPlan& plan, int multiprocessors, cudaStream_t stream);
// Bound: reading the weight once. For few rows.
void LinearSkinny(const DenseProduct& p, const LinearPlan& plan, cudaStream_t stream);

}  // namespace millrace::cuda
