// SPDX-License-Identifier: Apache-2.0
// config.json -> ModelConfig, and every reason to refuse one.
//
// Reads top to bottom as the list of keys (docs/model.md, "Configuration"). Each key is read through a Reader, which
// remembers the first thing that is wrong, so that the list stays a list. Two kinds of keys: those that size something
// (a range is checked) and those that say which architecture this is (one value is allowed; what another would mean is
// not implemented, so it must not be ignored).
#include "engine/model/config.h"

#include <cmath>
#include <initializer_list>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/model/mapped_file.h"
#include "engine/status.h"
#include "engine/strict_json.h"
#include "nlohmann/json.hpp"

namespace millrace {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxConfigBytes = 1 << 20;
constexpr char kFile[] = "config.json";

// Positions are exact in the FP32 products of RoPE up to here.
constexpr int64_t kMaxPositions = int64_t{1} << 24;

// Reads keys of one JSON object, keeping the first error. After an error every further call does nothing.
class Reader {
 public:
  Reader(const Json& object, std::string prefix) : object_(object), prefix_(std::move(prefix)) {}

  bool Has(const char* key) const { return object_.contains(key) && !object_.at(key).is_null(); }

  // An integer in [low, high], a multiple of `multiple`. Absent is an error unless Has() was asked first.
  template <typename T>
  void Int(const char* key, T& out, int64_t low, int64_t high, int64_t multiple = 1) {
    const std::string allowed =
        absl::StrCat(multiple > 1 ? absl::StrCat("a multiple of ", multiple) : "an integer",
                     low == high ? absl::StrCat(" equal to ", low) : absl::StrCat(" from ", low, " to ", high));
    const Json* value = Find(key, allowed);
    if (value == nullptr) return;
    const bool fits = value->is_number_unsigned() ? value->get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)
                                                  : value->is_number_integer();
    if (!fits || value->get<int64_t>() < low || value->get<int64_t>() > high || value->get<int64_t>() % multiple != 0) {
      return Refuse(key, *value, allowed);
    }
    out = static_cast<T>(value->get<int64_t>());
  }

  // A finite number in [low, high]; the JSON parser already refuses NaN, Infinity and 1e999.
  void Number(const char* key, double& out, double low, double high) {
    const std::string allowed = absl::StrCat("a number from ", low, " to ", high);
    const Json* value = Find(key, allowed);
    if (value == nullptr) return;
    if (!value->is_number()) return Refuse(key, *value, allowed);
    const double number = value->get<double>();
    if (!std::isfinite(number) || number < low || number > high) return Refuse(key, *value, allowed);
    out = number;
  }

  // A key with one meaning we implement. Absent means that value too, except where `required`.
  void Only(const char* key, const Json& allowed, bool required = false) {
    const std::string text = allowed.dump();
    if (!required && !Has(key)) return;
    const Json* value = Find(key, text);
    if (value != nullptr && *value != allowed) Refuse(key, *value, text);
  }

  const Json* Find(const char* key, absl::string_view allowed) {
    if (!status_.ok()) return nullptr;
    const auto it = object_.find(key);
    if (it != object_.end()) return &*it;
    status_ = absl::InvalidArgumentError(absl::StrCat(kFile, ": ", prefix_, key, ": found nothing, allowed ", allowed));
    return nullptr;
  }

  void Refuse(absl::string_view key, const Json& found, absl::string_view allowed) {
    Refuse(key, JsonForError(found), allowed);
  }
  void Refuse(absl::string_view key, const std::string& found, absl::string_view allowed) {
    if (!status_.ok()) return;
    status_ =
        absl::InvalidArgumentError(absl::StrCat(kFile, ": ", prefix_, key, ": found ", found, ", allowed ", allowed));
  }
  void Adopt(const Reader& inner) {
    if (status_.ok()) status_ = inner.status_;
  }

  const absl::Status& status() const { return status_; }

 private:
  const Json& object_;
  std::string prefix_;
  absl::Status status_;
};

