// SPDX-License-Identifier: Apache-2.0
// The demo model in `release`, teacher-forced, against a plain implementation of the official rounding points.
//
// Rounding chaotically amplifies a different order of summation, so `release` is held to statistics: how far two right
// implementations were seen apart, with room, and well below what one forgotten rounding costs. The last part proves
// that: it switches off one rounding point at a time and demands that a bound breaks. The data is described in
// tests/golden/README.md; `exact` is golden_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "tests/golden/teacher_forcing.h"

namespace millrace::golden {
namespace {

using nlohmann::json;

// Two right implementations that sum in different orders: < 0.01 % after layer 0, <= 0.2 % after layer 1, <= 1.7 %
// after the last; mean difference of log-probabilities 0.00024. `exact` is 2.5 to 5 % away from layer 0 on, and 0.00065
// in log-probabilities. Selections overlap by 94 to 100 % with the goldens. The row with least room is case 18, second
// CSA layer, position 3124: orders of summation that are right too were seen at 118 of 128 entries there (92 %), so
// look at the other statistics before blaming a kernel that misses the bound in this row alone. The FIM case is
// nonsense to the model and chaotic (the oracle itself, with another order of summation, turns an argmax that led by
// 0.52): it counts neither for log-probabilities nor for argmax.
struct Bounds {
  double streams_after_layer0 = 0.0005;
  double streams_after_layer1 = 0.006;
  double streams_after_last = 0.025;
  double equal_values_after_layer0 = 0.99;
  double equal_values_after_layer1 = 0.92;
  double mean_logprob_difference = 0.0004;
  double least_selection_overlap = 0.93;
  double repeated_selections = 0.5;
};
constexpr Bounds kCpuBounds;
// Other orders of summation than the CPU's, and nothing else: 0.0002 %, 0.20 %, 1.46 %, 99.98 and 99.5 % of values
// equal, 0.00033 were seen. The row with least room (above) has 118 of 128 entries. A kernel that sums FP8 products in
// the tensor cores' 13 bits is far outside: 1.08 % after layer 0.
constexpr Bounds kCudaBounds = {0.0005, 0.006, 0.025, 0.99, 0.92, 0.0004, 0.92, 0.3};
constexpr double kMeanSelectionOverlap = 0.96;
constexpr double kEqualExpertRows = 0.97;
constexpr double kMargin = 0.1;
// Three statistics sharper than the above, for what those cannot see. Stream values equal to the bit: after layer 0,
// where nothing was amplified yet, 100 % in the median case between right implementations; after layer 1, the first
// with compressed entries, 100 % in the median row (80 % if entries are not rounded). And selections of layer 1 at
// positions where rounding the index scores to BF16 changed the outcome (golden_selection): a right implementation
// repeats most of them, one that forgets to round repeats none.

struct ReleaseStatistics {
  double streams_after_layer0 = 0, streams_after_layer1 = 0, streams_after_last = 0;  // relative norm, median of cases
  double equal_values_after_layer0 = 0;                                               // share, median of cases
  double equal_values_after_layer1 = 0;                                               // share, median of positions
  double repeated_selections = 0;                                                     // share of rounding's own
  double least_selection_overlap = 0;                                                 // share, worst row
  double mean_selection_overlap = 0;
  double equal_expert_rows = 0;                 // share of (layer, position)
  double logprob_difference = 0;                // mean, without the FIM case
  std::vector<std::string> argmax_differences;  // where the margin exceeds kMargin
  int num_stream_cases = 0, num_selections = 0, num_expert_rows = 0, num_tokens = 0;

