// SPDX-License-Identifier: Apache-2.0
// Routed experts on the tensor cores, FP4 weights packed until they are in registers: twin of LocalExperts. Pairs
// (token, expert) are grouped by expert on the device.
//
// Numerics of the FP4 products: operands widened exactly to BF16, K in ascending blocks of 128 summed by the tensor
// cores, the four scales of a block inside it as exact powers of two on the codes (packed_experts_plan.h), one FP32
// promotion a block. The CPU promotes per 32, in FP32 as well.
#pragma once

#include "engine/ops/cuda_moe.h"

namespace millrace::cuda {

// One layer's routed experts, packed, all of a kind one after the other: PackedGateUpBytes and PackedDownBytes each, on
// 128 bytes.
struct ExpertWeights {
  int num_experts = 0;
  int64_t hidden = 0, width = 0;  // D, I
  const uint8_t *gate_up = nullptr, *down = nullptr;
};

// Packs one expert: E2M1 pairs w1, w3 [I, D / 2], w2 [D, I / 2] and E8M0 scales [I, D / 32], [D, I / 32] as the
// checkpoint has them, in device memory, into `gate_up` and `down`. `out_of_range` (device, may be null) is incremented
// for each group whose scale lies more than 2^15 below the largest of its block of 128 and that is not all zeros: it
// cannot be held exactly, and a load must refuse the tensor.
struct RawExpert {
  const uint8_t *w1 = nullptr, *w2 = nullptr, *w3 = nullptr;
  const uint8_t *w1_scales = nullptr, *w2_scales = nullptr, *w3_scales = nullptr;
};
void PackExpert(const RawExpert& raw, int64_t hidden, int64_t width, uint8_t* gate_up, uint8_t* down,
                int32_t* out_of_range, cudaStream_t stream);

// A step's share of the workspace, laid out by the caller from this many bytes, on 256.
int64_t ExpertWorkspaceBytes(int num_experts, int64_t hidden, int64_t width, int k, int64_t rows);

// x: the rows of the layer, rounded [T, D]. expert_rows [T, k, D]: one row per (token, expert), in the order of
// `experts`. D and I are multiples of 32.
void RoutedExperts(const ExpertWeights& w, RoundedRows x, const int32_t* experts, const float* weights, int64_t rows,
                   int k, float limit, void* workspace, Bf16* expert_rows, cudaStream_t stream);

// The two halves of RoutedExperts, for tests: what the first leaves in the workspace is what the second reads.
struct ExpertActivations {
  const int32_t* order = nullptr;  // [T * k] pair at each place
  const Bf16* rounded = nullptr;   // [T * k, I] by place
};
ExpertActivations ExpertActivationsOf(const ExpertWeights& w, int64_t rows, int k, void* workspace);

}  // namespace millrace::cuda
