// SPDX-License-Identifier: Apache-2.0
// Matrix products on the device: weights as the checkpoint stores them, activations in BF16 or quantised to E4M3.
//
// y = x · wᵀ for `rows` rows. Each output adds in ascending K: FP8 weights in blocks of 128, the others in blocks of
// 32; a block is summed from zero in FP32, multiplied by its scales and added to the total. The order is the same for
// every number of rows, so a row's bits depend on that row only. CPU twin: MatMul of packed_linear.h.
//
// Contract of all launchers: pointers are device memory; data and scales start on 16 bytes and so does every row; k is
// a multiple of 32 (FP8: of 16); outputs never alias inputs; rows may be 0; nothing is allocated and nothing waits.
// Source: docs/model.md, "Quantised linears". Thread: engine thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/ops/packed_linear.h"

namespace millrace::cuda {

using Bf16 = __nv_bfloat16;

// A weight [n, k], row-major, in the bytes of the checkpoint.
struct Weight {
  WeightKind kind = WeightKind::kBf16;
  int64_t n = 0, k = 0;
  const void* data = nullptr;       // F32 or BF16 [n, k]; E4M3 [n, k]; E2M1 pairs [n, k / 2], even k in the low nibble
  const uint8_t* scales = nullptr;  // E8M0: FP8 [ceil(n / 128), ceil(k / 128)], FP4 [n, k / 32]
  bool empty() const { return n == 0; }
  // Whether the product wants quantised activations.
  bool quantised() const { return kind == WeightKind::kFp8 || kind == WeightKind::kFp4; }
};

// Rows of BF16 activations [rows, ld].
struct Bf16Rows {
  const Bf16* data = nullptr;
  int64_t ld = 0;
};

// Rows quantised per 128 of k: E4M3 codes [rows, ld] and scales [rows, scales_ld], powers of two as F32.
struct Fp8Rows {
  const uint8_t* codes = nullptr;
  int64_t ld = 0;
  const float* scales = nullptr;
  int64_t scales_ld = 0;
};

// Where a product goes: BF16 (rounded once) or F32, [rows, ld].
struct LinearOut {
  LinearOut(Bf16* out, int64_t ld_) : bf16(out), ld(ld_) {}
  LinearOut(float* out, int64_t ld_) : f32(out), ld(ld_) {}
  Bf16* bf16 = nullptr;
  float* f32 = nullptr;
  int64_t ld = 0;
};

// Activation quantisation ("actquant128"): codes [rows, k], scales [rows, ceil(k / 128)]. x [rows, ld].
void QuantiseRows(Bf16Rows x, int64_t rows, int64_t k, uint8_t* codes, float* scales, cudaStream_t stream);

// FP8 weights. (FP4 weights are routed experts': cuda_experts.h.)
void LinearFp8(const Weight& w, Fp8Rows x, int64_t rows, LinearOut out, cudaStream_t stream);

// BF16 or F32 weights, unquantised activations, FP32 products.
void LinearBf16(const Weight& w, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream);

// `groups` BF16 products at once: group g multiplies columns [g * k, (g + 1) * k) of x with rows [g * n, (g + 1) * n)
// of the weight into columns [g * n, (g + 1) * n) of out. w.n and w.k are of one group.
void LinearGrouped(const Weight& w, int groups, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream);

}  // namespace millrace::cuda
