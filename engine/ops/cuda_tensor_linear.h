// SPDX-License-Identifier: Apache-2.0
// Dense products on the tensor cores: FP8 weights with quantised activations, BF16 weights with BF16 ones.
//
// Operands and contract are cuda_linear.h's; so is the meaning of every number. What differs is the bits: K goes in
// ascending blocks of 128 bytes of a row (128 FP8, 64 BF16 values), a block is summed from zero by the tensor cores,
// multiplied by its scales and added in FP32. In FP8 the tensor cores keep about 13 bits of a block below its largest
// term, so a product differs from the CPU's by up to 1e-3 of the sum of its terms' magnitudes. The order is the same
// for every number of rows, and tests hold that to the bit.
#pragma once

#include "engine/ops/cuda_linear.h"

namespace millrace::cuda {

// One product, or `groups` side by side in LinearGrouped's layout, where K of a group is then a multiple of 128 bytes.
// Operands are E4M3 codes with scales, or BF16 without.
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

void TensorLinear(const DenseProduct& p, cudaStream_t stream);

}  // namespace millrace::cuda
