// SPDX-License-Identifier: Apache-2.0
// The model's weights in device memory: device twin of weights.h and of LocalExperts.
//
// Linears keep the bytes of the checkpoint; those that read one input lie one below the other, so that one product
// serves them all. wo_a, stored FP8 and multiplied in BF16, is widened on the way (exactly); routed experts are packed
// (cuda_packed_experts.h), also exactly; norms become F32. Read once from the mapped checkpoint through page-locked
// staging. Members mirror tensor names (docs/model.md, "Checkpoint"). Thread: immutable after Load.
#pragma once

#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/device/cuda_device.h"
#include "engine/model/checkpoint.h"
#include "engine/ops/cuda_compressor.h"
#include "engine/ops/cuda_hyper_connection.h"
#include "engine/ops/cuda_linear.h"
#include "engine/ops/cuda_moe.h"
#include "engine/ops/cuda_packed_experts.h"

namespace millrace::cuda {

// Linears of one input as one weight. Part i has rows start[i] and following; FP8 parts start on a block of 128 rows,
// rows between are zeros.
struct StackedWeight {
  Weight all;
  std::vector<int64_t> start;
};

struct LayerWeights {
  HyperWeights hc_attn, hc_ffn;
  const float *attn_norm = nullptr, *ffn_norm = nullptr;
  // Attention.
  StackedWeight q_kv;     // wq_a, wkv
  StackedWeight q_index;  // wq_b; CSA layers: indexer.wq_b
  Weight wo_a, wo_b;      // wo_a: of one group, groups one after the other
  const float *q_norm = nullptr, *kv_norm = nullptr, *attn_sink = nullptr;
  // CSA and HCA layers: compressor.wkv, compressor.wgate; CSA layers: indexer.compressor.wkv, .wgate, weights_proj.
  StackedWeight compress;
  PoolWeights pool, index_pool;
  // MoE.
  Weight gate;
  const float* gate_bias = nullptr;  // scored layers
  const int32_t* tid2eid = nullptr;  // hash-routed layers
  StackedWeight shared_up;           // w1, w3
  Weight shared_w2;
  ExpertWeights experts;  // none if experts run elsewhere
};

struct MtpWeights {
  LayerWeights block;
  Weight e_proj, h_proj;
  const float *enorm = nullptr, *hnorm = nullptr, *norm = nullptr;
  HyperWeights hc_head;
};

struct ModelWeights {
  const Bf16* embed = nullptr;
  Weight head;
  const float* norm = nullptr;
  HyperWeights hc_head;
  std::vector<LayerWeights> layers;
  std::vector<MtpWeights> mtp;  // empty or one

  // Bytes that Load takes of a bump, counted by the same code.
  static int64_t Bytes(const Checkpoint& checkpoint, bool mtp, bool with_experts);
  // Copies everything to memory taken from `bump`; returns when it is there. ResourceExhausted: no staging memory.
  // FailedPrecondition: FP4 scales too far apart to be packed. InvalidArgument: a weight that is not a number.
  static absl::StatusOr<ModelWeights> Load(const Checkpoint& checkpoint, bool mtp, bool with_experts, Bump& bump,
                                           const std::function<void(int64_t, int64_t)>& progress);
};

// The routed experts `ids` of every layer, the MTP module's last if asked for: what a member of an expert pool holds.
// An expert's place in an ExpertWeights is its place in `ids`. Bytes and errors as above.
int64_t RoutedExpertBytes(const Checkpoint& checkpoint, absl::Span<const int> ids, bool mtp);
absl::StatusOr<std::vector<ExpertWeights>> LoadRoutedExperts(const Checkpoint& checkpoint, absl::Span<const int> ids,
                                                             bool mtp, Bump& bump,
                                                             const std::function<void(int64_t, int64_t)>& progress);

}  // namespace millrace::cuda
