// SPDX-License-Identifier: Apache-2.0
// What `config check` finds, on the demo and on Flash's shape: each mistake by its field, with a setting that fits.
#include "services/cli/config_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "engine/model/preset_config.h"
#include "services/cli/machine.h"
#include "services/common/config.h"

namespace millrace::cli {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kGiB = int64_t{1} << 30;

ModelReport Flash() { return MakeModelReport(*ModelConfig::Parse(PresetConfigJson(ModelPreset::kFlash)), nullptr); }
ModelReport Demo() { return *InspectModel("deploy/demo/model"); }

v1::ClusterConfig Config(const std::string& roles, const std::string& model = "") {
  auto config =
      ParseClusterConfig(absl::StrCat(R"({"model":{"path":"deploy/demo/model")", model, "},", roles, "}"), "");
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

MemoryBudget Host(int64_t bytes, bool one_machine = true) {
  return {.host = bytes, .one_machine = one_machine, .host_is = "given"};
}

// The text of the finding about this field, or nothing.
std::string About(const ConfigReport& report, Severity severity, const std::string& field) {
  for (const Finding& finding : report.findings) {
    if (finding.severity == severity && finding.field == field) return finding.text;
  }
  return "";
}

TEST(ConfigCheck, TheDemoFitsAndItsSizesAreThoseOfItsEngines) {
  const v1::ClusterConfig config = Config(R"("prefill":[{}],"decode":[{}],"expert":[{},{}])");
  const ConfigReport report = CheckConfig(config, Demo(), Host(24 * kGiB));
  EXPECT_EQ(report.errors(), 0);
  ASSERT_EQ(report.processes.size(), 5u);
  const ProcessNeed& decode = report.processes[2];
  EXPECT_EQ(decode.name, "decode-0");
  EXPECT_EQ(decode.pages, 1024 * 43008);
  EXPECT_EQ(decode.slots, 32 * 614144);  // as the worker's log says
  // 12.3 and 2.81 MiB are what the workers report as loaded (README's transcript).
  EXPECT_NEAR(static_cast<double>(decode.weights), 12.3 * (1 << 20), 0.05 * decode.weights);
  EXPECT_NEAR(static_cast<double>(report.processes[3].weights), 2.81 * (1 << 20), 0.01 * decode.weights);
  EXPECT_THAT(About(report, Severity::kNote, "decode[0].cache_pages"), HasSubstr("2 sequences of 65536 tokens"));
  EXPECT_THAT(About(report, Severity::kNote, "expert"), HasSubstr("16 of 16 experts have one holder"));
}

TEST(ConfigCheck, WhatDoesNotFitIsSaidWithWhatDoes) {
  const v1::ClusterConfig config = Config(R"("prefill":[{}],"decode":[{"cache_pages":100000}])");
  const ConfigReport report = CheckConfig(config, Demo(), Host(2 * kGiB));
  const std::string text = About(report, Severity::kError, "decode[0].cache_pages");
  ASSERT_THAT(text, HasSubstr("decode-0 needs 4."));
  // The setting it names fits, and one page more does not.
  const size_t at = text.find("cache_pages ") + 12;
  const int64_t fits = std::stoll(text.substr(at));
  const auto alone = [&](int64_t pages) {
    const v1::ClusterConfig other = Config(absl::StrCat(R"("prefill":[{}],"decode":[{"cache_pages":)", pages, "}]"));
    return About(CheckConfig(other, Demo(), Host(2 * kGiB, false)), Severity::kError, "decode[0].cache_pages");
  };
  EXPECT_EQ(alone(fits), "");
  EXPECT_NE(alone(fits + 1), "");
}

TEST(ConfigCheck, ProcessesOfOneMachineAreJudgedTogether) {
  const v1::ClusterConfig config = Config(R"("prefill":[{"cache_pages":20000}],"decode":[{"cache_pages":20000}])");
  const std::string text = About(CheckConfig(config, Demo(), Host(3 * kGiB / 2)), Severity::kError, "cache_pages");
  EXPECT_THAT(text, HasSubstr("all processes together need"));
  EXPECT_THAT(text, HasSubstr("% of each cache_pages fits"));
  EXPECT_EQ(CheckConfig(config, Demo(), Host(3 * kGiB / 2, false)).errors(), 0);
  EXPECT_TRUE(RunsOnOneMachine(config));
  EXPECT_FALSE(RunsOnOneMachine(
      Config(R"("prefill":[{"worker":{"listen":"0.0.0.0:9090"}}],"decode":[{}],"security":{"allow_insecure":true})")));
}

TEST(ConfigCheck, FlashOnOneCardIsTooMuchAndAPoolTakesItsExpertsElsewhere) {
  MemoryBudget memory = Host(2048 * kGiB, false);
  memory.gpu = 141'000'000'000;
  memory.gpu_is = "H200";
  const std::string device = R"(,"device":"cuda","max_context_tokens":131072)";
  const v1::ClusterConfig whole = Config(R"("prefill":[{"cache_pages":1024}],"decode":[{}])", device);
  const std::string text = About(CheckConfig(whole, Flash(), memory), Severity::kError, "decode[0].cache_pages");
  EXPECT_THAT(text, HasSubstr("an expert pool would take its routed experts elsewhere"));
  const v1::ClusterConfig pool = Config(R"("prefill":[{"cache_pages":1024}],"decode":[{}],"expert":[{},{}])", device);
  EXPECT_EQ(CheckConfig(pool, Flash(), memory).errors(), 0);
}

TEST(ConfigCheck, AContextThatNoCacheHoldsIsAnErrorIfItWasAskedFor) {
  const char* roles = R"("prefill":[{}],"decode":[{"cache_pages":100}])";
  EXPECT_THAT(About(CheckConfig(Config(roles), Demo(), Host(24 * kGiB)), Severity::kWarning, "decode[0].cache_pages"),
              HasSubstr("100 pages hold 12800 tokens, less than the 65536"));
  const ConfigReport asked = CheckConfig(Config(roles, R"(,"max_context_tokens":20000)"), Demo(), Host(24 * kGiB));
  EXPECT_THAT(About(asked, Severity::kError, "decode[0].cache_pages"),
              HasSubstr("use 157, or lower model.max_context_tokens to 12800"));
  EXPECT_EQ(CheckConfig(Config(roles, R"(,"max_context_tokens":12800)"), Demo(), Host(24 * kGiB)).errors(), 0);
}

TEST(ConfigCheck, EveryExpertNeedsAHolder) {
  const ConfigReport report =
      CheckConfig(Config(R"("prefill":[{}],"decode":[{}],"expert":[{"experts":"0-7"},{"experts":"9-15"}])"), Demo(),
                  Host(24 * kGiB));
  EXPECT_THAT(About(report, Severity::kError, "expert"), HasSubstr("no member has expert 8 of 16"));
  const ConfigReport twice =
      CheckConfig(Config(R"("prefill":[{}],"decode":[{}],"expert":[{"experts":"0-15"},{"experts":"0-15"}])"), Demo(),
                  Host(24 * kGiB));
  EXPECT_EQ(About(twice, Severity::kNote, "expert"), "");
  EXPECT_THAT(About(CheckConfig(Config(R"("prefill":[{}],"decode":[{}],"expert":[{"experts":"0-16"}])"), Demo(),
                                Host(24 * kGiB)),
                    Severity::kError, "expert[0].experts"),
              HasSubstr("ids from 0 to 15"));
}

TEST(ConfigCheck, SettingsThatContradictEachOtherAreNamed) {
  const ConfigReport report =
      CheckConfig(Config(R"("router":{"control_address":"router:8090"},"prefill":[],"decode":[{"max_sequences":4}])",
                         R"(,"device":"cuda","numerics":"exact")"),
                  Demo(), Host(24 * kGiB));
  EXPECT_THAT(About(report, Severity::kError, "prefill"), HasSubstr("nothing else computes prompts"));
  EXPECT_THAT(About(report, Severity::kError, "model.device"), HasSubstr("release numerics only"));
  EXPECT_THAT(About(report, Severity::kWarning, "decode[0].max_batch"), HasSubstr("use 4"));
  EXPECT_THAT(About(report, Severity::kWarning, "decode[0].worker.listen"), HasSubstr("set worker.advertise"));
}

TEST(ParseBytes, TakesUnitsAndRefusesTheRest) {
  EXPECT_EQ(ParseBytes("24GiB"), 24 * kGiB);
  EXPECT_EQ(ParseBytes("1.5 gib"), 3 * kGiB / 2);
  EXPECT_EQ(ParseBytes("80GB"), 80'000'000'000);
  EXPECT_EQ(ParseBytes("64Gi"), 64 * kGiB);
  EXPECT_EQ(ParseBytes("1000"), 1000);
  for (const char* wrong : {"", "GiB", "-1", "0", "1 bag", "nan", "1e300GiB"})
    EXPECT_EQ(ParseBytes(wrong), std::nullopt) << wrong;
}

}  // namespace
}  // namespace millrace::cli
