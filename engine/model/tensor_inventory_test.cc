// SPDX-License-Identifier: Apache-2.0
// The inventory, summed, must give the released models' published totals: the proof that no tensor is missing.
#include <gtest/gtest.h>

#include <map>

#include "engine/absl_view.h"
#include "engine/model/checkpoint.h"
#include "engine/model/preset_config.h"

namespace millrace {
namespace {

int64_t Bytes(const TensorSpec& spec) {
  int64_t bytes = DTypeSize(spec.dtype);
  for (const int64_t dim : spec.shape) bytes *= dim;
  return bytes;
}

struct Totals {
  int64_t tensors = 0;
  int64_t bytes = 0;
  std::map<std::string, int64_t> dtypes;
  std::map<int, int64_t> layer_bytes;
  std::map<int, int64_t> layer_tensors;
};

Totals Sum(ModelPreset preset) {
  const auto config = ModelConfig::Parse(PresetConfigJson(preset));
  EXPECT_TRUE(config.ok()) << config.status();
  Totals totals;
  for (const TensorSpec& spec : TensorInventory(*config)) {
    ++totals.tensors;
    totals.bytes += Bytes(spec);
    ++totals.dtypes[std::string(DTypeName(spec.dtype))];
    totals.layer_bytes[spec.layer] += Bytes(spec);
    ++totals.layer_tensors[spec.layer];
  }
  return totals;
}

TEST(TensorInventory, FlashHasTheReleasedCountsAndBytes) {
  const Totals t = Sum(ModelPreset::kFlash);
  EXPECT_EQ(t.tensors, 69187);
  EXPECT_EQ(t.bytes, 159609485896);
  EXPECT_EQ(t.dtypes,
            (std::map<std::string, int64_t>{
                {"F32", 417}, {"BF16", 433}, {"I64", 3}, {"F8_E4M3", 375}, {"F8_E8M0", 34167}, {"I8", 33792}}));
  EXPECT_EQ(t.layer_bytes.at(-1), 2118393876);
  EXPECT_EQ(t.layer_bytes.at(43), 3593787756);
  EXPECT_EQ(t.layer_tensors.at(43), 1575);
  for (int layer = 0; layer < 43; ++layer) {
    const int64_t expected = layer < 2        ? 3566148952
                             : layer == 2     ? 3596055640
                             : layer % 2 == 0 ? 3589851224
                                              : 3568596312;
    EXPECT_EQ(t.layer_bytes.at(layer), expected) << layer;
  }
}

TEST(TensorInventory, ProHasTheReleasedCountsAndBytes) {
  const Totals t = Sum(ModelPreset::kPro);
  EXPECT_EQ(t.tensors, 145116);
  EXPECT_EQ(t.bytes, 864704792696);
  EXPECT_EQ(t.dtypes,
            (std::map<std::string, int64_t>{
                {"F32", 590}, {"BF16", 619}, {"I64", 3}, {"F8_E4M3", 528}, {"F8_E8M0", 71952}, {"I8", 71424}}));
  EXPECT_EQ(t.layer_bytes.at(-1), 3707189268);
  EXPECT_EQ(t.layer_bytes.at(61), 13956587692);
  EXPECT_EQ(t.layer_tensors.at(61), 2343);
  for (int layer = 0; layer < 61; ++layer) {
    const int64_t expected = layer < 2        ? 13874466328
                             : layer == 2     ? 13909746200
                             : layer % 2 == 0 ? 13903542296
                                              : 13868262424;
    EXPECT_EQ(t.layer_bytes.at(layer), expected) << layer;
  }
}

TEST(TensorInventory, PlainHasNoScalesAndUnpackedExperts) {
  const auto config = ModelConfig::Parse(PresetConfigJson(ModelPreset::kTiny, {.plain = true}));
  ASSERT_TRUE(config.ok()) << config.status();
  bool expert_seen = false;
  for (const TensorSpec& spec : TensorInventory(*config)) {
    EXPECT_NE(spec.dtype, DType::kF8E8M0) << spec.name;
    if (spec.name != "layers.3.ffn.experts.7.w1.weight") continue;
    expert_seen = true;
    EXPECT_EQ(spec.shape, (std::vector<int64_t>{128, 256}));
    EXPECT_TRUE(spec.quantised);
    EXPECT_EQ(spec.layer, 3);
    EXPECT_EQ(spec.expert, 7);
  }
  EXPECT_TRUE(expert_seen);
}

TEST(TensorInventory, DsparkConfigListsNoClassicMtp) {
  std::string text = PresetConfigJson(ModelPreset::kTiny);
  text.insert(1, "\"dspark_block_size\": 5,");
  const auto config = ModelConfig::Parse(text);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->dspark);
  for (const TensorSpec& spec : TensorInventory(*config)) EXPECT_NE(spec.name.substr(0, 4), "mtp.");
}

}  // namespace
}  // namespace millrace
