// SPDX-License-Identifier: Apache-2.0
// The product of packed linears: near a sum in double precision for every kind of weight and shape, and the same bits
// for a row whatever shares the call. Where the processor has AMX both ways of computing it are tested.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "engine/ops/matmul_amx.h"
#include "engine/ops/packed_linear.h"
#include "engine/ops/rounding.h"

namespace millrace {
namespace {

struct Problem {
  PackedLinear weight;
  std::vector<double> dense;  // [n, k]
};

Problem Make(WeightKind kind, int64_t n, int64_t k, std::mt19937& draw) {
  Problem p;
  p.dense.resize(n * k);
  std::normal_distribution<float> normal;
  const auto fill = [&](auto value) {
    for (int64_t i = 0; i < n * k; ++i) p.dense[i] = value(i);
  };
  switch (kind) {
    case WeightKind::kF32: {
      std::vector<float> rows(n * k);
      for (float& w : rows) w = normal(draw);
      fill([&](int64_t i) { return rows[i]; });
      p.weight = PackedLinear::FromF32(rows.data(), n, k);
      break;
    }
    case WeightKind::kBf16: {
      std::vector<uint16_t> rows(n * k);
      for (uint16_t& w : rows) w = EncodeBf16(draw() % 50 == 0 ? 0x1p-129f : normal(draw));  // some subnormal
      fill([&](int64_t i) { return DecodeBf16(rows[i]); });
      p.weight = PackedLinear::FromBf16(rows.data(), n, k);
      break;
    }
    case WeightKind::kFp8: {
      const int64_t blocks = (k + 127) / 128;
      std::vector<uint8_t> codes(n * k), scales((n + 127) / 128 * blocks);
      for (int64_t i = 0; i < n * k; ++i) {
        // Every code but NaN; subnormals and zeros in every other 32 inputs only, which is a case of its own.
        do codes[i] = static_cast<uint8_t>(draw());
        while ((codes[i] & 0x7f) == 0x7f || (i % k / 32 % 2 == 0 && (codes[i] & 0x78) == 0));
      }
      for (uint8_t& s : scales) s = static_cast<uint8_t>(117 + draw() % 4);
      fill([&](int64_t i) { return DecodeE4m3(codes[i]) * DecodeE8m0(scales[i / k / 128 * blocks + i % k / 128]); });
      p.weight = PackedLinear::FromFp8(codes.data(), scales.data(), n, k);
      break;
    }
    case WeightKind::kFp4: {
      std::vector<uint8_t> pairs(n * k / 2), scales(n * k / 32);
      for (uint8_t& pair : pairs) pair = static_cast<uint8_t>(draw());
      for (size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<uint8_t>(124 + draw() % (i % 2 == 0 ? 4 : 5));
      fill([&](int64_t i) { return DecodeE2m1(pairs[i / 2] >> (4 * (i % 2))) * DecodeE8m0(scales[i / 32]); });
      p.weight = PackedLinear::FromFp4(pairs.data(), scales.data(), n, k);
      break;
    }
  }
  return p;
}

class MatMulOf : public ::testing::TestWithParam<std::tuple<WeightKind, bool>> {
 protected:
  void SetUp() override {
    if (bf16() && !AmxAvailable()) GTEST_SKIP() << "this processor has no AMX";
  }
  static WeightKind kind() { return std::get<0>(GetParam()); }
  static bool bf16() { return std::get<1>(GetParam()); }

  // Quantised weights meet quantised inputs, the others plain ones.
  static std::vector<float> Run(const PackedLinear& w, const std::vector<float>& x, const std::vector<float>& scales,
                                int64_t row, int64_t m, ThreadPool& pool) {
    const int64_t groups = (w.k() + 127) / 128;
    std::vector<float> out(m * w.n(), NAN);
    MatMul(w, {x.data() + row * w.k(), w.k(), w.quantised() ? scales.data() + row * groups : nullptr, groups, bf16()},
           m, out.data(), w.n(), pool);
    return out;
  }
};

TEST_P(MatMulOf, IsNearTheSumAndTheSameForARowInAnyCompany) {
  ThreadPool pool(1), two(2);
  std::mt19937 draw(3);
  std::normal_distribution<float> normal;
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{1, 32}, {16, 64}, {24, 256}, {64, 128}, {65, 160}, {200, 512}}) {
    SCOPED_TRACE(::testing::Message() << n << " outputs, " << k << " inputs");
    const Problem p = Make(kind(), n, k, draw);
    constexpr int64_t kRows = 101;  // more than a strip
    const int64_t groups = (k + 127) / 128;
    std::vector<float> x(kRows * k), scales(kRows * groups, 1.0f);
    for (float& v : x) v = draw() % 50 == 0 ? 0x1p-130f : RoundBf16(normal(draw));
    if (p.weight.quantised()) {
      for (int64_t r = 0; r < kRows; ++r) {
        QuantiseActivations(x.data() + r * k, k, 128, x.data() + r * k, scales.data() + r * groups);
      }
    }
    const std::vector<float> all = Run(p.weight, x, scales, 0, kRows, pool);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < k; ++i) {
          const double product = p.dense[j * k + i] * x[r * k + i] * scales[r * groups + i / 128];
          sum += product;
          size += std::abs(product);
        }
        // Sums of at most 128 products in FP32: no error beyond 128 half-units of what was summed.
        ASSERT_NEAR(all[r * n + j], sum, size * 128 * 0x1p-24) << "row " << r << " output " << j;
      }
    }
    for (const int64_t m : {1, 2, 3, 5, 6, 7, 11, 12, 13, 15, 16, 17, 31, 33, 96, 97}) {
      for (const int64_t row : {int64_t{0}, int64_t{4}, kRows - m}) {
        if (row + m > kRows) continue;
        const std::vector<float> some = Run(p.weight, x, scales, row, m, m % 2 == 0 ? pool : two);
        for (int64_t i = 0; i < m * n; ++i) {
          ASSERT_EQ(std::bit_cast<uint32_t>(some[i]), std::bit_cast<uint32_t>(all[row * n + i]))
              << m << " rows from " << row << ", row " << i / n << " output " << i % n;
        }
      }
    }
  }
}

