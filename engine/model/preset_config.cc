// SPDX-License-Identifier: Apache-2.0
// Flash's, Pro's and a tiny config.json: see preset_config.h.
#include "engine/model/preset_config.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"

namespace millrace {
namespace {

using Json = nlohmann::ordered_json;

struct Sizes {
  int vocab, hidden, heads, q_lora, groups, o_lora, index_heads, index_topk, inter, experts, top_k, hash_layers;
  int max_positions;
  double route_scale;
  std::vector<int> ratios;  // of the backbone
};

std::vector<int> Alternating(int first, int pairs) {
  std::vector<int> ratios = {first, first};
  for (int i = 0; i < pairs; ++i) ratios.insert(ratios.end(), {4, 128});
  ratios.push_back(4);
  return ratios;
}

Sizes SizesOf(ModelPreset preset) {
  switch (preset) {
    case ModelPreset::kFlash:
      return {129280, 4096, 64, 1024, 8, 1024, 64, 512, 2048, 256, 6, 3, 1048576, 1.5, Alternating(0, 20)};
    case ModelPreset::kPro:
      return {129280, 7168, 128, 1536, 16, 1024, 64, 1024, 3072, 384, 6, 3, 1048576, 2.5, Alternating(128, 29)};
    case ModelPreset::kTiny:
      return {512, 256, 4, 128, 2, 64, 16, 16, 128, 8, 2, 1, 65536, 1.5, {0, 4, 128, 4, 128, 0}};
  }
  CHECK(false, "preset");
}

}  // namespace

std::string PresetConfigJson(ModelPreset preset, PresetChanges changes) {
  Sizes s = SizesOf(preset);
  const int all_layers = static_cast<int>(s.ratios.size());
  const int layers = changes.layers == 0 ? all_layers : changes.layers;
  const int experts = changes.experts == 0 ? s.experts : changes.experts;
  CHECK(layers >= 1 && layers <= all_layers, absl::StrCat(layers, " layers, the preset has ", all_layers));
  CHECK(experts >= 1 && experts <= s.experts, absl::StrCat(experts, " experts, the preset has ", s.experts));
  s.ratios.resize(static_cast<size_t>(layers));
  s.ratios.push_back(0);  // MTP
  Json config = {{"architectures", {"DeepseekV4ForCausalLM"}},
                 {"attention_bias", false},
                 {"attention_dropout", 0.0},
                 {"bos_token_id", 0},
                 {"compress_ratios", s.ratios},
                 {"compress_rope_theta", 160000},
                 {"eos_token_id", 1},
                 {"expert_dtype", "fp4"},
                 {"hc_eps", 1e-6},
                 {"hc_mult", 4},
                 {"hc_sinkhorn_iters", 20},
                 {"head_dim", 512},
                 {"hidden_act", "silu"},
                 {"hidden_size", s.hidden},
                 {"index_head_dim", 128},
                 {"index_n_heads", s.index_heads},
                 {"index_topk", s.index_topk},
                 {"initializer_range", 0.02},
                 {"max_position_embeddings", s.max_positions},
                 {"model_type", "deepseek_v4"},
                 {"moe_intermediate_size", s.inter},
                 {"n_routed_experts", experts},
                 {"n_shared_experts", 1},
                 {"norm_topk_prob", true},
                 {"num_attention_heads", s.heads},
                 {"num_experts_per_tok", std::min(s.top_k, experts)},
                 {"num_hash_layers", std::min(s.hash_layers, layers)},
                 {"num_hidden_layers", layers},
                 {"num_key_value_heads", 1},
                 {"num_nextn_predict_layers", 1},
                 {"o_groups", s.groups},
                 {"o_lora_rank", s.o_lora},
                 {"q_lora_rank", s.q_lora},
                 {"qk_rope_head_dim", 64},
                 {"quantization_config",
                  {{"activation_scheme", "dynamic"},
                   {"fmt", "e4m3"},
                   {"quant_method", "fp8"},
                   {"scale_fmt", "ue8m0"},
                   {"weight_block_size", {128, 128}}}},
                 {"rms_norm_eps", 1e-6},
                 {"rope_scaling",
                  {{"beta_fast", 32},
                   {"beta_slow", 1},
                   {"factor", 16},
                   {"original_max_position_embeddings", s.max_positions / 16},
                   {"type", "yarn"}}},
                 {"rope_theta", 10000},
                 {"routed_scaling_factor", s.route_scale},
                 {"scoring_func", "sqrtsoftplus"},
                 {"sliding_window", 128},
                 {"swiglu_limit", 10.0},
                 {"tie_word_embeddings", false},
                 {"topk_method", "noaux_tc"},
                 {"torch_dtype", "bfloat16"},
                 {"transformers_version", "4.57.1"},
                 {"use_cache", true},
                 {"vocab_size", s.vocab}};
  if (changes.plain) {
    config.erase("expert_dtype");
    config.erase("quantization_config");
  }
  return config.dump(2) + "\n";
}

}  // namespace millrace
