// SPDX-License-Identifier: Apache-2.0
// Linears, embedding, norms, RoPE and SwiGLU on the CPU. The product itself is matmul_cpu.cc.
#include <algorithm>
#include <cmath>

#include "engine/ops/cpu_ops.h"
#include "engine/ops/matmul_amx.h"
#include "engine/ops/rounding.h"
#include "engine/ops/vector_cpu.h"

namespace millrace {

void CpuOps::Embed(const HostRows& table, const int32_t* ids, int64_t rows, int hc, float* streams) {
  const int64_t dim = table.dim;
  for (int64_t r = 0; r < rows; ++r) {
    float* first = streams + r * hc * dim;
    if (table.bf16.size() > 0) {
      for (int64_t i = 0; i < dim; ++i) first[i] = DecodeBf16(table.bf16[ids[r] * dim + i]);
    } else {
      std::copy_n(table.f32.data() + ids[r] * dim, dim, first);
    }
    for (int j = 1; j < hc; ++j) std::copy_n(first, dim, first + j * dim);
  }
}

void CpuOps::Linear(const float* x, int64_t ld, int64_t rows, std::initializer_list<LinearCall> calls) {
  if (rows == 0) return;
  ActivationRows plain{x, ld, nullptr, 0, /*bf16=*/rounding_ == Rounding::All()};
  ActivationRows quantised;
  // Weights that share an input share its tiles' rows.
  const auto narrow = [&](ActivationRows& input, int64_t k, std::vector<uint16_t>& bits) {
    if (!input.bf16 || !AmxAvailable() || input.narrow != nullptr || k % 32 != 0) return;
    bits.resize(std::max<size_t>(bits.size(), rows * k));
    NarrowRows(input, rows, k, bits.data());
    input.narrow = bits.data();
  };
  for (const LinearCall& call : calls) {
    const PackedLinear& w = *call.weight;
    const bool quantise = call.quantise_input && w.quantised() && rounding_.activation_quant;
    if (quantise && quantised.values == nullptr) {
      const int64_t groups = (w.k() + 127) / 128;
      codes_.resize(std::max<size_t>(codes_.size(), rows * w.k()));
      scales_.resize(std::max<size_t>(scales_.size(), rows * groups));
      pool_.For(rows, [&](int64_t r) {
        QuantiseActivations(x + r * ld, w.k(), 128, codes_.data() + r * w.k(), scales_.data() + r * groups);
      });
      quantised = {codes_.data(), w.k(), scales_.data(), groups, /*bf16=*/true};
    }
    if (quantise) {
      narrow(quantised, w.k(), quantised_bits_);
    } else if (w.kind() != WeightKind::kF32) {
      narrow(plain, w.k(), plain_bits_);
    }
    const int64_t out_ld = call.out_ld == 0 ? w.n() : call.out_ld;
    MatMul(w, quantise ? quantised : plain, rows, call.out, out_ld, pool_);
    if (!call.round || !rounding_.linear_out) continue;
    for (int64_t r = 0; r < rows; ++r) vec::RoundBf16(call.out + r * out_ld, w.n());
  }
}

void CpuOps::NormRow(const float* x, const float* weight, int64_t dim, float* out) const {
  const float mean = vec::SumSquares(x, dim) / static_cast<float>(dim);
  const float scale = 1.0f / std::sqrt(mean + static_cast<float>(config_.rms_norm_eps));
  vec::ScaleWeighted(x, scale, weight, dim, rounding_.norm_out, out);
}

void CpuOps::RmsNorm(const float* x, const float* weight, int64_t rows, int64_t dim, float* out) {
  for (int64_t r = 0; r < rows; ++r) NormRow(x + r * dim, weight, dim, out + r * dim);
}

void CpuOps::PrepareRope(const RopeFrequencies& f, const int64_t* positions, int64_t rows, float* cos, float* sin) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int i = 0; i < 32; ++i) {
      // The reference multiplies in FP32 and rotates by that rounded angle; only its sine and cosine are accurate.
      const float angle = static_cast<float>(positions[r]) * f.f[i];
      cos[r * 32 + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sin[r * 32 + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
}

void CpuOps::RotateRow(float* x, int64_t dim, const float* cos, const float* sin, float sign) const {
  vec::RotatePairs(x + dim - 64, cos, sin, sign, rounding_.rope_out);
}

void CpuOps::QueryNormRope(float* q, int heads, RopeRows rope, int64_t rows) {
  const int64_t dim = config_.head_dim;
  pool_.For(rows, [&](int64_t r) {
    for (int h = 0; h < heads; ++h) {
      float* head = q + (r * heads + h) * dim;
      NormRow(head, nullptr, dim, head);
      RotateRow(head, dim, rope.cos + r * 32, rope.sin + r * 32, 1);
    }
  });
}

void CpuOps::SwiGlu(const float* g, const float* p, const float* weights, int64_t rows, int64_t width, float limit,
                    float* a) {
  for (int64_t r = 0; r < rows; ++r) {
    vec::SwiGluRow(g + r * width, p + r * width, weights == nullptr ? 1.0f : weights[r], limit, width,
                   rounding_.expert_act, a + r * width);
  }
}

}  // namespace millrace