void ReadArchitecture(const Json& root, Reader& r) {
  r.Only("model_type", "deepseek_v4", /*required=*/true);
  r.Only("architectures", Json::array({"DeepseekV4ForCausalLM"}));
  r.Only("hidden_act", "silu");
  r.Only("scoring_func", "sqrtsoftplus");
  r.Only("topk_method", "noaux_tc");
  r.Only("norm_topk_prob", true);
  r.Only("tie_word_embeddings", false);
  r.Only("attention_bias", false);
  r.Only("num_key_value_heads", 1);
  r.Only("n_shared_experts", 1);
  // How transformers 5 writes what rope_theta, compress_rope_theta and rope_scaling say. Reading half of it would give
  // wrong angles silently.
  if (root.contains("rope_parameters")) {
    r.Refuse("rope_parameters", root.at("rope_parameters"),
             "only rope_theta, compress_rope_theta and rope_scaling, as in the released config.json");
  }
}

// compress_ratios (released) or layer_types (transformers): if both are there they must agree.
void ReadSchedule(const Json& root, Reader& r, ModelConfig& c) {
  const auto layers = static_cast<size_t>(c.num_hidden_layers);
  std::vector<LayerKind> from_types;
  if (r.Has("layer_types")) {
    const std::string allowed =
        absl::StrCat("an array of ", layers,
                     " of \"sliding_attention\", \"compressed_sparse_attention\", \"heavily_compressed_attention\"");
    const Json& types = root.at("layer_types");
    if (!types.is_array()) return r.Refuse("layer_types", types, allowed);
    if (types.size() != layers) return r.Refuse("layer_types", absl::StrCat(types.size(), " entries"), allowed);
    for (size_t i = 0; i < layers; ++i) {
      if (types[i] == "sliding_attention") {
        from_types.push_back(LayerKind::kWindow);
      } else if (types[i] == "compressed_sparse_attention") {
        from_types.push_back(LayerKind::kCsa);
      } else if (types[i] == "heavily_compressed_attention") {
        from_types.push_back(LayerKind::kHca);
      } else {
        return r.Refuse(absl::StrCat("layer_types[", i, "]"), types[i], allowed);
      }
    }
    r.Only("compress_rates", {{"compressed_sparse_attention", 4}, {"heavily_compressed_attention", 128}});
  }
  if (!r.Has("compress_ratios") && !from_types.empty()) {
    c.layer_kinds = std::move(from_types);
    return;
  }
  const std::string allowed = absl::StrCat("an array of at least ", layers, " of 0, 4, 128");
  const Json* ratios = r.Find("compress_ratios", allowed);
  if (ratios == nullptr) return;
  if (!ratios->is_array()) return r.Refuse("compress_ratios", *ratios, allowed);
  if (ratios->size() < layers) return r.Refuse("compress_ratios", absl::StrCat(ratios->size(), " entries"), allowed);
  for (size_t i = 0; i < ratios->size(); ++i) {
    const Json& ratio = (*ratios)[i];
    if (!ratio.is_number_integer() || (ratio != 0 && ratio != 4 && ratio != 128)) {
      return r.Refuse(absl::StrCat("compress_ratios[", i, "]"), ratio, "0, 4 or 128");
    }
    // Entries past the backbone stand for MTP or DSpark layers, which always see the window only; their number differs
    // between releases.
    if (i >= layers) continue;
    c.layer_kinds.push_back(ratio == 0 ? LayerKind::kWindow : ratio == 4 ? LayerKind::kCsa : LayerKind::kHca);
  }
  if (!from_types.empty() && from_types != c.layer_kinds) {
    r.Refuse("layer_types", std::string("other kinds of layers than compress_ratios"),
             "the same in both, or only one of them");
  }
}

void ReadMlpSchedule(const Json& root, Reader& r, const ModelConfig& c) {
  if (!r.Has("mlp_layer_types")) return;
  Json expected = Json::array();
  for (int i = 0; i < c.num_hidden_layers; ++i) expected.push_back(c.hash_routed(i) ? "hash_moe" : "moe");
  if (root.at("mlp_layer_types") != expected) {
    r.Refuse("mlp_layer_types", root.at("mlp_layer_types"),
             absl::StrCat(c.num_hash_layers, " of \"hash_moe\", then \"moe\" (num_hash_layers)"));
  }
}

