// SPDX-License-Identifier: Apache-2.0
// Which tensors a checkpoint holds: docs/model.md, "Checkpoint", as code.
//
// The order is the released shards' order: embedding, layers ascending, head, MTP. The test sums this list and must
// find the released models' tensor counts and bytes exactly, which proves that nothing is missing or misshapen.
#include "absl/strings/str_cat.h"
#include "engine/model/checkpoint.h"

namespace millrace {
namespace {

constexpr int64_t kFp8Block = 128;  // FP8 scales cover 128 x 128 weights, ragged at the edges
constexpr int64_t kFp4Group = 32;   // FP4 scales cover 32 weights along K

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

class InventoryBuilder {
 public:
  explicit InventoryBuilder(const ModelConfig& config)
      : c_(config), released_(config.weight_format == WeightFormat::kFp8) {}

  std::vector<TensorSpec> Build() {
    Add("embed.weight", {c_.vocab_size, c_.hidden_size}, DType::kBF16);
    for (layer_ = 0; layer_ < c_.num_hidden_layers; ++layer_) {
      prefix_ = absl::StrCat("layers.", layer_, ".");
      Block(c_.layer_kinds[layer_], c_.hash_routed(layer_));
    }
    layer_ = -1;
    prefix_.clear();
    Add("norm.weight", {c_.hidden_size}, DType::kBF16);
    Add("head.weight", {c_.vocab_size, c_.hidden_size}, DType::kBF16);
    HyperHead();
    if (c_.has_mtp()) Mtp();
    return std::move(specs_);
  }

 private:
  void Mtp() {
    layer_ = c_.num_hidden_layers;
    prefix_ = "mtp.0.";
    Block(LayerKind::kWindow, /*hash_routed=*/false);
    const int64_t d = c_.hidden_size;
    Fp8("e_proj", d, d);
    Fp8("h_proj", d, d);
    for (const char* name : {"enorm.weight", "hnorm.weight", "norm.weight"}) Add(name, {d}, DType::kBF16);
    HyperHead();
  }

  void HyperHead() {
    const int64_t m = c_.hc_mult;
    Add("hc_head_fn", {m, m * c_.hidden_size}, DType::kF32);
    Add("hc_head_base", {m}, DType::kF32);
    Add("hc_head_scale", {1}, DType::kF32);
  }

  void Block(LayerKind kind, bool hash_routed) {
    const int64_t d = c_.hidden_size;
    const int64_t mixes = c_.hc_mult * (c_.hc_mult + 2);  // pre, post and the comb matrix
    for (const char* part : {"attn", "ffn"}) {
      Add(absl::StrCat(part, "_norm.weight"), {d}, DType::kBF16);
      Add(absl::StrCat("hc_", part, "_fn"), {mixes, c_.hc_mult * d}, DType::kF32);
      Add(absl::StrCat("hc_", part, "_base"), {mixes}, DType::kF32);
      Add(absl::StrCat("hc_", part, "_scale"), {3}, DType::kF32);
    }
    Attention(kind);
    Moe(hash_routed);
  }

  void Attention(LayerKind kind) {
    const int64_t d = c_.hidden_size, heads = c_.num_attention_heads, hd = c_.head_dim, q = c_.q_lora_rank;
    const int64_t grouped_rank = int64_t{c_.o_groups} * c_.o_lora_rank;
    Add("attn.attn_sink", {heads}, DType::kF32);
    Fp8("attn.wq_a", q, d);
    Add("attn.q_norm.weight", {q}, DType::kBF16);
    Fp8("attn.wq_b", heads * hd, q);
    Fp8("attn.wkv", hd, d);
    Add("attn.kv_norm.weight", {hd}, DType::kBF16);
    Fp8("attn.wo_a", grouped_rank, heads * hd / c_.o_groups);
    Fp8("attn.wo_b", d, grouped_rank);
    if (kind == LayerKind::kHca) Compressor("attn.compressor", 128, hd, hd);
    if (kind == LayerKind::kCsa) {
      // Overlapping blocks: each token has a row for its own block and one for the next, hence twice the width.
      Compressor("attn.compressor", 4, 2 * hd, hd);
      const int64_t index_heads = c_.index_n_heads, index_dim = c_.index_head_dim;
      Fp8("attn.indexer.wq_b", index_heads * index_dim, q);
      Add("attn.indexer.weights_proj.weight", {index_heads, d}, DType::kBF16);
      Compressor("attn.indexer.compressor", 4, 2 * index_dim, index_dim);
    }
  }

  void Compressor(const std::string& name, int64_t ratio, int64_t width, int64_t entry_dim) {
    Add(absl::StrCat(name, ".wkv.weight"), {width, c_.hidden_size}, DType::kBF16);
    Add(absl::StrCat(name, ".wgate.weight"), {width, c_.hidden_size}, DType::kBF16);
    Add(absl::StrCat(name, ".ape"), {ratio, width}, DType::kF32);
    Add(absl::StrCat(name, ".norm.weight"), {entry_dim}, DType::kBF16);
  }

  void Moe(bool hash_routed) {
    const int64_t d = c_.hidden_size, inter = c_.moe_intermediate_size;
    Add("ffn.gate.weight", {c_.n_routed_experts, d}, DType::kBF16);
    if (hash_routed) {
      Add("ffn.gate.tid2eid", {c_.vocab_size, c_.num_experts_per_tok}, DType::kI64);
    } else {
      Add("ffn.gate.bias", {c_.n_routed_experts}, DType::kF32);
    }
    Fp8("ffn.shared_experts.w1", inter, d);
    Fp8("ffn.shared_experts.w2", d, inter);
    Fp8("ffn.shared_experts.w3", inter, d);
    for (expert_ = 0; expert_ < c_.n_routed_experts; ++expert_) {
      const std::string name = absl::StrCat("ffn.experts.", expert_);
      Fp4(absl::StrCat(name, ".w1"), inter, d);
      Fp4(absl::StrCat(name, ".w2"), d, inter);
      Fp4(absl::StrCat(name, ".w3"), inter, d);
    }
    expert_ = -1;
  }

  void Fp8(absl::string_view name, int64_t out, int64_t in) {
    Add(absl::StrCat(name, ".weight"), {out, in}, DType::kF8E4M3, /*quantised=*/true);
    if (released_) Add(absl::StrCat(name, ".scale"), {CeilDiv(out, kFp8Block), CeilDiv(in, kFp8Block)}, DType::kF8E8M0);
  }

  void Fp4(absl::string_view name, int64_t out, int64_t in) {
    Add(absl::StrCat(name, ".weight"), {out, released_ ? in / 2 : in}, DType::kI8, /*quantised=*/true);
    if (released_) Add(absl::StrCat(name, ".scale"), {out, in / kFp4Group}, DType::kF8E8M0);
  }

  void Add(absl::string_view name, std::vector<int64_t> shape, DType dtype, bool quantised = false) {
    specs_.push_back({absl::StrCat(prefix_, name), std::move(shape), dtype, quantised, layer_, expert_});
  }

  const ModelConfig& c_;
  const bool released_;
  std::string prefix_;
  int layer_ = -1;
  int expert_ = -1;
  std::vector<TensorSpec> specs_;
};

}  // namespace

std::vector<TensorSpec> TensorInventory(const ModelConfig& config) { return InventoryBuilder(config).Build(); }

}  // namespace millrace
