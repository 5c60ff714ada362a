// SPDX-License-Identifier: Apache-2.0
// DeepSeek-V4's forward pass as prose: the layer loop over Ops, and nothing else.
//
// A Model owns the weights and the activations of one pass. It knows the order of operations and which cache offsets a
// layer has; it knows no pages being free or owned (engine/cache), no arithmetic (engine/ops) and no place where
// experts run (engine/moe). Read beside docs/model.md. Thread: engine thread.
#pragma once

#include <memory>
#include <vector>

#include "engine/engine.h"
#include "engine/model/weights.h"
#include "engine/ops/ops.h"

namespace millrace {

// Inverse frequencies of a layer kind: plain for window layers, base 160000 and YaRN for compressed ones.
RopeFrequencies MakeRope(const ModelConfig& config, bool compressed);

class Model {
 public:
  // `ops` and `exchange` are borrowed. `max_rows` bounds the rows of one pass.
  Model(const ModelConfig& config, ModelWeights weights, Ops& ops, ExpertExchange& exchange, bool round_streams);

  // Runs the pass through every layer; streams [T, hc, D] stay readable until the next call.
  absl::Status Forward(const Pass& pass, const ForwardOptions& options);
  const float* streams(int64_t row) const { return a_.streams.data() + row * stream_width(); }
  int64_t stream_width() const { return config_.hc_mult * config_.hidden_size; }

  // Logits [V] of `rows` (indices into the last pass).
  void Logits(absl::Span<const int32_t> rows, float* logits);

  // One MTP pass: row r holds the backbone streams of position pass.positions[r] and pass.token_ids[r] is the token
  // after it. Fills logits [T, V] if not null. Leaves streams() of the backbone untouched.
  absl::Status ForwardMtp(const Pass& pass, const float* streams, float* logits);

  const ModelWeights& weights() const { return weights_; }

 private:
  // Activations of one pass; grown once to the largest pass seen.
  struct Activations {
    std::vector<float> streams, u, post, comb, sublayer;
    std::vector<float> qr, q, kv, attn, low_rank;
    std::vector<float> comp_kv, comp_score, index_kv, index_score, index_q, index_weights;
    std::vector<float> gate_out, up_out, shared, expert_rows, expert_weights;
    std::vector<int32_t> experts;
    std::vector<float> cos[2], sin[2];  // window layers, compressed layers
    WindowKeys window;
    Selection selection;
    void Reserve(const ModelConfig& config, int64_t rows);
  };

  absl::Status Layer(int layer, const LayerWeights& w, const Pass& pass, Activations& a, const ForwardOptions& options);
  void Attention(int layer, const LayerWeights& w, const Pass& pass, Activations& a, const ForwardOptions& options);
  void Compress(int layer, const LayerWeights& w, const Pass& pass, Activations& a);
  absl::Status Moe(int layer, const LayerWeights& w, const Pass& pass, Activations& a, const ForwardOptions& options);

  const ModelConfig& config_;
  ModelWeights weights_;
  Ops& ops_;
  ExpertExchange& exchange_;
  const bool round_streams_;
  RopeFrequencies rope_[2];
  Activations a_, mtp_;
};

}  // namespace millrace
