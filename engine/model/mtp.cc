// SPDX-License-Identifier: Apache-2.0
// The multi-token prediction module: one window-only block over (streams of position i, token i + 1), predicting i + 2.
#include <algorithm>

#include "engine/model/model.h"
#include "engine/ops/vector_cpu.h"
#include "engine/status.h"

namespace millrace {

absl::Status Model::ForwardMtp(const Pass& pass, const float* streams, float* logits) {
  const MtpWeights& w = weights_.mtp[0];
  const int64_t rows = pass.num_rows, hidden = config_.hidden_size, hc = config_.hc_mult;
  mtp_.Reserve(config_, rows);
  ops_.PrepareRope(rope_[0], pass.positions, rows, mtp_.cos[0].data(), mtp_.sin[0].data());

  std::vector<float> e(rows * hidden), e_out(rows * hidden), h(rows * hc * hidden);
  ops_.Embed(weights_.embed, pass.token_ids, rows, 1, e.data());
  ops_.RmsNorm(e.data(), w.enorm.data(), rows, hidden, e.data());
  ops_.RmsNorm(streams, w.hnorm.data(), rows * hc, hidden, h.data());  // each stream by itself, one weight
  ops_.Linear(e.data(), hidden, rows, {{&w.e_proj, e_out.data()}});
  ops_.Linear(h.data(), hidden, rows * hc, {{&w.h_proj, mtp_.streams.data()}});
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < hc; ++j) {
      vec::Add(e_out.data() + r * hidden, hidden, mtp_.streams.data() + (r * hc + j) * hidden);
    }
  }
  if (round_streams_) vec::RoundBf16(mtp_.streams.data(), rows * hc * hidden);

  RETURN_IF_ERROR(Layer(config_.num_hidden_layers, w.block, pass, mtp_, {}));
  if (logits == nullptr) return absl::OkStatus();
  std::vector<float> z(rows * hidden);
  ops_.HyperHead(mtp_.streams.data(), w.hc_head, w.norm.data(), rows, z.data());
  ops_.Linear(z.data(), hidden, rows, {{&weights_.head, logits, /*round=*/false}});
  return absl::OkStatus();
}

}  // namespace millrace
