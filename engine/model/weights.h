// SPDX-License-Identifier: Apache-2.0
// The backbone's weights as the operations want them: packed, widened where the numerics ask, one struct per layer.
//
// Built once from a Checkpoint, whose names and shapes are already proven; routed experts are engine/moe/local_experts.
// Members mirror tensor names (docs/model.md, "Checkpoint"). Thread: immutable after Load.
#pragma once

#include <functional>
#include <vector>

#include "engine/model/checkpoint.h"
#include "engine/numerics.h"
#include "engine/ops/ops.h"

namespace millrace {

// A weight by name. `release` keeps FP8 and FP4 packed; `exact` widens them to BF16, which holds every product of a
// code and a power-of-two scale exactly.
PackedLinear LoadLinear(const Checkpoint& checkpoint, const std::string& name, Numerics numerics);
// A tensor of any float type as F32.
std::vector<float> LoadF32(const Checkpoint& checkpoint, const std::string& name);

struct LayerWeights {
  HyperConnectionWeights hc_attn, hc_ffn;
  std::vector<float> attn_norm, ffn_norm;
  // Attention.
  PackedLinear wq_a, wq_b, wkv, wo_b;
  std::vector<PackedLinear> wo_a;  // per group [R, H * 512 / G]
  std::vector<float> q_norm, kv_norm, attn_sink;
  CompressorWeights compressor;                 // CSA and HCA layers
  PackedLinear index_wq_b, index_weights_proj;  // CSA layers
  CompressorWeights index_compressor;
  // MoE.
  PackedLinear gate;
  std::vector<float> gate_bias;  // scored layers
  std::vector<int32_t> tid2eid;  // hash-routed layers [V, top_k]
  PackedLinear shared_w1, shared_w2, shared_w3;

  int64_t bytes() const;
};

struct MtpWeights {
  LayerWeights block;
  PackedLinear e_proj, h_proj;
  std::vector<float> enorm, hnorm, norm;
  HyperConnectionWeights hc_head;
};

struct ModelWeights {
  HostRows embed;
  PackedLinear head;
  std::vector<float> norm;
  HyperConnectionWeights hc_head;
  std::vector<LayerWeights> layers;
  std::vector<MtpWeights> mtp;  // empty or one
  int64_t bytes = 0;

  static ModelWeights Load(const Checkpoint& checkpoint, Numerics numerics, bool mtp,
                           const std::function<void(int64_t, int64_t)>& progress);
};

}  // namespace millrace
