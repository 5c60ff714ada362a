// SPDX-License-Identifier: Apache-2.0
// The engine against what other people's code says of the same checkpoints.
//
// Three oracles: transformers in FP32 (tiny-a and the random configurations; bound 1e-3, 1e-5 expected), an independent
// greedy decoder (the demo model in `exact`), and a plain implementation of the official rounding points (the demo
// model in `release`). Rounding chaotically amplifies a different order of summation, so `release` is held to
// statistics: how far two right implementations were seen apart, with room, and well below what one forgotten rounding
// costs. The last part proves that: it switches off one rounding point at a time and demands that a bound breaks. The
// data is described in tests/golden/README.md.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "tests/golden/random_checkpoint.h"
#include "tests/golden/teacher_forcing.h"

namespace millrace::golden {
namespace {

using nlohmann::json;

json ReadJson(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file.good()) << path;
  return json::parse(file);
}

absl::Span<const float> Row(const std::vector<float>& rows, int64_t row, int64_t width) {
  return absl::MakeConstSpan(rows).subspan(row * width, width);
}

// ---------------------------------------------------------------------------------------------------------------------
// transformers in FP32
// ---------------------------------------------------------------------------------------------------------------------

constexpr double kExactBound = 1e-3;

// Every case of a golden file: logits and streams at every listed position, MTP logits where listed.
void ExpectAgreesWithTransformers(const std::string& model_dir, const std::string& goldens_path) {
  const Arrays goldens(goldens_path);
  int num_cases = 0, num_positions = 0;
  bool mtp = false;
  for (const std::string& name : goldens.Cases()) mtp |= goldens.Has(name + ".mtp_logits");
  const std::unique_ptr<Engine> engine = MakeEngine(model_dir, {.numerics = Numerics::kExact, .mtp = mtp});
  const ModelConfig& config = engine->config();
  for (const std::string& name : goldens.Cases()) {
    SCOPED_TRACE(name);
    const std::vector<int32_t> ids = goldens.Ints(name + ".input_ids");
    const std::vector<int32_t> positions = goldens.Ints(name + ".positions");
    const Observed observed = Run(*engine, {.tokens = ids, .positions = positions, .observe_layers = true});

    const double logits = MaxDifference(observed.logits, goldens.Floats(name + ".logits"));
    EXPECT_LE(logits, kExactBound) << "logits";

    const std::vector<float> streams = goldens.Floats(name + ".streams");
    const int64_t per_layer = static_cast<int64_t>(streams.size()) / config.num_hidden_layers;
    std::string by_layer;
    for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
      const double difference = MaxDifference(observed.streams[layer], Row(streams, layer, per_layer));
      EXPECT_LE(difference, kExactBound) << "streams after layer " << layer;
      absl::StrAppendFormat(&by_layer, " %.1e", difference);
    }

    double mtp_logits = 0;
    if (goldens.Has(name + ".mtp_logits")) {
      const std::vector<float> expected = goldens.Floats(name + ".mtp_logits");
      const std::vector<int32_t> mtp_positions = goldens.Ints(name + ".mtp_positions");
      for (size_t i = 0; i < mtp_positions.size(); ++i) {
        const auto found = observed.mtp_logits.find(mtp_positions[i]);
        ASSERT_NE(found, observed.mtp_logits.end()) << "no MTP logits at position " << mtp_positions[i];
        const double difference = MaxDifference(found->second, Row(expected, i, config.vocab_size));
        EXPECT_LE(difference, kExactBound) << "MTP logits at position " << mtp_positions[i];
        mtp_logits = std::max(mtp_logits, difference);
      }
    }
    absl::PrintF("%s %s: %d tokens, greatest difference: logits %.1e, MTP %.1e, streams by layer%s\n", model_dir, name,
                 ids.size(), logits, mtp_logits, by_layer);
    ++num_cases;
    num_positions += static_cast<int>(positions.size());
  }
  EXPECT_GT(num_cases, 0);
  EXPECT_GT(num_positions, 0);
}

