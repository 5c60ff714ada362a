// SPDX-License-Identifier: Apache-2.0
// The model's weights in device memory, in the bytes of the checkpoint: device twin of weights.h and of LocalExperts.
//
// Only wo_a changes form: stored FP8, multiplied in BF16, it is widened on the way (exactly). Norms become F32. Read
// once from the mapped checkpoint through page-locked staging. Members mirror tensor names (docs/model.md,
// "Checkpoint"). Thread: immutable after Load.
#pragma once

#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/device/cuda_device.h"
#include "engine/model/checkpoint.h"
#include "engine/ops/cuda_compressor.h"
#include "engine/ops/cuda_hyper_connection.h"
#include "engine/ops/cuda_linear.h"
#include "engine/ops/cuda_moe.h"

namespace millrace::cuda {

struct CompressorWeights {
  Weight wkv, wgate;
  PoolWeights pool;
};

struct LayerWeights {
  HyperWeights hc_attn, hc_ffn;
  const float *attn_norm = nullptr, *ffn_norm = nullptr;
  // Attention.
  Weight wq_a, wq_b, wkv, wo_a, wo_b;  // wo_a: of one group, groups one after the other
  const float *q_norm = nullptr, *kv_norm = nullptr, *attn_sink = nullptr;
  CompressorWeights compressor;           // CSA and HCA layers
  Weight index_wq_b, index_weights_proj;  // CSA layers
  CompressorWeights index_compressor;
  // MoE.
  Weight gate;
  const float* gate_bias = nullptr;  // scored layers
  const int32_t* tid2eid = nullptr;  // hash-routed layers
  Weight shared_w1, shared_w2, shared_w3;
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
  static absl::StatusOr<ModelWeights> Load(const Checkpoint& checkpoint, bool mtp, bool with_experts, Bump& bump,
                                           const std::function<void(int64_t, int64_t)>& progress);
};

}  // namespace millrace::cuda