void ReadYarn(const Json& root, Reader& r, ModelConfig& c) {
  if (!r.Has("rope_scaling")) return;
  const Json& object = root.at("rope_scaling");
  if (!object.is_object()) return r.Refuse("rope_scaling", object, "an object of type \"yarn\", or nothing");
  Reader y(object, "rope_scaling.");
  y.Only("type", "yarn", /*required=*/!y.Has("rope_type"));
  y.Only("rope_type", "yarn");
  // V4 multiplies neither cos/sin nor the softmax scale (a factor here would be silently lost).
  for (const char* key : {"attention_factor", "mscale", "mscale_all_dim"}) {
    if (y.Has(key) && object.at(key) != 1) y.Refuse(key, object.at(key), "1 or nothing");
  }
  YarnConfig yarn;
  y.Number("factor", yarn.factor, 1, 65536);
  y.Int("original_max_position_embeddings", yarn.original_max_position_embeddings, 1, kMaxPositions);
  if (y.Has("beta_fast")) y.Number("beta_fast", yarn.beta_fast, 1e-3, 1e6);
  if (y.Has("beta_slow")) y.Number("beta_slow", yarn.beta_slow, 1e-3, 1e6);
  if (y.status().ok() && yarn.beta_slow > yarn.beta_fast) {
    y.Refuse("beta_slow", absl::StrCat(yarn.beta_slow), absl::StrCat("at most beta_fast, ", yarn.beta_fast));
  }
  r.Adopt(y);
  c.yarn = yarn;
}

void ReadQuantization(const Json& root, Reader& r, ModelConfig& c) {
  if (!r.Has("quantization_config")) return;  // plain BF16/F32; a wrong guess shows as a dtype error at load
  const Json& object = root.at("quantization_config");
  if (!object.is_object()) return r.Refuse("quantization_config", object, "an object, or nothing");
  Reader q(object, "quantization_config.");
  q.Only("quant_method", "fp8", /*required=*/true);
  q.Only("fmt", "e4m3");
  q.Only("scale_fmt", "ue8m0", /*required=*/true);
  q.Only("activation_scheme", "dynamic");
  q.Only("weight_block_size", Json::array({128, 128}), /*required=*/true);
  r.Adopt(q);
  // The first config.json of the preview had no expert_dtype although its experts are FP4; the tensors' dtypes decide.
  r.Only("expert_dtype", "fp4");
  c.weight_format = WeightFormat::kFp8;
}

// Keys that other loaders act on by importing or fetching something. Nothing here does; they are only named.
void NoteIgnoredKeys(const Json& root, ModelConfig& c) {
  for (const char* key :
       {"auto_map", "trust_remote_code", "custom_pipelines", "_name_or_path", "_attn_implementation"}) {
    if (root.contains(key)) c.ignored_keys.push_back(key);
  }
}

void ReadSizes(Reader& r, ModelConfig& c) {
  r.Int("vocab_size", c.vocab_size, 2, 1 << 24);
  // FP4 scales cover 32 values along K, so K of every expert and of what feeds it comes in 32s.
  r.Int("hidden_size", c.hidden_size, 32, 65536, 32);
  r.Int("num_hidden_layers", c.num_hidden_layers, 1, 512);
  r.Int("num_attention_heads", c.num_attention_heads, 1, 1024);
  // Fixed by the cache entry formats: 448 + 64 values of an entry, 128 of an index key, pages of lcm(4, 128) tokens.
  r.Int("head_dim", c.head_dim, 512, 512);
  r.Int("qk_rope_head_dim", c.rope_head_dim, 64, 64);
  r.Int("index_head_dim", c.index_head_dim, 128, 128);
  r.Int("sliding_window", c.sliding_window, 128, 128);
  r.Int("hc_mult", c.hc_mult, 4, 4);
  r.Int("q_lora_rank", c.q_lora_rank, 32, 65536, 32);
  r.Int("o_groups", c.o_groups, 1, 1024);
  r.Int("o_lora_rank", c.o_lora_rank, 32, 65536, 32);
  r.Int("index_n_heads", c.index_n_heads, 1, 1024);
  // Window and selected entries are one attention segment of 1,152 keys.
  r.Int("index_topk", c.index_topk, 1, 1024);
  r.Int("n_routed_experts", c.n_routed_experts, 1, 4096);
  r.Int("num_experts_per_tok", c.num_experts_per_tok, 1, 64);
  r.Int("moe_intermediate_size", c.moe_intermediate_size, 32, 65536, 32);
  r.Int("num_hash_layers", c.num_hash_layers, 0, 512);
  r.Int("max_position_embeddings", c.max_position_embeddings, 1, kMaxPositions);
  r.Int("hc_sinkhorn_iters", c.hc_sinkhorn_iters, 1, 1000);
  if (r.Has("num_nextn_predict_layers")) r.Int("num_nextn_predict_layers", c.num_nextn_predict_layers, 0, 1);
  if (r.Has("bos_token_id")) r.Int("bos_token_id", c.bos_token_id, 0, 1 << 24);
  if (r.Has("eos_token_id")) r.Int("eos_token_id", c.eos_token_id, 0, 1 << 24);
}