TEST(TinyModel, EveryListedPositionOfEveryLengthAgreesWithTransformers) {
  ExpectAgreesWithTransformers("tests/data/tiny-a", "tests/data/tiny-a/golden.safetensors");
}

class RandomConfiguration : public testing::TestWithParam<const char*> {};

TEST_P(RandomConfiguration, AgreesWithTransformers) {
  const std::string data_dir = absl::StrCat("tests/data/", GetParam());
  const std::string model_dir = absl::StrCat(testing::TempDir(), "/", GetParam());
  WriteRandomCheckpoint(data_dir, model_dir);
  ExpectAgreesWithTransformers(model_dir, data_dir + "/golden.safetensors");
}

INSTANTIATE_TEST_SUITE_P(All, RandomConfiguration,
                         testing::Values("random-window", "random-yarn", "random-wide", "random-mtp"),
                         [](const auto& param_info) {
                           std::string name = param_info.param;
                           std::erase(name, '-');
                           return name;
                         });

// ---------------------------------------------------------------------------------------------------------------------
// The demo model, greedy, in `exact`
// ---------------------------------------------------------------------------------------------------------------------

// Prompt, then decode steps until `num_tokens` were drawn. Returns them in order.
std::vector<SampledToken> DecodeGreedily(Engine& engine, absl::Span<const int32_t> prompt, size_t num_tokens) {
  const absl::StatusOr<SequenceId> sequence = engine.NewSequence(prompt.size() + num_tokens);
  CHECK(sequence.ok(), sequence.status().ToString());
  const SamplingRequest greedy{.params = {.temperature = 0, .top_logprobs = 8}};
  std::vector<SampledToken> drawn;
  std::vector<int32_t> next(prompt.begin(), prompt.end());
  while (drawn.size() < num_tokens) {
    absl::Span<const int32_t> left = next;
    while (!left.empty()) {
      const size_t size = std::min<size_t>(left.size(), engine.options().max_batch_tokens);
      const Chunk chunk{
          .sequence = *sequence, .tokens = left.subspan(0, size), .sampling = size == left.size() ? &greedy : nullptr};
      absl::StatusOr<std::vector<ChunkOutput>> output = engine.Forward({&chunk, 1});
      CHECK(output.ok(), output.status().ToString());
      if (size == left.size()) drawn.push_back((*output)[0].sampled);
      left.remove_prefix(size);
    }
    next = {drawn.back().id};
  }
  engine.Release(*sequence);
  return drawn;
}

TEST(DemoModelExact, AllTwentyGreedyContinuationsAreIdentical) {
  const json cases = ReadJson(absl::StrCat(kDemoGoldens, "/golden_greedy.json"));
  ASSERT_EQ(cases.size(), 20u);
  const std::unique_ptr<Engine> engine = MakeEngine(kDemoModel, {.numerics = Numerics::kExact});
  double greatest = 0;
  for (size_t n = 0; n < cases.size(); ++n) {
    SCOPED_TRACE(absl::StrCat("case ", n));
    const auto prompt = cases[n]["prompt_ids"].get<std::vector<int32_t>>();
    const auto ids = cases[n]["greedy_ids"].get<std::vector<int32_t>>();
    const auto logprobs = cases[n]["greedy_logprobs"].get<std::vector<double>>();
    const auto first_top = cases[n]["first_top_logprobs"].get<std::vector<std::pair<int32_t, double>>>();
    const std::vector<SampledToken> drawn = DecodeGreedily(*engine, prompt, ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      ASSERT_EQ(drawn[i].id, ids[i]) << "token " << i;
      EXPECT_NEAR(drawn[i].logprob, logprobs[i], kExactBound) << "token " << i;
      greatest = std::max(greatest, std::abs(drawn[i].logprob - logprobs[i]));
    }
    ASSERT_EQ(drawn[0].top.size(), first_top.size());
    for (size_t rank = 0; rank < first_top.size(); ++rank)
      EXPECT_NEAR(drawn[0].top[rank].second, first_top[rank].second, kExactBound) << "rank " << rank;
  }
  absl::PrintF("greatest difference of a log-probability: %.1e\n", greatest);
}

