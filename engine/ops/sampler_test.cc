// SPDX-License-Identifier: Apache-2.0
// The sampler against known-answer vectors, against a slow model that sorts, and against chi-square bounds. Every seed
// is fixed, so a statistical test passes or fails once and for all.
#include "engine/ops/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace millrace {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> RandomLogits(size_t size, float spread, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> logits(size);
  for (float& x : logits) {
    // Sum of uniforms rather than std::normal_distribution, whose values differ from library to library.
    double sum = 0;
    for (int i = 0; i < 6; ++i) sum += static_cast<double>(random()) / 4294967296.0 - 0.5;
    x = static_cast<float>(sum * spread);
  }
  return logits;
}

// How often each id comes in `draws` consecutive token indices.
std::vector<int> Histogram(const std::vector<float>& logits, SamplingRequest request, int draws) {
  std::vector<int> counts(logits.size());
  for (int i = 0; i < draws; ++i) {
    request.token_index = i;
    const SampledToken token = Sample(logits, request);
    EXPECT_TRUE(token.finite);
    ++counts.at(token.id);
  }
  return counts;
}

// Chi-square in units of its standard deviation from its mean: a good sampler stays within a few.
double ChiSquareSigmas(const std::vector<int>& counts, const std::vector<double>& probabilities) {
  const double draws = std::accumulate(counts.begin(), counts.end(), 0.0);
  double chi = 0;
  int cells = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (probabilities[i] == 0) {
      EXPECT_EQ(counts[i], 0) << "id " << i << " has no probability";
      continue;
    }
    const double expected = probabilities[i] * draws;
    chi += (counts[i] - expected) * (counts[i] - expected) / expected;
    ++cells;
  }
  const double freedom = cells - 1;
  return freedom == 0 ? 0 : (chi - freedom) / std::sqrt(2 * freedom);
}

// What the distribution is after temperature, min-p, top-k and top-p, by sorting.
std::vector<double> SlowDistribution(const std::vector<float>& logits, const SamplingParams& p) {
  const double max = *std::max_element(logits.begin(), logits.end());
  std::vector<double> w(logits.size());
  for (size_t i = 0; i < w.size(); ++i) w[i] = std::exp((logits[i] - max) / p.temperature);
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return w[a] > w[b]; });
  while (order.size() > 1 && w[order.back()] < p.min_p) order.pop_back();
  if (p.top_k > 0 && order.size() > static_cast<size_t>(p.top_k)) order.resize(p.top_k);
  double total = 0;
  for (int id : order) total += w[id];
  double before = 0;
  std::vector<double> kept(logits.size());
  for (int id : order) {
    if (p.top_p < 1 && before > 0 && before >= p.top_p * total) break;
    kept[id] = w[id];
    before += w[id];
  }
  for (double& x : kept) x /= before;
  return kept;
}

// kat_vectors of Random123.
TEST(Philox, KnownAnswers) {
  const struct {
    uint64_t key, low, high;
    uint32_t out[4];
  } cases[] = {
      {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& c : cases) {
    const PhiloxWords words = Philox4x32(c.key, c.low, c.high);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(words.v[i], c.out[i]);
  }
}

TEST(Sampler, GreedyTakesTheHighestAndOfEqualsTheLowerId) {
  SamplingRequest request;
  for (float temperature : {0.0f, 9e-6f, -1.0f}) {
    request.params.temperature = temperature;
    EXPECT_EQ(Sample({1, 3, 2, 3}, request).id, 1);
    EXPECT_EQ(Sample({-0.0f, 0.0f}, request).id, 0);
    EXPECT_EQ(Sample(std::vector<float>(1000, 7.0f), request).id, 0);
  }
  // Around the widths the passes work in, with the maximum in every place.
  request.params.temperature = 0;
  for (size_t size : {1, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025}) {
    std::vector<float> logits(size, -5.0f);
    for (size_t i = 0; i < size; ++i) {
      logits[i] = 1;
      ASSERT_EQ(Sample(logits, request).id, static_cast<int32_t>(i)) << size;
      logits[i] = -5;
    }
  }
}

TEST(Sampler, LogprobsAreThoseOfTheRowBeforeTemperatureAndTruncation) {
  const std::vector<float> logits = RandomLogits(5000, 8, 1);
  SamplingRequest request;
  request.params.temperature = 0.3f;
  request.params.top_k = 5;
  request.params.top_logprobs = 20;
  const SampledToken token = Sample(logits, request);

  long double sum = 0;
  for (float x : logits) sum += std::exp(static_cast<long double>(x));
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  EXPECT_FLOAT_EQ(token.logprob, static_cast<float>(logits[token.id] - std::log(sum)));
  ASSERT_EQ(token.top.size(), 20u);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(token.top[i].first, order[i]);
    EXPECT_FLOAT_EQ(token.top[i].second, static_cast<float>(logits[order[i]] - std::log(sum)));
  }
}

