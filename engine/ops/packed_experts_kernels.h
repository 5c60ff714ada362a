// SPDX-License-Identifier: Apache-2.0
// The two grouped products behind RoutedExperts, as packed_experts_cuda.cu launches them. Not for other callers.
#pragma once

#include "engine/ops/cuda_packed_experts.h"
#include "engine/ops/packed_experts_plan.h"

namespace millrace::cuda {

// Places `begin .. begin + count` of the sorted order, all of one expert.
struct PackedExpertTile {
  int32_t expert = 0, begin = 0, count = 0;
};

// What a step's kernels hand to each other.
struct ExpertWorkspace {
  int32_t* order = nullptr;           // [P] pair at each place
  PackedExpertTile* tiles = nullptr;  // [MaxExpertTiles]
  int32_t* num_tiles = nullptr;       // [1]
  Bf16* gathered = nullptr;           // [P, D] rows of x by place, on path kMany
  Bf16* activations = nullptr;        // [P, I] by place, rounded
};

// The workspace of a step, laid out in `workspace`.
ExpertWorkspace ExpertWorkspaceAt(const ExpertWeights& w, int64_t pairs, void* workspace);

// Gate and up products of every tile, SwiGLU, the pair's weight, rounding: into workspace.activations.
void ExpertGateUp(ExpertPath path, const ExpertWeights& w, RoundedRows x, int64_t rows, const float* weights, int top_k,
                  float limit, const ExpertWorkspace& workspace, int multiprocessors, cudaStream_t stream);
// Down product: workspace.activations to expert_rows [P, D] in the order of pairs.
void ExpertDown(ExpertPath path, const ExpertWeights& w, int64_t pairs, const ExpertWorkspace& workspace,
                Bf16* expert_rows, int multiprocessors, cudaStream_t stream);

}  // namespace millrace::cuda
