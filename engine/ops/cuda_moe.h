// SPDX-License-Identifier: Apache-2.0
// Routing on the device: twin of ops.h in `release` numerics; contracts as in cuda_linear.h. It never comes back to the
// host. Experts are cuda_packed_experts.h's, their sum is taken where it is folded in (cuda_hyper_connection.h).
#pragma once

#include "engine/ops/cuda_linear.h"

namespace millrace::cuda {

inline constexpr int kMaxExperts = 512, kMaxTopK = 16;

// logits F32 [T, E] (output of the gate's linear, overwritten with the scores) -> experts [T, k] ascending and their
// weights [T, k]. Either bias [E] or the table tid2eid [V, k] is given.
void Gate(float* logits, int num_experts, const float* bias, const int32_t* tid2eid, const int32_t* ids, int64_t rows,
          int k, float route_scale, int32_t* experts, float* weights, cudaStream_t stream);

}  // namespace millrace::cuda
