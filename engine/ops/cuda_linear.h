// SPDX-License-Identifier: Apache-2.0
// Matrix products on the device, on the tensor cores: FP8 weights with quantised activations, BF16 weights with BF16
// ones, weights as the checkpoint stores them.
//
// y = x · wᵀ for `rows` rows. K goes in ascending blocks of 128; a block is summed from zero by the tensor cores,
// multiplied by its scale and added in FP32. The order is the same for every number of rows, so a row's bits depend on
// that row only. FP8 operands are multiplied as the BF16 values that they exactly are: the FP8 products of this
// generation keep about 13 bits of a sum, which quantisers behind them amplify (ADR 0013). Twin: MatMul of
// packed_linear.h.
//
// Contract of all launchers: pointers are device memory; data and scales start on 16 bytes and so does every row; k is
// a multiple of 32; outputs never alias inputs; rows may be 0; nothing is allocated and nothing waits.
// Source: docs/model.md, "Quantised linears". Thread: engine thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/ops/packed_linear.h"

namespace millrace::cuda {

using Bf16 = __nv_bfloat16;

// A weight [n, k], row-major, in the bytes of the checkpoint. Routed experts have a form of their own
// (cuda_packed_experts.h).
struct Weight {
  WeightKind kind = WeightKind::kBf16;  // kFp8 or kBf16
  int64_t n = 0, k = 0;
  const void* data = nullptr;       // BF16 [n, k]; E4M3 [n, k]
  const uint8_t* scales = nullptr;  // E8M0: FP8 [ceil(n / 128), ceil(k / 128)]
};

// Rows of activations [rows, ld].
struct Bf16Rows {
  const Bf16* data = nullptr;
  int64_t ld = 0;
};
struct F32Rows {
  const float* data = nullptr;
  int64_t ld = 0;
};

// Rows of BF16 that a quantiser has rounded through E4M3, each 16 of K in the order of FragmentPlace (cuda_quantise.h):
// what FP8 weights and experts multiply. ld a multiple of 8.
struct RoundedRows {
  const Bf16* data = nullptr;
  int64_t ld = 0;
};

// Where a product goes: BF16 (rounded once) or F32, [rows, ld].
struct LinearOut {
  LinearOut(Bf16* out, int64_t ld_) : bf16(out), ld(ld_) {}
  LinearOut(float* out, int64_t ld_) : f32(out), ld(ld_) {}
  Bf16* bf16 = nullptr;
  float* f32 = nullptr;
  int64_t ld = 0;
};

// `scratch`: LinearScratchBytes for the most rows it is called with; two products at a time need two.
int64_t LinearScratchBytes(int64_t n, int64_t k, int64_t rows);
void LinearFp8(const Weight& w, RoundedRows x, int64_t rows, LinearOut out, void* scratch, cudaStream_t stream);
void LinearBf16(const Weight& w, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream);

// `groups` BF16 products at once: group g multiplies columns [g * k, (g + 1) * k) of x with rows [g * n, (g + 1) * n)
// of the weight into columns [g * n, (g + 1) * n) of out. w.n and w.k are of one group, k a multiple of 64 if there are
// several.
void LinearGrouped(const Weight& w, int groups, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream);

}  // namespace millrace::cuda