// ---------------------------------------------------------------------------------------------------------------------
// The demo model, teacher-forced, in `release`
// ---------------------------------------------------------------------------------------------------------------------

// Two right implementations that sum in different orders: < 0.01 % after layer 0, <= 0.2 % after layer 1, <= 1.7 %
// after the last; selections overlap by 94 to 100 %; mean difference of log-probabilities 0.00024. `exact` is 2.5 to 5
// % away from layer 0 on, and 0.00065 in log-probabilities.
constexpr double kStreamsAfterLayer0 = 0.0005;
constexpr double kStreamsAfterLayer1 = 0.006;
constexpr double kStreamsAfterLast = 0.025;
constexpr double kSelectionOverlap = 0.93;
constexpr double kEqualExpertRows = 0.97;
constexpr double kLogprobDifference = 0.0004;
constexpr double kMargin = 0.1;
// Sharper than any norm, since nothing was amplified yet: how many stream values after layer 0 are equal to the bit.
// 100 % in the median case between the two implementations above.
constexpr double kEqualValuesAfterLayer0 = 0.99;

struct ReleaseStatistics {
  double streams_after_layer0 = 0, streams_after_layer1 = 0, streams_after_last = 0;  // relative norm, median of cases
  double equal_values_after_layer0 = 0;                                               // share, median of cases
  double least_selection_overlap = 1;                                                 // share, worst row
  double equal_expert_rows = 0;                                                       // share of (layer, position)
  double logprob_difference = 0;                                                      // mean, without the FIM case
  int argmax_differences = 0;  // where the margin exceeds kMargin
  int num_stream_cases = 0, num_selections = 0, num_expert_rows = 0, num_tokens = 0;

  std::string ToString() const {
    return absl::StrFormat(
        "streams %.4f%% %.3f%% %.2f%% (%d cases), equal values after layer 0 %.2f%%, least selection overlap %.1f%% of "
        "%d, equal experts %.2f%% of %d rows, log-probabilities %.6f (%d tokens), argmax differences %d",
        100 * streams_after_layer0, 100 * streams_after_layer1, 100 * streams_after_last, num_stream_cases,
        100 * equal_values_after_layer0, 100 * least_selection_overlap, num_selections, 100 * equal_expert_rows,
        num_expert_rows, logprob_difference, num_tokens, argmax_differences);
  }
};

// The bounds that do not hold, each with what was found.
std::vector<std::string> BrokenBounds(const ReleaseStatistics& s) {
  std::vector<std::string> broken;
  const auto at_most = [&](const char* what, double value, double bound) {
    if (!(value <= bound)) broken.push_back(absl::StrFormat("%s: %.6f > %.6f", what, value, bound));
  };
  const auto at_least = [&](const char* what, double value, double bound) {
    if (!(value >= bound)) broken.push_back(absl::StrFormat("%s: %.6f < %.6f", what, value, bound));
  };
  at_most("streams after layer 0", s.streams_after_layer0, kStreamsAfterLayer0);
  at_most("streams after layer 1", s.streams_after_layer1, kStreamsAfterLayer1);
  at_most("streams after the last layer", s.streams_after_last, kStreamsAfterLast);
  at_least("equal values after layer 0", s.equal_values_after_layer0, kEqualValuesAfterLayer0);
  at_least("selection overlap", s.least_selection_overlap, kSelectionOverlap);
  at_least("equal expert rows", s.equal_expert_rows, kEqualExpertRows);
  at_most("difference of log-probabilities", s.logprob_difference, kLogprobDifference);
  at_most("argmax differences", s.argmax_differences, 0);
  return broken;
}