void ReadNumbers(Reader& r, ModelConfig& c) {
  r.Number("routed_scaling_factor", c.routed_scaling_factor, 1e-6, 1e6);
  r.Number("swiglu_limit", c.swiglu_limit, 1e-6, 1e6);
  r.Number("hc_eps", c.hc_eps, 1e-12, 1);
  r.Number("rms_norm_eps", c.rms_norm_eps, 1e-12, 1);
  r.Number("rope_theta", c.rope_theta, 1, 1e12);
  r.Number("compress_rope_theta", c.compress_rope_theta, 1, 1e12);
}

void CheckTogether(Reader& r, const ModelConfig& c) {
  if (c.num_attention_heads % c.o_groups != 0) {
    r.Refuse("o_groups", absl::StrCat(c.o_groups),
             absl::StrCat("a divisor of num_attention_heads, ", c.num_attention_heads));
  }
  if (c.num_experts_per_tok > c.n_routed_experts) {
    r.Refuse("num_experts_per_tok", absl::StrCat(c.num_experts_per_tok),
             absl::StrCat("at most n_routed_experts, ", c.n_routed_experts));
  }
  if (c.num_hash_layers > c.num_hidden_layers) {
    r.Refuse("num_hash_layers", absl::StrCat(c.num_hash_layers),
             absl::StrCat("at most num_hidden_layers, ", c.num_hidden_layers));
  }
  for (const auto& [key, id] : {std::pair{"bos_token_id", c.bos_token_id}, std::pair{"eos_token_id", c.eos_token_id}}) {
    if (id >= c.vocab_size) r.Refuse(key, absl::StrCat(id), absl::StrCat("below vocab_size, ", c.vocab_size));
  }
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfig::Parse(std::string_view json_text) {
  if (json_text.size() > kMaxConfigBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(kFile, ": file size: found ", json_text.size(), " bytes, allowed ", kMaxConfigBytes));
  }
  ASSIGN_OR_RETURN(const Json root, ParseJsonObject(json_text, kFile));
  ModelConfig c;
  Reader r(root, "");
  ReadArchitecture(root, r);
  ReadSizes(r, c);
  ReadNumbers(r, c);
  RETURN_IF_ERROR(r.status());
  CheckTogether(r, c);
  ReadSchedule(root, r, c);
  ReadMlpSchedule(root, r, c);
  ReadYarn(root, r, c);
  ReadQuantization(root, r, c);
  for (const auto& item : root.items()) c.dspark |= absl::StartsWith(item.key(), "dspark_");
  NoteIgnoredKeys(root, c);
  RETURN_IF_ERROR(r.status());
  return c;
}

absl::StatusOr<ModelConfig> ModelConfig::Load(const std::string& model_dir) {
  ASSIGN_OR_RETURN(const ScopedFd dir, OpenDirectory(model_dir));
  ASSIGN_OR_RETURN(const ScopedFd file, OpenRegularFileBeneath(dir, kFile));
  ASSIGN_OR_RETURN(const std::string text, ReadWholeFile(file, kFile, kMaxConfigBytes));
  return Parse(text);
}

}  // namespace millrace
