// SPDX-License-Identifier: Apache-2.0
// Attention's products on AMX tiles: stored entries widen to what they are worth, sums are near those in double
// precision, and a head or a key has the same bits whatever else there is and wherever the keys lie. Skipped, and said
// so, on processors without AMX.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "engine/ops/attention_amx.h"
#include "engine/ops/rounding.h"
#include "engine/ops/vector_cpu.h"

namespace millrace {
namespace {

constexpr int64_t kDim = 512, kPlain = 448, kRope = 64;

class AttentionTiles : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!AmxAvailable()) GTEST_SKIP() << "this processor has no AMX";
  }
};

float Value(const TileKey& key, int64_t i) { return DecodeBf16(key.at[i / 32 * key.step + i % 32]); }

TEST_F(AttentionTiles, AnEntryWidensToTheValuesOfItsF32Form) {
  std::mt19937 draw(1);
  TileKeys keys;
  keys.Reserve(3, kDim);
  for (const int scale : {27, 28, 100, 127, 140, 227, 228, 254}) {
    for (int first = 0; first < 256; first += 16) {
      std::vector<uint8_t> body(kPlain + 2 * kRope), scales(8, static_cast<uint8_t>(scale));
      for (int64_t i = 0; i < kPlain; ++i) {
        // Groups of all codes and groups without zeros and subnormals take different ways; E4M3's NaN is not stored.
        body[i] = static_cast<uint8_t>(first + static_cast<int>(draw() % 16));
        if ((body[i] & 0x7f) == 0x7f) body[i] = 0x20;
      }
      for (int64_t i = kPlain; i < kPlain + 2 * kRope; i += 2) {
        const uint16_t bits = EncodeBf16(static_cast<float>(i));
        body[i] = static_cast<uint8_t>(bits), body[i + 1] = static_cast<uint8_t>(bits >> 8);
      }
      std::vector<float> want(kDim);
      vec::LoadKvEntry(body.data(), scales.data(), kPlain, kRope, want.data());
      LoadKvEntryBf16(body.data(), scales.data(), kPlain, kRope, keys.at(1), keys.step());
      for (int64_t i = 0; i < kDim; ++i) ASSERT_EQ(Value(keys[1], i), want[i]) << "scale " << scale << " dim " << i;
    }
  }
}

TEST_F(AttentionTiles, SumsAreNearAndTheSameInAnyCompany) {
  std::mt19937 draw(2);
  std::normal_distribution<float> normal;
  constexpr int kKeys = 150, kHeads = 20;
  TileKeys together, apart;
  together.Reserve(kKeys, kDim);
  apart.Reserve(3 * kKeys, kDim);
  std::vector<TileKey> neighbours, scattered;
  for (int j = 0; j < kKeys; ++j) {
    for (int64_t i = 0; i < kDim; ++i) {
      const uint16_t bits = EncodeBf16(normal(draw));
      together.at(j)[i / 32 * together.step() + i % 32] = bits;
      apart.at(j * 7 % kKeys * 3)[i / 32 * apart.step() + i % 32] = bits;
    }
    neighbours.push_back(together[j]);
    scattered.push_back(apart[j * 7 % kKeys * 3]);
  }
  std::vector<float> q(kHeads * kDim), p(kHeads * kKeys);
  for (std::vector<float>* values : {&q, &p}) {
    for (float& v : *values) v = RoundBf16(normal(draw));
  }
  QueryTiles tiles;
  tiles.Pack(q.data(), kHeads, kDim);
  std::vector<float> logits(kHeads * kKeys), out(kHeads * kDim);
  tiles.DotKeys(neighbours.data(), kKeys, 0.5f, logits.data(), kKeys);
  tiles.SumValues(p.data(), kKeys, neighbours.data(), kKeys, out.data());
  for (int h = 0; h < kHeads; ++h) {
    for (int j = 0; j < kKeys; ++j) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < kDim; ++i) {
        const double product = 0.5 * q[h * kDim + i] * Value(neighbours[j], i);
        sum += product;
        size += std::abs(product);
      }
      ASSERT_NEAR(logits[h * kKeys + j], sum, size * 64 * 0x1p-24) << "head " << h << " key " << j;
    }
    for (int64_t i = 0; i < kDim; ++i) {
      double sum = 0, size = 0;
      for (int j = 0; j < kKeys; ++j) {
        const double product = static_cast<double>(p[h * kKeys + j]) * Value(neighbours[j], i);
        sum += product;
        size += std::abs(product);
      }
      ASSERT_NEAR(out[h * kDim + i], sum, size * 64 * 0x1p-24) << "head " << h << " dim " << i;
    }
  }

  const auto same = [](float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); };
  for (const int heads : {1, 4, 16, kHeads}) {
    tiles.Pack(q.data(), heads, kDim);
    for (const int num_keys : {1, 15, 16, 33, 64, 149}) {
      SCOPED_TRACE(::testing::Message() << heads << " heads, " << num_keys << " keys");
      std::vector<float> some(heads * kKeys), elsewhere(heads * kDim), sums(heads * kDim);
      tiles.DotKeys(scattered.data(), num_keys, 0.5f, some.data(), kKeys);
      for (int h = 0; h < heads; ++h) {
        for (int j = 0; j < num_keys; ++j)
          ASSERT_TRUE(same(some[h * kKeys + j], logits[h * kKeys + j])) << h << ' ' << j;
      }
      tiles.SumValues(p.data(), kKeys, scattered.data(), num_keys, elsewhere.data());
      tiles.SumValues(p.data(), kKeys, neighbours.data(), num_keys, sums.data());
      for (int64_t i = 0; i < heads * kDim; ++i) ASSERT_TRUE(same(elsewhere[i], sums[i])) << i;
    }
    std::vector<float> sums(heads * kDim);
    tiles.SumValues(p.data(), kKeys, scattered.data(), kKeys, sums.data());
    for (int64_t i = 0; i < heads * kDim; ++i) ASSERT_TRUE(same(sums[i], out[i])) << i;
  }
}

}  // namespace
}  // namespace millrace
