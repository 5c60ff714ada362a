// SPDX-License-Identifier: Apache-2.0
// What tensor_linear_plan.h promises, over every shape of both models and odd ones: it fits, and it covers K.
#include "engine/ops/tensor_linear_plan.h"

#include <gtest/gtest.h>

namespace millrace::cuda {
namespace {

struct Shape {
  int64_t n, k;
  int groups = 1;
  int value_bytes = 1;
};

// FP8 linears of Flash and Pro, BF16 ones, grouped wo_a, the LM head, the demo's, odd ones.
constexpr Shape kShapes[] = {
    {1024, 4096},      {512, 4096},          {32768, 1024},       {8192, 1024},      {4096, 8192},
    {2048, 4096},      {4096, 2048},         {1536, 7168},        {65536, 1536},     {7168, 16384},
    {3072, 7168},      {7168, 3072},         {512, 256},          {64, 128},         {200, 272},
    {72, 16},          {1024, 4096, 1, 2},   {64, 4096, 1, 2},    {256, 4096, 1, 2}, {1024, 4096, 8, 2},
    {384, 7168, 1, 2}, {129280, 4096, 1, 2}, {1024, 4096, 16, 2}, {16, 256, 1, 2}};

TEST(LinearPlan, FitsAMultiprocessorAndCoversKForAnyNumberOfRows) {
  for (const Shape& s : kShapes) {
    for (int64_t rows = 1; rows <= 8192; rows = rows < 300 ? rows + 1 : rows * 2) {
      SCOPED_TRACE(testing::Message() << rows << " rows, n " << s.n << " k " << s.k);
      const LinearPlan p = PlanLinear(rows, s.n, s.k, s.value_bytes, s.groups, 132);
      EXPECT_GE(int64_t{p.blocks} * kBlockK, s.k);
      EXPECT_LE(p.smem_bytes, kCtaSmemBytes);
      EXPECT_GE(p.stages, 2);
      if (!p.skinny) continue;
      EXPECT_GE(p.per_cta * p.cluster, p.blocks);
      EXPECT_LE(p.per_cta, p.blocks);
      EXPECT_TRUE(rows > 64 || p.tokens >= rows);
      EXPECT_EQ(kSkinnyOutputs * p.tokens % p.cluster, 0);
    }
  }
}

TEST(LinearPlan, FewRowsSpreadAWeightOverTheCard) {
  for (const Shape& s : kShapes) {
    const LinearPlan p = PlanLinear(1, s.n, s.k, s.value_bytes, s.groups, 132);
    ASSERT_TRUE(p.skinny);
    // At least half the card, or as far as a cluster of eight with two blocks each goes.
    const int64_t ctas = (s.n + kSkinnyOutputs - 1) / kSkinnyOutputs * s.groups * p.cluster;
    EXPECT_TRUE(ctas >= 64 || p.cluster == kMaxCluster || p.per_cta < 4) << "n " << s.n << " k " << s.k;
  }
}

}  // namespace
}  // namespace millrace::cuda
