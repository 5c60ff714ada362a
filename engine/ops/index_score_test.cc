// SPDX-License-Identifier: Apache-2.0
// Scores on FP4 codes against the plain F32 loop: equal bits, over random, extreme and tied values.
#include "engine/ops/index_score_cpu.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "engine/ops/rounding.h"
#include "engine/ops/vector_cpu.h"

namespace millrace {
namespace {

// The definition, in scalars.
void Simulate(const float* x, float* out) {
  float y[kIndexDim];
  std::copy_n(x, kIndexDim, y);
  for (int half = 1; half < kIndexDim; half *= 2) {
    for (int i = 0; i < kIndexDim; ++i) {
      if ((i & half) != 0) continue;
      const float a = y[i], b = y[i + half];
      y[i] = a + b;
      y[i + half] = a - b;
    }
  }
  const float norm = std::sqrt(static_cast<float>(kIndexDim));
  for (int g = 0; g < kIndexDim; g += 32) {
    float amax = 0;
    for (int i = g; i < g + 32; ++i) amax = std::max(amax, std::abs(y[i] = RoundBf16(y[i] / norm)));
    const int exponent = Fp4Scale(amax);
    for (int i = g; i < g + 32; ++i) out[i] = SimulateE2m1(y[i], exponent);
  }
}

void Widen(const IndexRow& row, float* out) {
  for (int i = 0; i < kIndexDim; ++i) out[i] = 0.5f * static_cast<float>(row.twice[i]) * row.scales[i / 32];
}

std::vector<float> Row(std::mt19937& draw, float magnitude) {
  std::normal_distribution<float> normal(0, magnitude);
  std::vector<float> x(kIndexDim);
  for (float& v : x) v = RoundBf16(normal(draw));
  return x;
}

TEST(IndexScore, QuantisesAsTheScalarDefinition) {
  std::mt19937 draw(1);
  for (float magnitude : {0.0f, 1e-30f, 1e-3f, 1.0f, 300.0f, 1e20f}) {
    for (int repeat = 0; repeat < 200; ++repeat) {
      const std::vector<float> x = Row(draw, magnitude);
      IndexRow row;
      QuantiseIndex(x.data(), row);
      float got[kIndexDim], want[kIndexDim];
      Widen(row, got);
      Simulate(x.data(), want);
      for (int i = 0; i < kIndexDim; ++i) ASSERT_EQ(got[i], want[i]) << "magnitude " << magnitude << " dim " << i;
      for (int g = 0; g < kIndexGroups; ++g) {
        int sum = 0;
        for (int i = 0; i < 32; ++i) sum += row.twice[g * 32 + i];
        ASSERT_EQ(row.sums[g], sum);
      }
    }
  }
}

// Every E2M1 code on both sides, so that the largest sums of integers are among them.
TEST(IndexScore, EqualsTheFloatLoopBitForBit) {
  std::mt19937 draw(2);
  for (const int heads : {1, 4, 16, 20, 64}) {
    for (int repeat = 0; repeat < 50; ++repeat) {
      std::vector<IndexRow> query(heads);
      std::vector<float> q(heads * kIndexDim), weights(heads);
      for (int h = 0; h < heads; ++h) {
        if (repeat == 0) {  // all at the largest magnitude
          for (int i = 0; i < kIndexDim; ++i) query[h].twice[i] = 12;
          for (int g = 0; g < kIndexGroups; ++g) query[h].scales[g] = 1, query[h].sums[g] = 32 * 12;
        } else {
          QuantiseIndex(Row(draw, 1.0f).data(), query[h]);
        }
        Widen(query[h], q.data() + h * kIndexDim);
        weights[h] = RoundBf16(static_cast<float>(draw() % 2001) / 1000.0f - 1.0f);
      }
      constexpr int kTiles = 3, kKeys = kTiles * kIndexTile;
      std::vector<IndexKeyTile> tiles(kTiles);
      std::vector<float> keys(kKeys * kIndexDim);
      for (int key = 0; key < kKeys; ++key) {
        uint8_t body[kIndexDim / 2], scales[kIndexGroups];
        for (uint8_t& pair : body) pair = repeat == 0 ? 0x77 : static_cast<uint8_t>(draw());
        for (uint8_t& scale : scales) scale = static_cast<uint8_t>(120 + draw() % 12);
        LoadIndexTileKey(body, scales, key % kIndexTile, tiles[key / kIndexTile]);
        for (int i = 0; i < kIndexDim; ++i) {
          keys[key * kIndexDim + i] = DecodeE2m1(body[i / 2] >> (4 * (i % 2))) * DecodeE8m0(scales[i / 32]);
        }
      }
      float scores[kKeys];
      ScoreIndexTiles(query.data(), weights.data(), heads, tiles.data(), kTiles, scores);
      for (int key = 0; key < kKeys; ++key) {
        const float want = RoundBf16(vec::IndexScore(q.data(), weights.data(), heads, keys.data() + key * kIndexDim));
        ASSERT_EQ(std::bit_cast<uint32_t>(scores[key]), std::bit_cast<uint32_t>(want))
            << heads << " heads, key " << key << ": " << scores[key] << " for " << want;
      }
    }
  }
}

}  // namespace
}  // namespace millrace
