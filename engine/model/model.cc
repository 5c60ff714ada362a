// SPDX-License-Identifier: Apache-2.0
// The layer loop. Attention is attention.cc, experts moe.cc, the draft module mtp.cc.
#include "engine/model/model.h"
#include "engine/status.h"

#include <algorithm>
#include <cmath>

namespace millrace {

RopeFrequencies MakeRope(const ModelConfig& config, bool compressed) {
  const float base = static_cast<float>(compressed ? config.compress_rope_theta : config.rope_theta);
  const int dims = config.rope_head_dim;
  RopeFrequencies rope;
  for (int i = 0; i < dims / 2; ++i) rope.f[i] = 1.0f / std::pow(base, static_cast<float>(2 * i) / dims);
  if (!compressed || !config.yarn.has_value()) return rope;
  const YarnConfig& y = *config.yarn;
  const auto correction = [&](double rotations) {
    return dims * std::log(static_cast<double>(y.original_max_position_embeddings) / (rotations * 2 * M_PI)) /
           (2 * std::log(static_cast<double>(base)));
  };
  const double low = std::max(std::floor(correction(y.beta_fast)), 0.0);
  const double high = std::min(std::ceil(correction(y.beta_slow)), dims - 1.0);
  for (int i = 0; i < dims / 2; ++i) {
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(std::max(high - low, 1e-3)), 0.0f, 1.0f);
    rope.f[i] = rope.f[i] / static_cast<float>(y.factor) * ramp + rope.f[i] * (1 - ramp);
  }
  return rope;
}

Model::Model(const ModelConfig& config, ModelWeights weights, Ops& ops, ExpertExchange& exchange, bool round_streams)
    : config_(config), weights_(std::move(weights)), ops_(ops), exchange_(exchange), round_streams_(round_streams) {
  rope_[0] = MakeRope(config, false);
  rope_[1] = MakeRope(config, true);
}

void Model::Activations::Reserve(const ModelConfig& c, int64_t rows) {
  const auto grow = [rows](auto& v, int64_t width) {
    if (static_cast<int64_t>(v.size()) < rows * width) v.resize(rows * width);
  };
  grow(streams, c.hc_mult * c.hidden_size);
  grow(u, c.hidden_size);
  grow(post, c.hc_mult);
  grow(comb, c.hc_mult * c.hc_mult);
  grow(sublayer, c.hidden_size);
  grow(qr, c.q_lora_rank);
  grow(q, c.num_attention_heads * c.head_dim);
  grow(attn, c.num_attention_heads * c.head_dim);
  grow(kv, c.head_dim);
  grow(low_rank, c.o_groups * c.o_lora_rank);
  grow(comp_kv, 2 * c.head_dim);
  grow(comp_score, 2 * c.head_dim);
  grow(index_kv, 2 * c.index_head_dim);
  grow(index_score, 2 * c.index_head_dim);
  grow(index_q, c.index_n_heads * c.index_head_dim);
  grow(index_weights, c.index_n_heads);
  grow(gate_out, c.moe_intermediate_size);
  grow(up_out, c.moe_intermediate_size);
  grow(shared, c.hidden_size);
  grow(expert_rows, c.num_experts_per_tok * c.hidden_size);
  grow(expert_weights, c.num_experts_per_tok);
  grow(experts, c.num_experts_per_tok);
  for (int kind = 0; kind < 2; ++kind) {
    grow(cos[kind], 32);
    grow(sin[kind], 32);
  }
}

absl::Status Model::Forward(const Pass& pass, const ForwardOptions& options) {
  a_.Reserve(config_, pass.num_rows);
  for (int kind = 0; kind < 2; ++kind) {
    ops_.PrepareRope(rope_[kind], pass.positions, pass.num_rows, a_.cos[kind].data(), a_.sin[kind].data());
  }
  ops_.Embed(weights_.embed, pass.token_ids, pass.num_rows, config_.hc_mult, a_.streams.data());
  for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
    RETURN_IF_ERROR(Layer(layer, weights_.layers[layer], pass, a_, options));
    if (options.tap != nullptr) options.tap->OnStreams(layer, a_.streams.data(), pass.num_rows);
    if (options.on_layer_done) options.on_layer_done(layer);
  }
  return absl::OkStatus();
}

absl::Status Model::Layer(int layer, const LayerWeights& w, const Pass& pass, Activations& a,
                          const ForwardOptions& options) {
  const int64_t rows = pass.num_rows;
  float *streams = a.streams.data(), *u = a.u.data(), *post = a.post.data(), *comb = a.comb.data();

  ops_.HyperConnectionPre(streams, w.hc_attn, w.attn_norm.data(), rows, u, post, comb);
  Attention(layer, w, pass, a, options);
  ops_.HyperConnectionPost(a.sublayer.data(), post, comb, rows, streams);

  ops_.HyperConnectionPre(streams, w.hc_ffn, w.ffn_norm.data(), rows, u, post, comb);
  RETURN_IF_ERROR(Moe(layer, w, pass, a, options));
  ops_.HyperConnectionPost(a.sublayer.data(), post, comb, rows, streams);
  return absl::OkStatus();
}

void Model::Logits(absl::Span<const int32_t> rows, float* logits) {
  const int64_t n = static_cast<int64_t>(rows.size()), width = stream_width();
  std::vector<float> picked(n * width), z(n * config_.hidden_size);
  for (int64_t i = 0; i < n; ++i) std::copy_n(streams(rows[i]), width, picked.data() + i * width);
  ops_.HyperHead(picked.data(), weights_.hc_head, weights_.norm.data(), n, z.data());
  ops_.Linear(z.data(), config_.hidden_size, n, {{&weights_.head, logits, /*round=*/false}});
}

}  // namespace millrace