std::string NameOf(const ::testing::TestParamInfo<std::tuple<WeightKind, bool>>& test) {
  const std::vector<std::string> kinds = {"F32", "Bf16", "Fp8", "Fp4"};
  return kinds[static_cast<int>(std::get<0>(test.param))] + (std::get<1>(test.param) ? "OnAmx" : "");
}

INSTANTIATE_TEST_SUITE_P(Kinds, MatMulOf,
                         ::testing::Combine(::testing::Values(WeightKind::kF32, WeightKind::kBf16, WeightKind::kFp8,
                                                              WeightKind::kFp4),
                                            ::testing::Bool()),
                         NameOf);

TEST(NarrowRows, KeepsBf16ValuesAndNans) {
  if (!AmxAvailable()) GTEST_SKIP() << "this processor has no AMX";
  std::vector<float> x = {1.0f, -0.0f, std::bit_cast<float>(0x7f800001u), INFINITY, 0x1p-130f, 0x1p-126f};
  for (int i = 6; i < 40; ++i) x.push_back(static_cast<float>(i));  // a whole vector and a part of one
  std::vector<uint16_t> out(x.size());
  NarrowRows({x.data(), 40}, 1, 40, out.data());
  EXPECT_EQ(out[0], 0x3f80);
  EXPECT_EQ(DecodeBf16(out[1]), 0.0f);
  EXPECT_TRUE(std::isnan(DecodeBf16(out[2])));
  EXPECT_EQ(out[3], 0x7f80);
  EXPECT_EQ(DecodeBf16(out[4]), 0x1p-130f);
  EXPECT_EQ(DecodeBf16(out[5]), 0x1p-126f);
  for (int i = 6; i < 40; ++i) EXPECT_EQ(DecodeBf16(out[i]), static_cast<float>(i));
  const std::vector<float> lossy = {1.0000001f};
  EXPECT_DEATH(NarrowRows({lossy.data(), 1}, 1, 1, out.data()), "BF16 values");
}

}  // namespace
}  // namespace millrace
