// SPDX-License-Identifier: Apache-2.0
// Routing, routed experts and their combination on the device. Twins of ops.h and of LocalExperts in `release`
// numerics; contracts as in cuda_linear.h. Routing never comes back to the host: pairs (token, expert) are grouped by
// expert on the device.
#pragma once

#include "engine/ops/cuda_linear.h"

namespace millrace::cuda {

inline constexpr int kMaxExperts = 512, kMaxTopK = 16;

// logits F32 [T, E] (output of the gate's linear, overwritten with the scores) -> experts [T, k] ascending and their
// weights [T, k]. Either bias [E] or the table tid2eid [V, k] is given.
void Gate(float* logits, int num_experts, const float* bias, const int32_t* tid2eid, const int32_t* ids, int64_t rows,
          int k, float route_scale, int32_t* experts, float* weights, cudaStream_t stream);

// a = silu(min(g, limit)) * clamp(p, +-limit) * (weight of the row or 1), rounded; a may alias g. `pair_order` null:
// weights[row]; else weights[pair_order[row]].
void SwiGlu(const Bf16* g, const Bf16* p, const float* weights, const int32_t* pair_order, int64_t rows, int64_t width,
            float limit, Bf16* a, cudaStream_t stream);

// out [T, D] = sum over k in order of expert_rows [T, k, D], then shared [T, D], rounded once.
void CombineExperts(const Bf16* expert_rows, const Bf16* shared, int64_t rows, int k, int64_t dim, Bf16* out,
                    cudaStream_t stream);

// One layer's routed experts, all of a kind one after the other: E2M1 pairs w1, w3 [E, I, D / 2], w2 [E, D, I / 2],
// E8M0 scales [E, I, D / 32], [E, D, I / 32].
struct ExpertWeights {
  int num_experts = 0;
  int64_t hidden = 0, width = 0;  // D, I
  const uint8_t *w1 = nullptr, *w2 = nullptr, *w3 = nullptr;
  const uint8_t *w1_scales = nullptr, *w2_scales = nullptr, *w3_scales = nullptr;
};

// A step's share of the workspace, laid out by the caller from this many bytes.
int64_t ExpertWorkspaceBytes(int num_experts, int64_t hidden, int64_t width, int k, int64_t rows);

// x: the rows of the layer, quantised [T, D]. expert_rows [T, k, D]: one row per (token, expert), in the order of
// `experts`. `workspace` on 256 bytes.
void RoutedExperts(const ExpertWeights& w, Fp8Rows x, const int32_t* experts, const float* weights, int64_t rows, int k,
                   float limit, void* workspace, Bf16* expert_rows, cudaStream_t stream);

}  // namespace millrace::cuda
