// SPDX-License-Identifier: Apache-2.0
// Routing and combining on the CPU: which experts a token goes to, with what weight, and the sum that comes back.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/ops/cpu_ops.h"
#include "engine/ops/vector_cpu.h"

namespace millrace {

void CpuOps::Gate(const float* u, const PackedLinear& w, const float* bias, const int32_t* tid2eid, const int32_t* ids,
                  int64_t rows, int k, float route_scale, int32_t* experts, float* weights) {
  const int64_t num_experts = w.n();
  gate_logits_.resize(rows * num_experts);
  MatMul(w, {u, w.k(), nullptr, 0, /*bf16=*/rounding_ == Rounding::All()}, rows, gate_logits_.data(), num_experts,
         pool_);
  std::vector<int32_t> order(num_experts);
  std::vector<float> biased(num_experts);
  for (int64_t r = 0; r < rows; ++r) {
    float* score = gate_logits_.data() + r * num_experts;
    for (int64_t e = 0; e < num_experts; ++e) {
      const float softplus = score[e] > 20 ? score[e] : std::log1p(std::exp(score[e]));
      score[e] = std::sqrt(softplus);
    }
    int32_t* chosen = experts + r * k;
    if (tid2eid != nullptr) {
      std::copy_n(tid2eid + static_cast<int64_t>(ids[r]) * k, k, chosen);
    } else {
      for (int64_t e = 0; e < num_experts; ++e) biased[e] = score[e] + bias[e];
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + k, order.end(),
                        [&](int32_t a, int32_t b) { return biased[a] != biased[b] ? biased[a] > biased[b] : a < b; });
      std::copy_n(order.begin(), k, chosen);
    }
    std::sort(chosen, chosen + k);
    float sum = 0;
    for (int j = 0; j < k; ++j) sum += score[chosen[j]];
    for (int j = 0; j < k; ++j) weights[r * k + j] = score[chosen[j]] / sum * route_scale;
  }
}

void CpuOps::CombineExperts(const float* expert_rows, const float* shared, int64_t rows, int k, int64_t dim,
                            float* out) {
  pool_.For(rows, [&](int64_t r) {
    float* y = out + r * dim;
    std::fill_n(y, dim, 0.0f);
    for (int j = 0; j < k; ++j) vec::Add(expert_rows + (r * k + j) * dim, dim, y);
    vec::Add(shared + r * dim, dim, y);
    if (rounding_.linear_out) vec::RoundBf16(y, dim);
  });
}

}  // namespace millrace