// Which positions of one case have detailed goldens, and where they lie in the golden arrays.
void CompareLayers(const Arrays& goldens, const std::string& name, const Observed& observed, const ModelConfig& config,
                   ReleaseStatistics& statistics, std::vector<std::vector<double>>& streams,
                   std::vector<double>& equal_values, int& equal_experts) {
  const std::vector<int32_t> positions = goldens.Ints(name + ".positions");
  const std::vector<float> golden_streams = goldens.Floats(name + ".streams");
  const std::vector<int32_t> golden_experts = goldens.Ints(name + ".experts");
  const int64_t width = config.hc_mult * config.hidden_size, top_k = config.num_experts_per_tok;
  const auto row_of = [&](int32_t position) {
    return std::lower_bound(observed.positions.begin(), observed.positions.end(), position) -
           observed.positions.begin();
  };
  streams.emplace_back();
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    std::vector<float> ours;
    for (size_t i = 0; i < positions.size(); ++i) {
      const absl::Span<const float> row = Row(observed.streams[layer], row_of(positions[i]), width);
      ours.insert(ours.end(), row.begin(), row.end());
      const int32_t* experts = &observed.experts[layer][row_of(positions[i]) * top_k];
      equal_experts += std::equal(experts, experts + top_k, &golden_experts[(layer * positions.size() + i) * top_k]);
      ++statistics.num_expert_rows;
    }
    const absl::Span<const float> theirs = Row(golden_streams, layer, static_cast<int64_t>(ours.size()));
    streams.back().push_back(RelativeNorm(ours, theirs));
    if (layer == 0) {
      int64_t equal = 0;
      for (size_t i = 0; i < ours.size(); ++i) equal += ours[i] == theirs[i];
      equal_values.push_back(static_cast<double>(equal) / ours.size());
    }
  }
  if (!goldens.Has(name + ".topk")) return;
  const std::vector<int32_t> topk_positions = goldens.Ints(name + ".topk_positions");
  const std::vector<int32_t> topk = goldens.Ints(name + ".topk");
  size_t at = 0;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (config.layer_kinds[layer] != LayerKind::kCsa) continue;
    for (const int32_t position : topk_positions) {
      const std::set<int32_t> theirs(&topk[at], &topk[at] + config.index_topk);
      at += config.index_topk;
      const auto found = observed.selections.find({layer, position});
      int64_t shared = 0;
      if (found != observed.selections.end() && found->second.size() == theirs.size())
        for (const int32_t entry : found->second) shared += theirs.contains(entry);
      statistics.least_selection_overlap =
          std::min(statistics.least_selection_overlap, static_cast<double>(shared) / config.index_topk);
      ++statistics.num_selections;
    }
  }
}

