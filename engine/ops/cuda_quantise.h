// SPDX-License-Identifier: Apache-2.0
// Activation quantisation ("actquant128"), alone and joined with what comes before it. Contracts as in cuda_linear.h.
//
// What FP8 and FP4 weights multiply are the rounded values: E4M3 codes times the scale of their 128, which BF16 holds
// exactly, in the order in which matrix loads meet FP8 weights.
#pragma once

#include "engine/ops/cuda_linear.h"

namespace millrace::cuda {

// Where value `k` of a row lies: within each 16, the first pairs of every four, then the second ones.
constexpr __host__ __device__ int64_t FragmentPlace(int64_t k) {
  const int64_t i = k % 16;
  return k - i + (i % 4 < 2 ? 0 : 8) + i / 4 * 2 + i % 2;
}

// Rounded values [rows, k]; k a multiple of 16.
void RoundRows(Bf16Rows x, int64_t rows, int64_t k, Bf16* rounded, cudaStream_t stream);

// Of RMSNorm(x) * weight, rounded once before.
void NormRound(Bf16Rows x, const float* weight, int64_t rows, int64_t dim, float eps, Bf16* rounded,
               cudaStream_t stream);

// Of silu(min(gate, limit)) * clamp(up, +-limit), rounded once before.
void SwiGluRound(Bf16Rows gate, Bf16Rows up, int64_t rows, int64_t width, float limit, Bf16* rounded,
                 cudaStream_t stream);

}  // namespace millrace::cuda