  std::string ToString() const {
    return absl::StrFormat(
        "streams %.4f%% %.3f%% %.2f%% (%d cases), equal values after layers 0 and 1 %.2f%% %.2f%%, selections "
        "overlap %.1f%% at least and %.1f%% in the mean of %d, repeated selections %.1f%%, equal experts %.2f%% of %d "
        "rows, log-probabilities %.6f (%d "
        "tokens), argmax differences %d",
        100 * streams_after_layer0, 100 * streams_after_layer1, 100 * streams_after_last, num_stream_cases,
        100 * equal_values_after_layer0, 100 * equal_values_after_layer1, 100 * least_selection_overlap,
        100 * mean_selection_overlap, num_selections, 100 * repeated_selections, 100 * equal_expert_rows,
        num_expert_rows, logprob_difference, num_tokens, argmax_differences.size());
  }
};

// The bounds that do not hold, each with what was found.
std::vector<std::string> BrokenBounds(const ReleaseStatistics& s, const Bounds& bounds = kCpuBounds) {
  std::vector<std::string> broken;
  const auto at_most = [&](const char* what, double value, double bound) {
    if (!(value <= bound)) broken.push_back(absl::StrFormat("%s: %.6f > %.6f", what, value, bound));
  };
  const auto at_least = [&](const char* what, double value, double bound) {
    if (!(value >= bound)) broken.push_back(absl::StrFormat("%s: %.6f < %.6f", what, value, bound));
  };
  at_most("streams after layer 0", s.streams_after_layer0, bounds.streams_after_layer0);
  at_most("streams after layer 1", s.streams_after_layer1, bounds.streams_after_layer1);
  at_most("streams after the last layer", s.streams_after_last, bounds.streams_after_last);
  at_least("equal values after layer 0", s.equal_values_after_layer0, bounds.equal_values_after_layer0);
  at_least("equal values after layer 1", s.equal_values_after_layer1, bounds.equal_values_after_layer1);
  at_least("repeated selections", s.repeated_selections, bounds.repeated_selections);
  at_least("least selection overlap", s.least_selection_overlap, bounds.least_selection_overlap);
  at_least("mean selection overlap", s.mean_selection_overlap, kMeanSelectionOverlap);
  at_least("equal expert rows", s.equal_expert_rows, kEqualExpertRows);
  at_most("difference of log-probabilities", s.logprob_difference, bounds.mean_logprob_difference);
  for (const std::string& difference : s.argmax_differences) broken.push_back("argmax: " + difference);
  return broken;
}

// What the statistics are drawn from.
struct Samples {
  std::vector<std::vector<double>> streams;       // [layer][case] relative norm
  std::vector<double> equal_values_after_layer0;  // [case]
  std::vector<double> equal_values_after_layer1;  // [case and position]
  std::vector<double> selection_overlap;          // [case, layer and position]
  std::vector<double> repeated_selections;        // [case and position] 0 or 1
  std::vector<double> equal_experts;              // [case, layer and position] 0 or 1
  std::vector<double> logprob_difference;         // [case and token]
};

double EqualValues(absl::Span<const float> a, absl::Span<const float> b) {
  int64_t equal = 0;
  for (size_t i = 0; i < a.size(); ++i) equal += a[i] == b[i];
  return static_cast<double>(equal) / static_cast<double>(a.size());
}

void CompareStreamsAndExperts(const Arrays& goldens, const std::string& name, const Observed& observed,
                              const ModelConfig& config, Samples& samples) {
  const std::vector<int32_t> positions = goldens.Ints(name + ".positions");
  const std::vector<float> streams = goldens.Floats(name + ".streams");
  const std::vector<int32_t> experts = goldens.Ints(name + ".experts");
  const int64_t width = config.hc_mult * config.hidden_size, top_k = config.num_experts_per_tok;
  const auto num_positions = static_cast<int64_t>(positions.size());
  samples.streams.resize(config.num_hidden_layers);
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    std::vector<float> ours;
    const absl::Span<const float> theirs = Row(streams, layer, num_positions * width);
    for (int64_t i = 0; i < num_positions; ++i) {
      const int64_t row = RowOf(observed, positions[i]);
      const absl::Span<const float> streams_row = Row(observed.streams[layer], row, width);
      ours.insert(ours.end(), streams_row.begin(), streams_row.end());
      if (layer == 1)
        samples.equal_values_after_layer1.push_back(EqualValues(streams_row, theirs.subspan(i * width, width)));
      const int32_t* chosen = &observed.experts[layer][row * top_k];
      samples.equal_experts.push_back(
          std::equal(chosen, chosen + top_k, &experts[(layer * num_positions + i) * top_k]));
    }
    samples.streams[layer].push_back(RelativeNorm(ours, theirs));
    if (layer == 0) samples.equal_values_after_layer0.push_back(EqualValues(ours, theirs));
  }
}

// Share of `expected` that `layer` selected at `position`; 0 if it selected another number of entries.
double SelectionOverlap(const Observed& observed, int layer, int32_t position, absl::Span<const int32_t> expected) {
  const auto found = observed.selections.find({layer, position});
  if (found == observed.selections.end() || found->second.size() != expected.size()) return 0;
  std::vector<int32_t> shared;  // both are ascending
  std::set_intersection(found->second.begin(), found->second.end(), expected.begin(), expected.end(),
                        std::back_inserter(shared));
  return static_cast<double>(shared.size()) / static_cast<double>(expected.size());
}

// NAME.topk [num_layers, positions, index_topk] against the first `num_layers` CSA layers.
std::vector<double> SelectionOverlaps(const Arrays& goldens, const std::string& name, const Observed& observed,
                                      const ModelConfig& config) {
  std::vector<double> overlaps;
  const std::vector<int32_t> positions = goldens.Ints(name + ".topk_positions");
  const std::vector<int32_t> topk = goldens.Ints(name + ".topk");
  size_t at = 0;
  for (int layer = 0; layer < config.num_hidden_layers && at < topk.size(); ++layer) {
    if (config.layer_kinds[layer] != LayerKind::kCsa) continue;
    for (const int32_t position : positions) {
      overlaps.push_back(
          SelectionOverlap(observed, layer, position, absl::MakeConstSpan(topk).subspan(at, config.index_topk)));
      at += config.index_topk;
    }
  }
  return overlaps;
}

enum class Cases { kAll, kShortDetailed };  // the latter: those of less than 1,000 tokens that have layer goldens

// Scores prompt and continuation of the demo cases.
ReleaseStatistics CompareWithReleaseGoldens(Engine& engine, Cases cases) {
  const json greedy = ReadJson(absl::StrCat(kDemoGoldens, "/golden_greedy.json"));
  const json release = ReadJson(absl::StrCat(kDemoGoldens, "/golden_release.json"));
  const Arrays layers(absl::StrCat(kDemoGoldens, "/golden_release.safetensors"));
  const Arrays selections(absl::StrCat(kDemoGoldens, "/golden_selection.safetensors"));
  const ModelConfig& config = engine.config();

  ReleaseStatistics statistics;
  Samples samples;
  for (size_t n = 0; n < greedy.size(); ++n) {
    const std::string name = absl::StrCat("case", n);
    const bool detailed = layers.Has(name + ".streams");

    auto tokens = greedy[n]["prompt_ids"].get<std::vector<int32_t>>();
    const auto num_prompt = static_cast<int32_t>(tokens.size());
    const auto continuation = greedy[n]["greedy_ids"].get<std::vector<int32_t>>();
    tokens.insert(tokens.end(), continuation.begin(), continuation.end());
    if (cases == Cases::kShortDetailed && (!detailed || tokens.size() >= 1000)) continue;
    std::set<int32_t> positions;
    for (size_t i = 0; i < continuation.size(); ++i) positions.insert(num_prompt - 1 + static_cast<int32_t>(i));
    for (const Arrays* goldens : {&layers, &selections})
      for (const char* list : {".positions", ".topk_positions"})
        if (goldens->Has(name + list))
          for (const int32_t position : goldens->Ints(name + list)) positions.insert(position);
    const Observed observed = RunFresh(
        engine, {.tokens = tokens, .positions = {positions.begin(), positions.end()}, .observe_layers = detailed});

    if (detailed) {
      EXPECT_EQ(tokens, layers.Ints(name + ".input_ids"));
      CompareStreamsAndExperts(layers, name, observed, config, samples);
    }
    if (layers.Has(name + ".topk"))
      for (const double overlap : SelectionOverlaps(layers, name, observed, config))
        samples.selection_overlap.push_back(overlap);
    if (selections.Has(name + ".topk"))
      for (const double overlap : SelectionOverlaps(selections, name, observed, config))
        samples.repeated_selections.push_back(overlap == 1);

    const auto logprobs = release[n]["logprobs"].get<std::vector<double>>();
    const auto argmax = release[n]["argmax"].get<std::vector<int32_t>>();
    const auto margin = release[n]["margin"].get<std::vector<double>>();
    for (size_t i = 0; i < continuation.size(); ++i) {
      const int64_t row = RowOf(observed, num_prompt - 1 + static_cast<int32_t>(i));
      const std::vector<double> ours = LogProbabilities(Row(observed.logits, row, config.vocab_size));
      const auto best = static_cast<int32_t>(std::max_element(ours.begin(), ours.end()) - ours.begin());
      if (greedy[n].contains("fim")) continue;
      if (best != argmax[i] && margin[i] > kMargin)
        statistics.argmax_differences.push_back(
            absl::StrFormat("%s token %d: %d instead of %d, which leads it by %.3f here and by %.3f in the goldens",
                            name, i, best, argmax[i], ours[argmax[i]] - ours[best], margin[i]));
      samples.logprob_difference.push_back(std::abs(ours[continuation[i]] - logprobs[i]));
    }
  }

  statistics.streams_after_layer0 = Median(samples.streams[0]);
  statistics.streams_after_layer1 = Median(samples.streams[1]);
  statistics.streams_after_last = Median(samples.streams.back());
  statistics.equal_values_after_layer0 = Median(samples.equal_values_after_layer0);
  statistics.equal_values_after_layer1 = Median(samples.equal_values_after_layer1);
  statistics.least_selection_overlap =
      *std::min_element(samples.selection_overlap.begin(), samples.selection_overlap.end());
  statistics.mean_selection_overlap = Mean(samples.selection_overlap);
  statistics.repeated_selections = Mean(samples.repeated_selections);
  statistics.equal_expert_rows = Mean(samples.equal_experts);
  statistics.logprob_difference = Mean(samples.logprob_difference);
  statistics.num_stream_cases = static_cast<int>(samples.streams[0].size());
  statistics.num_selections = static_cast<int>(samples.selection_overlap.size());
  statistics.num_expert_rows = static_cast<int>(samples.equal_experts.size());
  statistics.num_tokens = static_cast<int>(samples.logprob_difference.size());
  return statistics;
}

TEST(DemoModelRelease, StaysWithinEveryBoundOfTheReleaseGoldens) {
  const std::unique_ptr<Engine> engine = MakeEngine(kDemoModel, {.numerics = Numerics::kRelease});
  const ReleaseStatistics statistics = CompareWithReleaseGoldens(*engine, Cases::kAll);
  absl::PrintF("%s\n", statistics.ToString());
  EXPECT_THAT(BrokenBounds(statistics), testing::IsEmpty());
  EXPECT_EQ(statistics.num_stream_cases, 6);
  EXPECT_EQ(statistics.num_selections, 8);
  EXPECT_EQ(statistics.num_expert_rows, 6 * 48);
  EXPECT_EQ(statistics.num_tokens, 632 - 55);
}

TEST(CudaDemoModelRelease, StaysWithinEveryBoundOfTheReleaseGoldens) {
  if (!CudaMissing().empty()) GTEST_SKIP() << CudaMissing();
  const std::unique_ptr<Engine> engine =
      MakeEngine(kDemoModel, {.numerics = Numerics::kRelease, .device = DeviceKind::kCuda});
  const ReleaseStatistics statistics = CompareWithReleaseGoldens(*engine, Cases::kAll);
  absl::PrintF("%s\n", statistics.ToString());
  EXPECT_THAT(BrokenBounds(statistics, kCudaBounds), testing::IsEmpty());
  EXPECT_EQ(statistics.num_stream_cases, 6);
  EXPECT_EQ(statistics.num_tokens, 632 - 55);
}

// Greedy answers part where two tokens are nearly as good; nowhere else.
TEST(CudaDemoModelRelease, GreedyAnswersAreTheCpusUnlessTheMarginIsSmall) {
  if (!CudaMissing().empty()) GTEST_SKIP() << CudaMissing();
  const json cases = ReadJson(absl::StrCat(kDemoGoldens, "/golden_greedy.json"));
  const std::unique_ptr<Engine> cpu = MakeEngine(kDemoModel, {.numerics = Numerics::kRelease});
  const std::unique_ptr<Engine> cuda =
      MakeEngine(kDemoModel, {.numerics = Numerics::kRelease, .device = DeviceKind::kCuda});
  int equal = 0;
  for (size_t n = 0; n < cases.size(); ++n) {
    SCOPED_TRACE(absl::StrCat("case ", n));
    const auto prompt = cases[n]["prompt_ids"].get<std::vector<int32_t>>();
    const size_t num_tokens = std::min<size_t>(cases[n]["greedy_ids"].size(), 64);
    const std::vector<SampledToken> ours = DecodeGreedily(*cuda, prompt, num_tokens);
    const std::vector<SampledToken> theirs = DecodeGreedily(*cpu, prompt, num_tokens);
    size_t i = 0;
    while (i < num_tokens && ours[i].id == theirs[i].id) ++i;
    if (i == num_tokens) {
      ++equal;
      continue;
    }
    EXPECT_LT(theirs[i].top[0].second - theirs[i].top[1].second, 0.05)
        << "token " << i << ": " << ours[i].id << " instead of " << theirs[i].id;
  }
  absl::PrintF("%d of %d answers equal\n", equal, cases.size());
  EXPECT_GE(equal, 15);
}

TEST(DemoModelRelease, ExactNumericsBreakTheBounds) {
  const std::unique_ptr<Engine> engine = MakeEngine(kDemoModel, {.numerics = Numerics::kExact});
  const ReleaseStatistics statistics = CompareWithReleaseGoldens(*engine, Cases::kShortDetailed);
  absl::PrintF("%s\n", statistics.ToString());
  EXPECT_GT(statistics.streams_after_layer0, kCpuBounds.streams_after_layer0);
  EXPECT_GT(statistics.streams_after_layer1, kCpuBounds.streams_after_layer1);
}

struct RoundingPoint {
  const char* name;
  bool Rounding::*member;
};
void PrintTo(const RoundingPoint& point, std::ostream* out) { *out << point.name; }

class ForgottenRounding : public testing::TestWithParam<RoundingPoint> {};

TEST_P(ForgottenRounding, BreaksABound) {
  Rounding rounding = Rounding::All();
  ASSERT_TRUE(rounding.*GetParam().member);
  rounding.*GetParam().member = false;
  const std::unique_ptr<Engine> engine = MakeEngine(kDemoModel, {.numerics = Numerics::kRelease, .rounding = rounding});
  const ReleaseStatistics statistics = CompareWithReleaseGoldens(*engine, Cases::kShortDetailed);
  const std::vector<std::string> broken = BrokenBounds(statistics);
  absl::PrintF("without %s: %s\n", GetParam().name, statistics.ToString());
  for (const std::string& bound : broken) absl::PrintF("  broken: %s\n", bound);
  EXPECT_THAT(broken, testing::Not(testing::IsEmpty())) << "nothing noticed that " << GetParam().name << " is missing";
}

INSTANTIATE_TEST_SUITE_P(
    EveryPoint, ForgottenRounding,
    testing::Values(RoundingPoint{"activation_quant", &Rounding::activation_quant},
                    RoundingPoint{"linear_out", &Rounding::linear_out}, RoundingPoint{"norm_out", &Rounding::norm_out},
                    RoundingPoint{"rope_out", &Rounding::rope_out}, RoundingPoint{"kv_quant", &Rounding::kv_quant},
                    RoundingPoint{"index_fp4", &Rounding::index_fp4},
                    RoundingPoint{"index_score", &Rounding::index_score},
                    RoundingPoint{"compressed_entry", &Rounding::compressed_entry},
                    RoundingPoint{"attention_p", &Rounding::attention_p},
                    RoundingPoint{"attention_out", &Rounding::attention_out},
                    RoundingPoint{"expert_act", &Rounding::expert_act}, RoundingPoint{"streams", &Rounding::streams}),
    [](const auto& param_info) { return param_info.param.name; });

// A point added to Rounding without a test here would go unnoticed.
TEST(RoundingPoints, AreAllTried) { EXPECT_EQ(sizeof(Rounding), 12 * sizeof(bool)); }

}  // namespace
}  // namespace millrace::golden
