// SPDX-License-Identifier: Apache-2.0
// Routed experts on the tensor cores: each half against sums in double precision, and a token's rows against themselves
// among any number of tokens, bit by bit, across both paths.
//
// Needs a card; skipped without one. Bounds as in tensor_linear_cuda_test.cc: what the tensor cores keep of a block of
// 128.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "engine/ops/cuda_packed_experts.h"
#include "engine/ops/cuda_quantise.h"
#include "engine/ops/cuda_test_util.h"
#include "engine/ops/packed_experts_plan.h"
#include "engine/ops/rounding.h"

namespace millrace::cuda {
namespace {

constexpr double kBound = 4e-6;  // of the sum of magnitudes

template <typename T>
std::vector<T> ReadFrom(const T* data, int64_t count) {
  std::vector<T> host(count);
  CUDA_CHECK(cudaDeviceSynchronize());
  CUDA_CHECK(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

std::vector<uint8_t> RandomBytes(int64_t count, uint32_t seed) {
  std::vector<uint8_t> out(count);
  std::mt19937 engine(seed);
  for (uint8_t& b : out) b = static_cast<uint8_t>(engine() >> 11);
  return out;
}

// Scales of a row's groups up to 2^15 apart, which is the furthest that packing holds exactly.
std::vector<uint8_t> RandomScales(int64_t rows, int64_t groups, uint32_t seed) {
  std::vector<uint8_t> out(rows * groups);
  std::mt19937 engine(seed);
  for (uint8_t& s : out) s = static_cast<uint8_t>(engine() % 8 == 0 ? 107 + engine() % 16 : 119 + engine() % 4);
  return out;
}

struct Matrix {
  Matrix(int64_t rows_, int64_t k_, uint32_t seed)
      : rows(rows_), k(k_), codes(RandomBytes(rows * k / 2, seed)), scales(RandomScales(rows, k / 32, seed + 1)) {}
  double At(int64_t row, int64_t i) const {
    const uint8_t pair = codes[row * (k / 2) + i / 2];
    return static_cast<double>(DecodeE2m1(i % 2 == 0 ? pair & 15 : pair >> 4)) *
           DecodeE8m0(scales[row * (k / 32) + i / 32]);
  }
  int64_t rows, k;
  std::vector<uint8_t> codes, scales;
};

struct Expert {
  Expert(int64_t hidden, int64_t width, uint32_t seed)
      : w1(width, hidden, seed), w3(width, hidden, seed + 2), w2(hidden, width, seed + 4) {}
  Matrix w1, w3, w2;
};

struct Sum {
  double value = 0, magnitude = 0;
};

class Layer {
 public:
  Layer(int num_experts, int64_t hidden, int64_t width, int k, int64_t max_tokens, uint32_t seed)
      : hidden_(hidden),
        width_(width),
        k_(k),
        max_tokens_(max_tokens),
        gate_up_(num_experts * PackedGateUpBytes(hidden, width)),
        down_(num_experts * PackedDownBytes(hidden, width)),
        x_(max_tokens * hidden),
        rounded_(max_tokens * hidden),
        experts_(max_tokens * k),
        weights_(max_tokens * k),
        workspace_(ExpertWorkspaceBytes(num_experts, hidden, width, k, max_tokens)) {
    DeviceArray<int32_t> bad(std::vector<int32_t>{0});
    for (int e = 0; e < num_experts; ++e) {
      host_.emplace_back(hidden, width, seed + 100 * e);
      const Expert& h = host_.back();
      DeviceArray<uint8_t> w1(h.w1.codes), w2(h.w2.codes), w3(h.w3.codes), s1(h.w1.scales), s2(h.w2.scales),
          s3(h.w3.scales);
      PackExpert({w1.data(), w2.data(), w3.data(), s1.data(), s2.data(), s3.data()}, hidden, width,
                 gate_up_.data() + e * PackedGateUpBytes(hidden, width),
                 down_.data() + e * PackedDownBytes(hidden, width), bad.data(), nullptr);
      CUDA_CHECK(cudaDeviceSynchronize());
    }
    out_of_range = bad.Fetch()[0];
    device_ = {num_experts, hidden, width, gate_up_.data(), down_.data()};

    std::mt19937 engine(seed + 7);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> x(max_tokens * hidden);
    for (uint16_t& v : x) v = EncodeBf16(normal(engine));
    CUDA_CHECK(cudaMemcpy(x_.data(), x.data(), x.size() * 2, cudaMemcpyHostToDevice));
    RoundRows({reinterpret_cast<const Bf16*>(x_.data()), hidden}, max_tokens, hidden, rounded_.data(), nullptr);
    rounded_host = FromDeviceBf16(rounded_.Fetch());
    // Experts ascending and distinct, some far more popular than others.
    for (int64_t t = 0; t < max_tokens; ++t) {
      std::vector<int32_t> chosen;
      while (static_cast<int>(chosen.size()) < k) {
        const int e =
            static_cast<int>(engine() % 3 == 0 ? engine() % std::min(4, num_experts) : engine() % num_experts);
        if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
      }
      std::sort(chosen.begin(), chosen.end());
      for (const int32_t e : chosen) {
        experts_host.push_back(e);
        weights_host.push_back(0.05f + static_cast<float>(engine() % 1000) / 1500.0f);
      }
    }
    CUDA_CHECK(cudaMemcpy(experts_.data(), experts_host.data(), experts_host.size() * 4, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(weights_.data(), weights_host.data(), weights_host.size() * 4, cudaMemcpyHostToDevice));
  }

  // Rows of the first `tokens` tokens, BF16 [tokens, k, hidden].
  std::vector<uint16_t> Run(int64_t tokens, int64_t first = 0) {
    DeviceArray<uint16_t> out(tokens * k_ * hidden_);
    CUDA_CHECK(cudaMemset(out.data(), 0xff, tokens * k_ * hidden_ * 2));
    RoutedExperts(device_, {rounded_.data() + first * hidden_, hidden_}, experts_.data() + first * k_,
                  weights_.data() + first * k_, tokens, k_, kLimit, workspace_.data(),
                  reinterpret_cast<Bf16*>(out.data()), nullptr);
    return out.Fetch();
  }
  ExpertActivations activations(int64_t tokens) { return ExpertActivationsOf(device_, tokens, k_, workspace_.data()); }

  Sum Project(const Matrix& w, int64_t row, int64_t token) const {
    Sum s;
    for (int64_t i = 0; i < hidden_; ++i) {
      const double term = w.At(row, i) * rounded_host[token * hidden_ + FragmentPlace(i)];
      s.value += term;
      s.magnitude += std::abs(term);
    }
    return s;
  }

  static constexpr float kLimit = 10.0f;
  int64_t hidden_, width_;
  int k_;
  int64_t max_tokens_;
  int32_t out_of_range = -1;
  std::vector<Expert> host_;
  std::vector<float> rounded_host, weights_host;
  std::vector<int32_t> experts_host;

 private:
  DeviceArray<uint8_t> gate_up_, down_;
  DeviceArray<uint16_t> x_;
  DeviceArray<Bf16> rounded_;
  DeviceArray<int32_t> experts_;
  DeviceArray<float> weights_;
  DeviceArray<uint8_t> workspace_;
  ExpertWeights device_;
};

class CudaPackedExperts : public CudaTest {};

// Both halves of what `tokens` tokens came to, at sampled elements.
void ExpectNearExact(Layer& layer, int64_t tokens) {
  const std::vector<uint16_t> out = layer.Run(tokens);
  const ExpertActivations a = layer.activations(tokens);
  const int64_t pairs = tokens * layer.k_, width = layer.width_, hidden = layer.hidden_;
  const auto order = ReadFrom(a.order, pairs);
  const std::vector<float> activations = FromDeviceBf16(ReadFrom(a.rounded, pairs * width));
  std::vector<int64_t> place(pairs, -1);
  for (int64_t i = 0; i < pairs; ++i) {
    ASSERT_GE(order[i], 0);
    ASSERT_LT(order[i], pairs);
    place[order[i]] = i;
  }
  ASSERT_EQ(std::count(place.begin(), place.end(), -1), 0) << "order is not a permutation";
  for (const uint16_t y : out) ASSERT_NE(y & 0x7f80, 0x7f80) << "an output was not written";

  std::mt19937 engine(3);
  for (int i = 0; i < 400; ++i) {
    const int64_t pair = engine() % pairs, token = pair / layer.k_;
    const Expert& expert = layer.host_[layer.experts_host[pair]];
    // First half: one activation, as the device's code has it.
    const int64_t n = engine() % width;
    const Sum g = layer.Project(expert.w1, n, token), p = layer.Project(expert.w3, n, token);
    const auto activate = [&](double gate, double up) {
      gate = std::min<double>(RoundBf16(static_cast<float>(gate)), Layer::kLimit);
      up = std::clamp<double>(RoundBf16(static_cast<float>(up)), -Layer::kLimit, Layer::kLimit);
      return gate / (1 + std::exp(-gate)) * up * layer.weights_host[pair];
    };
    // The least and the greatest it may be, over what the sums may be.
    double low = 1e30, high = -1e30;
    for (const double dg : {-1.0, 0.0, 1.0}) {
      for (const double dp : {-1.0, 0.0, 1.0}) {
        const double y = activate(g.value + dg * (kBound * g.magnitude + std::abs(g.value) * 0x1p-8),
                                  p.value + dp * (kBound * p.magnitude + std::abs(p.value) * 0x1p-8));
        low = std::min(low, y);
        high = std::max(high, y);
      }
    }
    const double got = activations[place[pair] * width + FragmentPlace(n)];
    // Half a step of E4M3: 2^-4 of the value, or half the subnormal step of its group's scale, which is this or twice
    // it.
    float amax = 0;
    for (int64_t j = n / 128 * 128; j < std::min(width, n / 128 * 128 + 128); ++j) {
      amax = std::max(amax, std::abs(activations[place[pair] * width + FragmentPlace(j)]));
    }
    const double scale = std::exp2(std::ceil(std::log2(std::max(amax, 1e-30f) / 448.0)));
    const double slack = std::max(std::max(std::abs(low), std::abs(high)) * 0x1.2p-4, scale * 0x1p-9 * 1.01);
    ASSERT_GE(got, low - slack) << "pair " << pair << " activation " << n;
    ASSERT_LE(got, high + slack) << "pair " << pair << " activation " << n;

    // Second half, from the device's own activations.
    const int64_t d = engine() % hidden;
    Sum y;
    for (int64_t j = 0; j < width; ++j) {
      const double term = expert.w2.At(d, j) * activations[place[pair] * width + FragmentPlace(j)];
      y.value += term;
      y.magnitude += std::abs(term);
    }
    ASSERT_NEAR(DecodeBf16(out[pair * hidden + d]), y.value, kBound * y.magnitude + std::abs(y.value) * 0x1p-8)
        << "pair " << pair << " output " << d;
  }
}

TEST_F(CudaPackedExperts, FewTokensAreNearTheExactSums) {
  Layer layer(16, 1024, 512, 3, 40, 1);
  ASSERT_EQ(layer.out_of_range, 0);
  for (const int64_t tokens : {1, 2, 7, 40}) ExpectNearExact(layer, tokens);
}

TEST_F(CudaPackedExperts, ManyTokensAreNearTheExactSums) {
  Layer layer(8, 1024, 512, 3, 1500, 2);
  for (const int64_t tokens : {22, 100, 1500}) ExpectNearExact(layer, tokens);
}

TEST_F(CudaPackedExperts, OddShapesArePaddedWithoutATrace) {
  // Neither width nor hidden a multiple of what a work item takes.
  for (const auto& [hidden, width] :
       {std::pair{256, 128}, std::pair{288, 96}, std::pair{640, 160}, std::pair{32, 32}}) {
    SCOPED_TRACE(testing::Message() << "hidden " << hidden << " width " << width);
    Layer layer(4, hidden, width, 2, 300, 3);
    for (const int64_t tokens : {1, 16, 300}) ExpectNearExact(layer, tokens);
  }
}

TEST_F(CudaPackedExperts, ATokensRowsHaveTheSameBitsAmongAnyNumberOfTokens) {
  constexpr int64_t kTokens = 2000;
  Layer layer(8, 1024, 512, 3, kTokens, 4);
  const std::vector<uint16_t> all = layer.Run(kTokens);
  const int64_t row = layer.k_ * layer.hidden_;
  for (const int64_t tokens : {1, 2, 3, 5, 8, 9, 16, 17, 21, 22, 31, 33, 64, 65, 100, 127, 129, 256, 700, 1024}) {
    for (const int64_t first : {int64_t{0}, kTokens - tokens}) {
      const std::vector<uint16_t> some = layer.Run(tokens, first);
      EXPECT_EQ(std::memcmp(some.data(), all.data() + first * row, some.size() * 2), 0)
          << tokens << " tokens from " << first;
    }
  }
  // A second run groups pairs in another order.
  EXPECT_EQ(std::memcmp(layer.Run(kTokens).data(), all.data(), all.size() * 2), 0);
}

TEST_F(CudaPackedExperts, AFlashLayerHasTheSameBitsForOneTokenAndForMany) {
  constexpr int64_t kTokens = 600;
  Layer layer(24, 4096, 2048, 6, kTokens, 5);
  const std::vector<uint16_t> all = layer.Run(kTokens);
  const int64_t row = layer.k_ * layer.hidden_;
  for (const int64_t tokens : {1, 4, 16, 32, 64, 128}) {
    EXPECT_EQ(std::memcmp(layer.Run(tokens).data(), all.data(), tokens * row * 2), 0) << tokens << " tokens";
  }
  ExpectNearExact(layer, kTokens);
}

TEST_F(CudaPackedExperts, PackingCountsScalesTooFarApartAndMindsNoGroupOfZeros) {
  const int64_t hidden = 128, width = 32;
  Expert e(hidden, width, 9);
  std::fill(e.w1.scales.begin(), e.w1.scales.end(), 120);
  std::fill(e.w3.scales.begin(), e.w3.scales.end(), 120);
  std::fill(e.w2.scales.begin(), e.w2.scales.end(), 120);
  e.w1.scales[4 * 5 + 2] = 104;  // 2^16 below its block's largest
  e.w3.scales[4 * 7 + 1] = 0;    // as far as can be, of a group of zeros
  std::fill_n(e.w3.codes.begin() + 7 * hidden / 2 + 16, 16, uint8_t{0x80});
  DeviceArray<uint8_t> w1(e.w1.codes), w2(e.w2.codes), w3(e.w3.codes), s1(e.w1.scales), s2(e.w2.scales),
      s3(e.w3.scales);
  DeviceArray<uint8_t> gate_up(PackedGateUpBytes(hidden, width)), down(PackedDownBytes(hidden, width));
  DeviceArray<int32_t> bad(std::vector<int32_t>{0});
  PackExpert({w1.data(), w2.data(), w3.data(), s1.data(), s2.data(), s3.data()}, hidden, width, gate_up.data(),
             down.data(), bad.data(), nullptr);
  EXPECT_EQ(bad.Fetch()[0], 1);
}

}  // namespace
}  // namespace millrace::cuda