TEST(Sampler, TopLogprobsListsTiesByIdAndNothingImpossible) {
  SamplingRequest request;
  request.params.top_logprobs = 4;
  const SampledToken token = Sample({2, -kInf, 3, 3, 2, 2}, request);
  std::vector<int32_t> ids;
  for (const auto& [id, value] : token.top) ids.push_back(id);
  EXPECT_EQ(ids, (std::vector<int32_t>{2, 3, 0, 4}));
  EXPECT_EQ(Sample({-kInf, 1}, request).top.size(), 1u);
}

TEST(Sampler, DrawsAreAFunctionOfSeedChoiceAndIndexAlone) {
  const std::vector<float> logits(4096, 0.0f);
  SamplingRequest request;
  request.params.seed = 42;
  request.choice = 3;
  request.token_index = 1000;
  const int32_t id = Sample(logits, request).id;
  for (int i = 0; i < 5; ++i) {
    Sample(RandomLogits(100 + i, 4, i), request);  // other work in between moves nothing
    EXPECT_EQ(Sample(logits, request).id, id);
  }
  std::set<int32_t> others;
  for (int i = 0; i < 8; ++i) {
    SamplingRequest other = request;
    (i % 3 == 0 ? other.params.seed : i % 3 == 1 ? other.token_index : other.params.seed) += 1 + i;
    if (i == 7) other.choice = 4;
    others.insert(Sample(logits, other).id);
  }
  EXPECT_GE(others.size(), 6u);
}

TEST(Sampler, UniformRowIsDrawnUniformly) {
  for (size_t size : {2, 10, 257}) {
    SamplingRequest request;
    request.params.seed = 11;
    const std::vector<int> counts = Histogram(std::vector<float>(size, -3.5f), request, 200 * static_cast<int>(size));
    EXPECT_LT(std::fabs(ChiSquareSigmas(counts, std::vector<double>(size, 1.0 / static_cast<double>(size)))), 4)
        << size;
  }
}

TEST(Sampler, FollowsTheDistributionOfEveryCombinationOfCuts) {
  const std::vector<float> logits = RandomLogits(60, 4, 7);
  int combination = 0;
  for (float temperature : {0.7f, 1.0f, 1.5f}) {
    for (int top_k : {0, 1, 8, 60, 1000}) {
      for (float top_p : {1.0f, 0.9f, 0.5f}) {
        for (float min_p : {0.0f, 0.1f, 1.0f}) {
          SamplingRequest request;
          SamplingParams& p = request.params;
          p.temperature = temperature, p.top_k = top_k, p.top_p = top_p, p.min_p = min_p;
          p.seed = ++combination;
          const std::vector<double> expected = SlowDistribution(logits, p);
          const double sigmas = ChiSquareSigmas(Histogram(logits, request, 3000), expected);
          EXPECT_LT(std::fabs(sigmas), 6) << temperature << " " << top_k << " " << top_p << " " << min_p;
        }
      }
    }
  }
}

// The set that can be drawn, seen by drawing often: exactly the slow model's, on rows too big for the test above.
TEST(Sampler, BigRowsAreCutWhereSortingWouldCut) {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    std::vector<float> logits = RandomLogits(20000, 3 + static_cast<float>(seed), seed);
    if (seed % 3 == 0) {
      for (float& x : logits) x = std::round(x * 2) / 2;  // many ties
    }
    SamplingRequest request;
    SamplingParams& p = request.params;
    p.top_p = seed % 2 == 0 ? 0.6f : 1.0f;
    p.top_k = seed % 4 == 1 ? 50 : 0;
    p.min_p = seed % 4 == 3 ? 0.3f : 0.0f;
    p.seed = seed;
    const std::vector<double> expected = SlowDistribution(logits, p);
    for (int i = 0; i < 100; ++i) {
      request.token_index = i;
      const SampledToken token = Sample(logits, request);
      ASSERT_GT(expected[token.id], 0) << "seed " << seed << " id " << token.id;
    }
  }
}

TEST(Sampler, TopPOfEqualTokensKeepsTheFractionAsWritten) {
  // As a float 0.6 is a little more than 0.6: six of ten stay, not seven.
  for (const auto& [top_p, kept] :
       std::vector<std::pair<float, int>>{{0.05f, 1}, {0.6f, 6}, {0.7f, 7}, {0.9f, 9}, {0.95f, 10}}) {
    SamplingRequest request;
    request.params.top_p = top_p;
    const std::vector<int> counts = Histogram(std::vector<float>(10, 0.0f), request, 2000);
    for (int id = 0; id < 10; ++id) EXPECT_EQ(counts[id] > 0, id < kept) << top_p << " " << id;
  }
}

TEST(Sampler, TopKOfOneIsGreedy) {
  SamplingRequest request;
  request.params.top_k = 1;
  for (int i = 0; i < 100; ++i) {
    request.token_index = i;
    EXPECT_EQ(Sample({0, 5, 5, 5}, request).id, 1);
  }
}

