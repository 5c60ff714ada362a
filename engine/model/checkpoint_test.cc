// SPDX-License-Identifier: Apache-2.0
// Opening real checkpoints, and writing what can be read again. Malformed ones are in checkpoint_malformed_test.cc.
#include "engine/model/checkpoint.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>

namespace millrace {
namespace {

TEST(Checkpoint, OpensTheDemo) {
  const auto checkpoint = Checkpoint::Open("deploy/demo/model");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const ModelConfig& config = (*checkpoint)->config();
  EXPECT_EQ(config.weight_format, WeightFormat::kFp8);
  EXPECT_FALSE(config.yarn.has_value());
  EXPECT_EQ((*checkpoint)->Get("layers.0.attn.wo_a.scale").shape, (std::vector<int64_t>{1, 8}));
  EXPECT_EQ((*checkpoint)->Get("mtp.0.ffn.experts.15.w2.weight").dtype, DType::kI8);
  EXPECT_FALSE((*checkpoint)->Has("layers.0.ffn.gate.bias"));
  EXPECT_EQ((*checkpoint)->ContentHash().size(), 32u);
}

TEST(Checkpoint, OpensAPlainOne) {
  const auto checkpoint = Checkpoint::Open("tests/data/tiny-a");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->config().weight_format, WeightFormat::kPlain);
  ASSERT_TRUE((*checkpoint)->config().yarn.has_value());
  EXPECT_EQ((*checkpoint)->config().yarn->factor, 16);
  EXPECT_EQ((*checkpoint)->Get("layers.1.ffn.experts.0.w1.weight").shape, (std::vector<int64_t>{64, 128}));
}

}  // namespace
}  // namespace millrace
