// SPDX-License-Identifier: Apache-2.0
// mHC on the CPU: four residual streams mixed into one sublayer input, and folded back by a doubly stochastic matrix.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/ops/cpu_ops.h"
#include "engine/ops/vector_cpu.h"

namespace millrace {
namespace {

float Sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Four floats: baseline vectors on every processor, so nothing is dispatched.
using Four = float __attribute__((vector_size(16)));

void Transpose(Four (&m)[4]) {
  const Four a = __builtin_shufflevector(m[0], m[1], 0, 4, 1, 5), b = __builtin_shufflevector(m[2], m[3], 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(m[0], m[1], 2, 6, 3, 7), d = __builtin_shufflevector(m[2], m[3], 2, 6, 3, 7);
  m[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  m[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  m[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  m[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// Divides every row by (the sum of the rows + eps), lane by lane.
void DivideBySum(Four (&m)[4], float eps) {
  const Four sum = m[0] + m[1] + m[2] + m[3] + eps;
  for (Four& row : m) row /= sum;
}

// The iterations of Sinkhorn below for four streams, with the same bits.
void NormaliseFour(float* c, int iterations, float eps) {
  Four m[4];
  std::memcpy(m, c, sizeof(m));
  for (int it = 1; it <= iterations; ++it) {
    if (it > 1) {
      Transpose(m);
      DivideBySum(m, eps);
      Transpose(m);
    }
    DivideBySum(m, eps);
  }
  std::memcpy(c, m, sizeof(m));
}

// Softmax over destinations, then columns, then (rows, columns) for the remaining iterations; column last.
void Sinkhorn(float* c, int hc, int iterations, float eps) {
  for (int j = 0; j < hc; ++j) {
    float max = c[j * hc];
    for (int k = 1; k < hc; ++k) max = std::max(max, c[j * hc + k]);
    float sum = 0;
    for (int k = 0; k < hc; ++k) sum += c[j * hc + k] = std::exp(c[j * hc + k] - max);
    for (int k = 0; k < hc; ++k) c[j * hc + k] = c[j * hc + k] / sum + eps;
  }
  if (hc == 4) return NormaliseFour(c, iterations, eps);
  for (int it = 1; it <= iterations; ++it) {
    if (it > 1) {
      for (int j = 0; j < hc; ++j) {
        float sum = 0;
        for (int k = 0; k < hc; ++k) sum += c[j * hc + k];
        for (int k = 0; k < hc; ++k) c[j * hc + k] /= sum + eps;
      }
    }
    for (int k = 0; k < hc; ++k) {
      float sum = 0;
      for (int j = 0; j < hc; ++j) sum += c[j * hc + k];
      for (int j = 0; j < hc; ++j) c[j * hc + k] /= sum + eps;
    }
  }
}

}  // namespace

// mixes_ [T, n] = (fn · flatten(X)) * rsqrt(mean(X²) + eps)
void CpuOps::StreamScales(const float* streams, const HyperConnectionWeights& w, int64_t rows) {
  const int64_t flat = w.fn.k(), n = w.fn.n();
  mixes_.resize(rows * n);
  MatMul(w.fn, {streams, flat, nullptr, 0}, rows, mixes_.data(), n, pool_);
  for (int64_t r = 0; r < rows; ++r) {
    const float mean = vec::SumSquares(streams + r * flat, flat) / static_cast<float>(flat);
    const float scale = 1.0f / std::sqrt(mean + static_cast<float>(config_.rms_norm_eps));
    for (int64_t i = 0; i < n; ++i) mixes_[r * n + i] *= scale;
  }
}

void CpuOps::HyperConnectionPre(const float* streams, const HyperConnectionWeights& w, const float* norm, int64_t rows,
                                float* u, float* post, float* comb) {
  const int hc = config_.hc_mult;
  const int64_t dim = config_.hidden_size;
  const float eps = static_cast<float>(config_.hc_eps);
  StreamScales(streams, w, rows);
  pool_.For(rows, [&](int64_t r) {
    const float* mix = mixes_.data() + r * w.fn.n();
    float pre[8];
    for (int j = 0; j < hc; ++j) {
      pre[j] = Sigmoid(mix[j] * w.scale[0] + w.base[j]) + eps;
      post[r * hc + j] = 2 * Sigmoid(mix[hc + j] * w.scale[1] + w.base[hc + j]);
    }
    float* c = comb + r * hc * hc;
    for (int i = 0; i < hc * hc; ++i) c[i] = mix[2 * hc + i] * w.scale[2] + w.base[2 * hc + i];
    Sinkhorn(c, hc, config_.hc_sinkhorn_iters, eps);
    vec::MixStreams(streams + r * hc * dim, pre, hc, dim, rounding_.streams, u + r * dim);
    NormRow(u + r * dim, norm, dim, u + r * dim);
  });
}

void CpuOps::HyperConnectionPost(const float* out, const float* post, const float* comb, int64_t rows, float* streams) {
  const int hc = config_.hc_mult;
  const int64_t dim = config_.hidden_size;
  pool_.For(rows, [&](int64_t r) {
    vec::RecombineStreams(out + r * dim, post + r * hc, comb + r * hc * hc, hc, dim, rounding_.streams,
                          streams + r * hc * dim);
  });
}

void CpuOps::HyperHead(const float* streams, const HyperConnectionWeights& w, const float* norm, int64_t rows,
                       float* z) {
  const int hc = config_.hc_mult;
  const int64_t dim = config_.hidden_size;
  StreamScales(streams, w, rows);
  for (int64_t r = 0; r < rows; ++r) {
    float p[8];
    for (int j = 0; j < hc; ++j) {
      p[j] = Sigmoid(mixes_[r * hc + j] * w.scale[0] + w.base[j]) + static_cast<float>(config_.hc_eps);
    }
    vec::MixStreams(streams + r * hc * dim, p, hc, dim, rounding_.streams, z + r * dim);
    NormRow(z + r * dim, norm, dim, z + r * dim);
  }
}

}  // namespace millrace