TEST(Sampler, BiasIsAddedAndBannedIdsAreNeverDrawn) {
  SamplingRequest request;
  request.params.logit_bias = {{2, 100.0f}, {99, 5.0f}, {-1, 5.0f}};  // ids that do not exist change nothing
  for (int i = 0; i < 50; ++i) {
    request.token_index = i;
    EXPECT_EQ(Sample({1, 2, 3, 4}, request).id, 2);
  }
  request.params.banned = {2, 1000};
  const std::vector<int> counts = Histogram({1, 2, 3, 4}, request, 2000);
  EXPECT_EQ(counts[2], 0);
  EXPECT_GT(counts[0], 0);
}

// A tiny vocabulary with -100 on every token: order decides, ties to the lower id, never NaN.
TEST(Sampler, BiasOnEveryTokenLeavesTheOrder) {
  SamplingRequest request;
  request.params.temperature = 0;
  for (int id = 0; id < 4; ++id) request.params.logit_bias.push_back({id, -100.0f});
  const SampledToken token = Sample({1, 3, 3, 2}, request);
  EXPECT_TRUE(token.finite);
  EXPECT_EQ(token.id, 1);
  request.params.logit_bias.clear();
  EXPECT_FLOAT_EQ(token.logprob, Sample({1, 3, 3, 2}, request).logprob);
}

TEST(Sampler, NothingAllowedIsSaidAndNotDrawn) {
  SamplingRequest request;
  request.params.banned = {0, 1, 2};
  request.params.top_logprobs = 3;
  for (float temperature : {0.0f, 1.0f}) {
    request.params.temperature = temperature;
    const SampledToken token = Sample({1, 2, 3}, request);
    EXPECT_FALSE(token.finite);
    EXPECT_EQ(token.id, -1);
    EXPECT_TRUE(token.top.empty());
  }
  EXPECT_FALSE(Sample(std::vector<float>(100, -kInf), SamplingRequest{}).finite);
}

TEST(Sampler, NanOrInfinityAnywhereIsSaid) {
  for (size_t size : {1, 5, 8, 100}) {
    for (size_t at = 0; at < size; ++at) {
      for (float bad : {kNan, kInf}) {
        std::vector<float> logits(size, 0.5f);
        logits[at] = bad;
        ASSERT_FALSE(Sample(logits, SamplingRequest{}).finite) << size << " " << at;
      }
    }
  }
}

TEST(Sampler, RowsMostlyMaskedDrawOnlyWhatIsLeft) {
  std::vector<float> logits(3000, -kInf);
  logits[2999] = -4;
  logits[17] = -4;
  for (float top_p : {1.0f, 0.99f}) {
    SamplingRequest request;
    request.params.top_p = top_p;
    const std::vector<int> counts = Histogram(logits, request, 500);
    EXPECT_EQ(counts[17] + counts[2999], 500);
    EXPECT_GT(counts[17], 200);
    EXPECT_GT(counts[2999], 200);
  }
}

TEST(Sampler, ExtremeLogitsAndTemperaturesStayFinite) {
  for (float temperature : {1e-5f, 1e-3f, 2.0f, 1e30f}) {
    SamplingRequest request;
    request.params.temperature = temperature;
    request.params.top_logprobs = 2;
    const SampledToken token = Sample({-3e38f, 3e38f, 0, -kInf, 3e38f}, request);
    EXPECT_TRUE(token.finite);
    EXPECT_NE(token.id, 3);
    EXPECT_FALSE(std::isnan(token.logprob));
    EXPECT_FLOAT_EQ(token.top[0].second, -std::log(2.0f));
  }
}

TEST(Sampler, PenaltiesAreRepetitionThenFrequencyThenPresence) {
  SamplingRequest request;
  SamplingParams& p = request.params;
  p.repetition_penalty = 2.0f;
  p.frequency_penalty = 0.5f;
  p.presence_penalty = 0.25f;
  p.logit_bias = {{0, 1.0f}};
  p.top_logprobs = 4;
  const std::vector<int32_t> prompt = {1, 3, 3}, output = {0, 2, 2};
  request.prompt = prompt;
  request.output = output;
  const SampledToken token = Sample({3, 4, -1, -2}, request);
  // 0: (3+1)/2 - 0.5 - 0.25; 1: 4/2; 2: -1*2 - 2*0.5 - 0.25; 3: -2*2, once for a prompt that has it twice
  const float adjusted[] = {1.25f, 2.0f, -3.25f, -4.0f};
  double sum = 0;
  for (float x : adjusted) sum += std::exp(x);
  std::map<int32_t, float> top(token.top.begin(), token.top.end());
  for (int id = 0; id < 4; ++id) EXPECT_FLOAT_EQ(top[id], static_cast<float>(adjusted[id] - std::log(sum))) << id;
}

TEST(Sampler, PresenceAndFrequencyLookAtOutputOnly) {
  SamplingRequest request;
  request.params.temperature = 0;
  request.params.presence_penalty = 2.0f;
  request.params.frequency_penalty = 2.0f;
  const std::vector<int32_t> tokens = {1};
  request.prompt = tokens;
  EXPECT_EQ(Sample({1, 2}, request).id, 1);
  request.output = tokens;
  EXPECT_EQ(Sample({1, 2}, request).id, 0);
}

}  // namespace
}  // namespace millrace
