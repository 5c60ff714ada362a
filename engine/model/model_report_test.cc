// SPDX-License-Identifier: Apache-2.0
// The report's numbers against the released models' published ones, and its two renderings.
#include "engine/model/model_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_split.h"
#include "engine/model/preset_config.h"

namespace millrace {
namespace {

using ::testing::HasSubstr;

ModelReport ReportOf(ModelPreset preset) {
  const auto config = ModelConfig::Parse(PresetConfigJson(preset));
  EXPECT_TRUE(config.ok()) << config.status();
  return MakeModelReport(*config, nullptr);
}

TEST(ModelReport, FlashEqualsThePublishedSizes) {
  const ModelReport r = ReportOf(ModelPreset::kFlash);
  EXPECT_EQ(r.tensors, 69187);
  EXPECT_EQ(r.tensor_bytes, 159609485896);
  EXPECT_EQ(r.parameters, 284332240471);
  EXPECT_EQ(r.mtp_parameters, 6610048891);
  EXPECT_NEAR(static_cast<double>(r.active_parameters), 13.27e9, 0.01e9);
  EXPECT_EQ(r.expert_bytes, 13369344LL * 256 * 44);
  const CacheBytes& release = r.caches.at(0);
  EXPECT_EQ(release.numerics, "release");
  EXPECT_EQ(release.entry, 584);
  EXPECT_EQ(release.index_key, 68);
  EXPECT_EQ(release.per_token, 3514.25);
  EXPECT_EQ(release.windows, 3214336);
  EXPECT_EQ(release.windows_with_mtp, 3289088);
  EXPECT_EQ(release.hca_state, 122880);
  EXPECT_EQ(release.last_streams, 4 * 4096 * 2);
  ASSERT_EQ(release.sequences.size(), 3u);
  EXPECT_EQ(release.sequences[0].entries, 28788736);
  EXPECT_EQ(release.sequences[1].entries + release.sequences[1].windows, 460619776 + 3289088);  // 463.9 MB
  EXPECT_EQ(release.sequences[2].entries, 3684958208);                                          // 3.685 GB
  const CacheBytes& exact = r.caches.at(1);
  EXPECT_EQ(exact.entry, 2048);
  EXPECT_EQ(exact.index_key, 512);
  EXPECT_EQ(exact.per_token, 21 * (2048 + 512) / 4.0 + 20 * 2048 / 128.0);
}

TEST(ModelReport, ProEqualsThePublishedSizes) {
  const ModelReport r = ReportOf(ModelPreset::kPro);
  EXPECT_EQ(r.tensors, 145116);
  EXPECT_EQ(r.tensor_bytes, 864704792696);
  EXPECT_EQ(r.parameters, 1572997201763);
  EXPECT_EQ(r.mtp_parameters, 25840145979);
  EXPECT_NEAR(static_cast<double>(r.active_parameters), 48.85e9, 0.01e9);
  const CacheBytes& release = r.caches.at(0);
  EXPECT_EQ(release.per_token, 5031.4375);
  EXPECT_EQ(release.windows, 4559872);
  EXPECT_EQ(release.windows_with_mtp, 4634624);
  EXPECT_EQ(release.hca_state, 190464);
  EXPECT_NEAR(static_cast<double>(release.sequences[1].entries + release.sequences[1].windows), 664.1e6, 0.1e6);
  EXPECT_NEAR(static_cast<double>(release.sequences[2].entries), 5.276e9, 0.001e9);
}

// The parts that are printed are the parts that are allocated: the slot holds them and little else.
TEST(ModelReport, StatePartsSumUpToTheSlot) {
  for (const ModelPreset preset : {ModelPreset::kFlash, ModelPreset::kPro, ModelPreset::kTiny}) {
    const ModelReport report = ReportOf(preset);
    for (const CacheBytes& c : report.caches) {
      const int64_t layers = report.config.num_hidden_layers + 1;
      const int64_t speculation = 8 * c.entry * layers;
      const int64_t sum = c.windows_with_mtp + speculation + c.csa_pending + c.hca_state + c.last_streams;
      EXPECT_GE(c.slot, sum);
      EXPECT_LT(c.slot, sum + 128 * 7 * layers) << "alignment of seven arrays a layer at most";
      EXPECT_LT(static_cast<double>(c.page), static_cast<double>(c.page_payload) * 1.01);
    }
  }
}

TEST(ModelReport, SaysWhatHardwareHoldsIt) {
  const ModelReport flash = ReportOf(ModelPreset::kFlash);
  ASSERT_EQ(flash.gpus.size(), 3u);
  EXPECT_EQ(flash.gpus[0].gpus, 3) << "H100: 9 GB everywhere and a third of 150 GB";
  EXPECT_EQ(flash.gpus[1].gpus, 2) << "H200";
  EXPECT_GT(flash.gpus[1].sequences_128k, 50);
  const ModelReport pro = ReportOf(ModelPreset::kPro);
  EXPECT_EQ(pro.gpus[1].gpus, 9) << "H200: 29 GB everywhere and a ninth of 836 GB";
}

TEST(ModelReport, InspectsADirectoryAConfigAloneAndAFile) {
  const auto demo = InspectModel("deploy/demo/model", {}, /*hash_contents=*/true);
  ASSERT_TRUE(demo.ok()) << demo.status();
  EXPECT_TRUE(demo->weights_present);
  EXPECT_EQ(demo->content_hash.size(), 32u);
  const auto file = InspectModel("deploy/demo/model/config.json");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_FALSE(file->weights_present);
  EXPECT_EQ(file->tensor_bytes, demo->tensor_bytes);

  std::string dir = ::testing::TempDir() + "millrace-inspect-XXXXXX";
  ASSERT_NE(mkdtemp(dir.data()), nullptr);
  std::ofstream(dir + "/config.json") << PresetConfigJson(ModelPreset::kPro);
  const auto alone = InspectModel(dir);
  ASSERT_TRUE(alone.ok()) << alone.status();
  EXPECT_EQ(alone->config.num_hidden_layers, 61);
  std::filesystem::remove_all(dir);
  EXPECT_FALSE(InspectModel(dir).ok());
}

TEST(ModelReport, UnquantisedWeightsAreForTheCpu) {
  const auto tiny = InspectModel("tests/data/tiny-a");
  ASSERT_TRUE(tiny.ok()) << tiny.status();
  EXPECT_TRUE(tiny->gpus.empty());
  ASSERT_EQ(tiny->caches.size(), 1u);
  EXPECT_EQ(tiny->caches[0].numerics, "exact");
}

TEST(ModelReport, TextIsAlignedAndFitsATerminal) {
  for (const ModelPreset preset : {ModelPreset::kFlash, ModelPreset::kPro, ModelPreset::kTiny}) {
    const std::string text = ModelReportText(ReportOf(preset));
    EXPECT_EQ(text.back(), '\n');
    for (const auto line : absl::StrSplit(text, '\n')) {
      EXPECT_LE(line.size(), 100u) << line;
      EXPECT_FALSE(!line.empty() && line.back() == ' ') << line;
    }
  }
  const std::string flash = ModelReportText(ReportOf(ModelPreset::kFlash));
  EXPECT_THAT(flash, HasSubstr("  per token           3514.25 B\n"));
  EXPECT_THAT(flash, HasSubstr("  CSA                  21   2, 4 ... 42\n"));
  EXPECT_THAT(flash, HasSubstr("  total                  69,187      159,609,485,896 B   159.61 GB\n"));
}

TEST(ModelReport, JsonCarriesTheNumbers) {
  const auto json = ModelReportJson(ReportOf(ModelPreset::kFlash));
  EXPECT_EQ(json["cache"]["release"]["bytes_per_token"], 3514.25);
  EXPECT_EQ(json["cache"]["release"]["sequences"][2]["tokens"], 1048576);
  EXPECT_EQ(json["tensors"]["bytes"], 159609485896);
  EXPECT_EQ(json["layers"].size(), 43u);
  EXPECT_EQ(json["layers"][2], (nlohmann::ordered_json{{"kind", "CSA"}, {"ratio", 4}, {"routing", "hash"}}));
  EXPECT_EQ(json["hardware"]["gpus"][1]["count"], 2);
}

}  // namespace
}  // namespace millrace
