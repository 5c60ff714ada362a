// SPDX-License-Identifier: Apache-2.0
// mHC on the device: four residual streams mixed into one sublayer input, and folded back. Twins of ops.h in `release`
// numerics; contracts as in cuda_linear.h. One block a row.
#pragma once

#include "engine/ops/cuda_linear.h"

namespace millrace::cuda {

inline constexpr int kStreams = 4;  // hc_mult

struct HyperWeights {
  Weight fn;                     // F32 [24, 4 * D], or [4, 4 * D] for the head
  const float* base = nullptr;   // [24] or [4]
  const float* scale = nullptr;  // [3] or [1]
};

struct HyperParams {
  int sinkhorn_iters = 20;
  float hc_eps = 1e-6f, norm_eps = 1e-6f;
};

// streams [rows, 4, D] -> u [rows, D] = RMSNorm(sum_j pre_j X_j) * norm; post [rows, 4]; comb [rows, 4, 4] (source,
// destination) after Sinkhorn. mixes [rows, 24] is scratch.
void HyperConnectionPre(const Bf16* streams, const HyperWeights& w, const float* norm, const HyperParams& params,
                        int64_t rows, int64_t dim, float* mixes, Bf16* u, float* post, float* comb,
                        cudaStream_t stream);

// streams[k] = post[k] * out + sum_j comb[j][k] * streams[j], in place.
void HyperConnectionPost(const Bf16* out, const float* post, const float* comb, int64_t rows, int64_t dim,
                         Bf16* streams, cudaStream_t stream);

// The last mix, no Sinkhorn: z [rows, D] = RMSNorm(sum_j p_j X_j) * norm. mixes [rows, 4] is scratch.
void HyperHead(const Bf16* streams, const HyperWeights& w, const float* norm, const HyperParams& params, int64_t rows,
               int64_t dim, float* mixes, Bf16* z, cudaStream_t stream);

}  // namespace millrace::cuda
