// SPDX-License-Identifier: Apache-2.0
// mHC on the device: four residual streams mixed into one sublayer input, and folded back. Twins of ops.h in `release`
// numerics; contracts as in cuda_linear.h.
//
// A sublayer's result is not folded in at once: the next mix does it on its way, so that streams are read once. What
// has not been folded in yet is a HyperUpdate.
#pragma once

#include "engine/ops/cuda_linear.h"

namespace millrace::cuda {

inline constexpr int kStreams = 4;  // hc_mult

struct HyperWeights {
  const float* fn = nullptr;     // [24, 4 * D], or [4, 4 * D] for the head
  const float* base = nullptr;   // [24] or [4]
  const float* scale = nullptr;  // [3] or [1]
};

struct HyperParams {
  int sinkhorn_iters = 20;
  float hc_eps = 1e-6f, norm_eps = 1e-6f;
};

// streams[k] = post[k] * y + sum_j comb[j][k] * streams[j], with y = `out` [rows, D], or `out` after the sum of `top_k`
// expert rows [rows, top_k, D] in order, rounded once.
struct HyperUpdate {
  const Bf16* out = nullptr;  // null: nothing to fold in
  const Bf16* expert_rows = nullptr;
  int top_k = 0;
  const float* post = nullptr;  // [rows, 4]
  const float* comb = nullptr;  // [rows, 4, 4] (source, destination)
};

// The input of a sublayer: u [rows, D], and rounded as RoundRows does.
struct HyperInput {
  Bf16 *u = nullptr, *rounded = nullptr;
};

// streams [rows, 4, D], after `update` -> u = RMSNorm(sum_j pre_j X_j) * norm; post [rows, 4]; comb [rows, 4, 4] after
// Sinkhorn. `post` and `comb` may be the update's. D is a multiple of 32, at most 8192.
void HyperConnectionPre(Bf16* streams, const HyperUpdate& update, const HyperWeights& w, const float* norm,
                        const HyperParams& params, int64_t rows, int64_t dim, const HyperInput& input, float* post,
                        float* comb, cudaStream_t stream);

// Brings fn, which nothing has read since the last pass, into the L2 cache while other kernels run. [24, 4 * D].
void HyperPrefetch(const HyperWeights& w, int64_t dim, cudaStream_t stream);

// The update alone, with the same bits.
void HyperConnectionPost(const HyperUpdate& update, int64_t rows, int64_t dim, Bf16* streams, cudaStream_t stream);

// The last mix, no Sinkhorn: z [rows, D] = RMSNorm(sum_j p_j X_j) * norm.
void HyperHead(const Bf16* streams, const HyperWeights& w, const float* norm, const HyperParams& params, int64_t rows,
               int64_t dim, Bf16* z, cudaStream_t stream);

}  // namespace millrace::cuda
