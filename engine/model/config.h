// SPDX-License-Identifier: Apache-2.0
// What config.json says, checked: the shape of one DeepSeek-V4 model.
//
// Every number the engine sizes anything by is here, already proven to be in range; nothing else parses config.json.
// Anything this architecture is not is refused by naming the key, what was found and what is allowed. Keys that look
// executable (auto_map, trust_remote_code) are inert. Thread: immutable after Parse, use from anywhere.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace millrace {

// Attention of one layer, by its compression ratio in config.json (0, 4, 128).
enum class LayerKind { kWindow, kCsa, kHca };

struct YarnConfig {
  double factor = 1;
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32;
  double beta_slow = 1;
};

// How linears are stored. kFp8 is the released layout: FP8 blocks of 128x128 with E8M0 scales; experts are then FP4
// packed two a byte. kPlain is BF16 or F32 with the same names and no scales: `exact` numerics only.
enum class WeightFormat { kPlain, kFp8 };

struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;             // D
  int num_hidden_layers = 0;           // L, without MTP
  int num_attention_heads = 0;         // H
  int head_dim = 0;                    // 512
  int rope_head_dim = 0;               // 64, the last dims of a head
  int q_lora_rank = 0;                 // Q
  int o_groups = 0;                    // G
  int o_lora_rank = 0;                 // R, per group
  int sliding_window = 0;              // 128, the query itself included
  std::vector<LayerKind> layer_kinds;  // [L]
  int index_n_heads = 0;
  int index_head_dim = 0;  // 128
  int index_topk = 0;
  int n_routed_experts = 0;       // E
  int num_experts_per_tok = 0;    // top-k of the gate
  int moe_intermediate_size = 0;  // I, routed and shared
  int num_hash_layers = 0;        // layers 0 .. n-1 route by token id
  double routed_scaling_factor = 1;
  double swiglu_limit = 10;
  int hc_mult = 4;  // residual streams
  int hc_sinkhorn_iters = 20;
  double hc_eps = 1e-6;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;            // layers of kind kWindow, and MTP
  double compress_rope_theta = 160000;  // layers of kind kCsa and kHca
  std::optional<YarnConfig> yarn;       // compressed layers only; absent means no YaRN
  int num_nextn_predict_layers = 0;     // MTP modules, 0 or 1
  int64_t max_position_embeddings = 0;
  int32_t bos_token_id = 0;
  int32_t eos_token_id = 1;
  WeightFormat weight_format = WeightFormat::kPlain;
  bool dspark = false;  // config.json has dspark_* keys: later encoder, no classic MTP
  // Keys that would make other loaders run or fetch code (auto_map, trust_remote_code ...): present, ignored. Whoever
  // loads the model says so once.
  std::vector<std::string> ignored_keys;

  int ratio(int layer) const {
    return layer_kinds[layer] == LayerKind::kCsa ? 4 : layer_kinds[layer] == LayerKind::kHca ? 128 : 0;
  }
  bool hash_routed(int layer) const { return layer < num_hash_layers; }
  bool has_mtp() const { return num_nextn_predict_layers > 0 && !dspark; }

  // Parses and checks the text of a config.json. InvalidArgument: "config.json: key: found X, allowed Y".
  static absl::StatusOr<ModelConfig> Parse(std::string_view json_text);
  // Reads `model_dir`/config.json (at most 1 MiB). NotFound, or as Parse.
  static absl::StatusOr<ModelConfig> Load(const std::string& model_dir);
};

}  // namespace millrace
