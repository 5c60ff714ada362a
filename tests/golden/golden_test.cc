// SPDX-License-Identifier: Apache-2.0
// The engine against what other people's code says of the same checkpoints, in `exact`.
//
// Two oracles: transformers in FP32 (tiny-a and the random configurations; bound 1e-3, 1e-5 expected) and an
// independent greedy decoder (the demo model). The demo model in `release`, which is held to statistics, is
// golden_release_test.cc. The data is described in tests/golden/README.md.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "tests/golden/random_checkpoint.h"
#include "tests/golden/teacher_forcing.h"

namespace millrace::golden {
namespace {

using nlohmann::json;

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
    const Observed observed = RunFresh(*engine, {.tokens = ids, .positions = positions, .observe_layers = true});

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

}  // namespace
}  // namespace millrace::golden
