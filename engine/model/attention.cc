// SPDX-License-Identifier: Apache-2.0
// One attention sublayer: a.u in, a.sublayer out. Window-only, CSA and HCA differ in what they compress and select.
#include "engine/model/model.h"

namespace millrace {

void Model::Attention(int layer, const LayerWeights& w, const Pass& pass, Activations& a,
                      const ForwardOptions& options) {
  const int64_t rows = pass.num_rows, hidden = config_.hidden_size;
  const int heads = config_.num_attention_heads;
  const bool mtp = layer >= config_.num_hidden_layers;
  const LayerKind kind = mtp ? LayerKind::kWindow : config_.layer_kinds[layer];
  const int rope_kind = kind == LayerKind::kWindow ? 0 : 1;
  const RopeRows rope{a.cos[rope_kind].data(), a.sin[rope_kind].data()};

  // Queries and this token's window entry.
  ops_.Linear(a.u.data(), hidden, rows, {{&w.wq_a, a.qr.data()}, {&w.wkv, a.kv.data()}});
  ops_.RmsNorm(a.qr.data(), w.q_norm.data(), rows, config_.q_lora_rank, a.qr.data());
  ops_.Linear(a.qr.data(), config_.q_lora_rank, rows, {{&w.wq_b, a.q.data()}});
  ops_.QueryNormRope(a.q.data(), heads, rope, rows);
  ops_.WindowAppend(layer, pass, a.kv.data(), w.kv_norm.data(), rope, a.window);

  // Entries that these rows complete become visible to the very row that completes them, so compression comes first.
  if (kind != LayerKind::kWindow) Compress(layer, w, pass, a);
  a.selection.all = true;
  if (kind == LayerKind::kCsa && !SelectsAll(pass, config_.index_topk)) {
    ops_.Linear(a.qr.data(), config_.q_lora_rank, rows, {{&w.index_wq_b, a.index_q.data()}});
    ops_.Linear(a.u.data(), hidden, rows, {{&w.index_weights_proj, a.index_weights.data()}});
    ops_.IndexSelect(layer, pass, a.index_q.data(), a.index_weights.data(), config_.index_n_heads, config_.index_topk,
                     rope, a.selection);
    if (options.tap != nullptr) {
      for (int64_t r = 0; r < rows; ++r) {
        options.tap->OnSelection(
            layer, r,
            absl::MakeConstSpan(a.selection.entries)
                .subspan(a.selection.offset[r], a.selection.offset[r + 1] - a.selection.offset[r]));
      }
    }
  }

  ops_.SparseAttention(mtp ? -1 : layer, pass, a.q.data(), heads, w.attn_sink.data(), a.window, a.selection, rope,
                       a.attn.data());

  // Output: each group of heads through its own low-rank matrix, then one linear back to the hidden size.
  const int64_t group_width = static_cast<int64_t>(heads) * config_.head_dim / config_.o_groups;
  const int64_t rank = config_.o_lora_rank;
  const int64_t z_width = config_.o_groups * rank;
  for (int g = 0; g < config_.o_groups; ++g) {
    ops_.Linear(
        a.attn.data() + g * group_width, heads * config_.head_dim, rows,
        {{.weight = &w.wo_a[g], .out = a.low_rank.data() + g * rank, .out_ld = z_width, .quantise_input = false}});
  }
  ops_.Linear(a.low_rank.data(), z_width, rows, {{&w.wo_b, a.sublayer.data()}});
}

void Model::Compress(int layer, const LayerWeights& w, const Pass& pass, Activations& a) {
  const int64_t hidden = config_.hidden_size;
  ops_.Linear(a.u.data(), hidden, pass.num_rows,
              {{&w.compressor.wkv, a.comp_kv.data(), /*round=*/false},
               {&w.compressor.wgate, a.comp_score.data(), /*round=*/false}});
  if (config_.layer_kinds[layer] == LayerKind::kHca) {
    ops_.CompressHca(layer, pass, a.comp_kv.data(), a.comp_score.data(), w.compressor, rope_[1]);
    return;
  }
  ops_.Linear(a.u.data(), hidden, pass.num_rows,
              {{&w.index_compressor.wkv, a.index_kv.data(), /*round=*/false},
               {&w.index_compressor.wgate, a.index_score.data(), /*round=*/false}});
  ops_.CompressCsa(layer, pass, a.comp_kv.data(), a.comp_score.data(), a.index_kv.data(), a.index_score.data(),
                   w.compressor, w.index_compressor, rope_[1]);
}

}  // namespace millrace
