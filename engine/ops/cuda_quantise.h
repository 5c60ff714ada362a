// SPDX-License-Identifier: Apache-2.0
// Activation quantisation ("actquant128"), alone and joined with what comes before it. Codes [rows, k] E4M3, scales
// [rows, ceil(k / 128)], powers of two as F32. Contracts as in cuda_linear.h.
#pragma once

#include "engine/ops/cuda_linear.h"

namespace millrace::cuda {

void QuantiseRows(Bf16Rows x, int64_t rows, int64_t k, uint8_t* codes, float* scales, cudaStream_t stream);

// Of RMSNorm(x) * weight, rounded once before.
void NormQuantise(Bf16Rows x, const float* weight, int64_t rows, int64_t dim, float eps, uint8_t* codes, float* scales,
                  cudaStream_t stream);

// Of silu(min(gate, limit)) * clamp(up, +-limit), rounded once before.
void SwiGluQuantise(Bf16Rows gate, Bf16Rows up, int64_t rows, int64_t width, float limit, uint8_t* codes,
                    float* scales, cudaStream_t stream);

}  // namespace millrace::cuda