// Scores prompt and continuation of the demo cases; `all_cases` or only the six with detailed goldens.
ReleaseStatistics CompareWithReleaseGoldens(Engine& engine, bool all_cases) {
  const json greedy = ReadJson(absl::StrCat(kDemoGoldens, "/golden_greedy.json"));
  const json release = ReadJson(absl::StrCat(kDemoGoldens, "/golden_release.json"));
  const Arrays goldens(absl::StrCat(kDemoGoldens, "/golden_release.safetensors"));
  const int64_t vocab = engine.config().vocab_size;

  ReleaseStatistics statistics;
  std::vector<std::vector<double>> streams;  // [case][layer]
  std::vector<double> equal_values;
  int equal_experts = 0;
  double difference = 0;
  for (size_t n = 0; n < greedy.size(); ++n) {
    const std::string name = absl::StrCat("case", n);
    const bool detailed = goldens.Has(name + ".streams");
    if (!detailed && !all_cases) continue;

    auto tokens = greedy[n]["prompt_ids"].get<std::vector<int32_t>>();
    const auto num_prompt = static_cast<int32_t>(tokens.size());
    const auto continuation = greedy[n]["greedy_ids"].get<std::vector<int32_t>>();
    tokens.insert(tokens.end(), continuation.begin(), continuation.end());
    std::vector<int32_t> positions = Positions(num_prompt - 1, static_cast<int32_t>(continuation.size()));
    if (detailed) {
      EXPECT_EQ(tokens, goldens.Ints(name + ".input_ids"));
      for (const char* list : {".positions", ".topk_positions"})
        if (goldens.Has(name + list)) {
          const std::vector<int32_t> more = goldens.Ints(name + list);
          positions.insert(positions.end(), more.begin(), more.end());
        }
      std::sort(positions.begin(), positions.end());
      positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
    }
    const Observed observed = Run(engine, {.tokens = tokens, .positions = positions, .observe_layers = detailed});
    if (detailed)
      CompareLayers(goldens, name, observed, engine.config(), statistics, streams, equal_values, equal_experts);

    const auto logprobs = release[n]["logprobs"].get<std::vector<double>>();
    const auto argmax = release[n]["argmax"].get<std::vector<int32_t>>();
    const auto margin = release[n]["margin"].get<std::vector<double>>();
    const bool fim = greedy[n].contains("fim");
    for (size_t i = 0; i < continuation.size(); ++i) {
      const int64_t row = std::lower_bound(positions.begin(), positions.end(), num_prompt - 1 + static_cast<int>(i)) -
                          positions.begin();
      const std::vector<double> ours = LogProbabilities(Row(observed.logits, row, vocab));
      const auto best = static_cast<int32_t>(std::max_element(ours.begin(), ours.end()) - ours.begin());
      if (best != argmax[i] && margin[i] > kMargin) ++statistics.argmax_differences;
      if (fim) continue;
      difference += std::abs(ours[continuation[i]] - logprobs[i]);
      ++statistics.num_tokens;
    }
  }

  const auto median_of_layer = [&](int layer) {
    std::vector<double> values;
    for (const std::vector<double>& by_layer : streams) values.push_back(by_layer[layer]);
    return Median(values);
  };
  statistics.streams_after_layer0 = median_of_layer(0);
  statistics.streams_after_layer1 = median_of_layer(1);
  statistics.streams_after_last = median_of_layer(engine.config().num_hidden_layers - 1);
  statistics.equal_values_after_layer0 = Median(equal_values);
  statistics.equal_expert_rows = static_cast<double>(equal_experts) / statistics.num_expert_rows;
  statistics.logprob_difference = difference / statistics.num_tokens;
  statistics.num_stream_cases = static_cast<int>(streams.size());
  return statistics;
}

TEST(DemoModelRelease, StaysWithinEveryBoundOfTheReleaseGoldens) {
  const std::unique_ptr<Engine> engine = MakeEngine(kDemoModel, {.numerics = Numerics::kRelease});
  const ReleaseStatistics statistics = CompareWithReleaseGoldens(*engine, /*all_cases=*/true);
  absl::PrintF("%s\n", statistics.ToString());
  EXPECT_THAT(BrokenBounds(statistics), testing::IsEmpty());
  EXPECT_EQ(statistics.num_stream_cases, 6);
  EXPECT_EQ(statistics.num_selections, 8);
  EXPECT_EQ(statistics.num_expert_rows, 6 * 48);
  EXPECT_EQ(statistics.num_tokens, 632 - 55);
}

TEST(DemoModelRelease, ExactNumericsBreakTheBounds) {
  const std::unique_ptr<Engine> engine = MakeEngine(kDemoModel, {.numerics = Numerics::kExact});
  const ReleaseStatistics statistics = CompareWithReleaseGoldens(*engine, /*all_cases=*/false);
  absl::PrintF("%s\n", statistics.ToString());
  EXPECT_GT(statistics.streams_after_layer0, kStreamsAfterLayer0);
  EXPECT_GT(statistics.streams_after_layer1, kStreamsAfterLayer1);
}

struct RoundingPoint {
  const char* name;
  bool Rounding::*member;
};

class ForgottenRounding : public testing::TestWithParam<RoundingPoint> {};

TEST_P(ForgottenRounding, BreaksABound) {
  Rounding rounding = Rounding::All();
  ASSERT_TRUE(rounding.*GetParam().member);
  rounding.*GetParam().member = false;
  const std::unique_ptr<Engine> engine =
      MakeEngine(kDemoModel, {.numerics = Numerics::kRelease, .rounding = rounding, .rounding_override = true});
  const ReleaseStatistics statistics = CompareWithReleaseGoldens(*engine, /*all_cases=*/false);
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
