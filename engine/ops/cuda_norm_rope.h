// SPDX-License-Identifier: Apache-2.0
// Embedding, norms and rotations on the device: twins of ops.h in `release` numerics (FP32 inside, one rounding to
// BF16). Contracts as in cuda_linear.h: device pointers, rows may be 0, nothing allocated. One row is one warp or one
// block with fixed lanes, whatever else is in the pass.
#pragma once

#include "engine/ops/cuda_linear.h"
#include "engine/ops/cuda_pass.h"

namespace millrace::cuda {

// out [rows, copies, dim] = `copies` times the row of the table; dim a multiple of 8.
void Embed(const Bf16* table, const int32_t* ids, int64_t rows, int copies, int64_t dim, Bf16* out,
           cudaStream_t stream);

// out [rows, dim] = RMSNorm(x) * weight; may alias x.
void RmsNorm(const Bf16* x, const float* weight, int64_t rows, int64_t dim, float eps, Bf16* out, cudaStream_t stream);

// cos and sin [rows, 32] of the FP32 product position * frequency, accurate.
void PrepareRope(const RopeTable& table, const int32_t* positions, int64_t rows, float* cos, float* sin,
                 cudaStream_t stream);

// q: rows of [heads, 512] -> out [rows, heads, 512]: RMSNorm of each head without weight, then RoPE of its last 64
// dims.
void QueryNormRope(Bf16Rows q, int heads, RopeView rope, int64_t rows, float eps, Bf16* out, cudaStream_t stream);

// out [rows, copies, dim] = e [rows, dim] + h [rows, copies, dim], rounded; may alias h. The MTP module's input.
void AddToStreams(const Bf16* e, const Bf16* h, int64_t rows, int copies, int64_t dim, Bf16* out, cudaStream_t stream);

}  // namespace millrace::cuda
