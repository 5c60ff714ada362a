// SPDX-License-Identifier: Apache-2.0
// One MoE sublayer: a.u in, a.sublayer out. The shared expert is computed while routed experts are away.
#include "engine/model/model.h"
#include "engine/status.h"

namespace millrace {

absl::Status Model::Moe(int layer, const LayerWeights& w, const Pass& pass, Activations& a,
                        const ForwardOptions& options) {
  const int64_t rows = pass.num_rows, hidden = config_.hidden_size, width = config_.moe_intermediate_size;
  const int k = config_.num_experts_per_tok;
  const float limit = static_cast<float>(config_.swiglu_limit);
  const bool hash_routed = !w.tid2eid.empty();

  ops_.Gate(a.u.data(), w.gate, hash_routed ? nullptr : w.gate_bias.data(), hash_routed ? w.tid2eid.data() : nullptr,
            pass.token_ids, rows, k, static_cast<float>(config_.routed_scaling_factor), a.experts.data(),
            a.expert_weights.data());
  if (options.tap != nullptr) options.tap->OnExperts(layer, a.experts.data(), rows);

  RETURN_IF_ERROR(exchange_.Dispatch({layer, rows, hidden, k, a.u.data(), a.experts.data(), a.expert_weights.data()}));
  ops_.Linear(a.u.data(), hidden, rows, {{&w.shared_w1, a.gate_out.data()}, {&w.shared_w3, a.up_out.data()}});
  ops_.SwiGlu(a.gate_out.data(), a.up_out.data(), nullptr, rows, width, limit, a.gate_out.data());
  ops_.Linear(a.gate_out.data(), width, rows, {{&w.shared_w2, a.shared.data()}});
  RETURN_IF_ERROR(exchange_.Combine(a.expert_rows.data()));

  ops_.CombineExperts(a.expert_rows.data(), a.shared.data(), rows, k, hidden, a.sublayer.data());
  return absl::OkStatus();
}

}  // namespace millrace
