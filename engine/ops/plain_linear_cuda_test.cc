// SPDX-License-Identifier: Apache-2.0
// Matrix products and activation quantisation on the device against their CPU twins. The order of summation is the
// same, so the bound is none: bits.
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/device/thread_pool.h"
#include "engine/ops/cuda_linear.h"
#include "engine/ops/cuda_moe.h"
#include "engine/ops/cuda_test_util.h"
#include "engine/ops/packed_linear.h"

namespace millrace::cuda {
namespace {

std::vector<uint8_t> RandomBytes(int64_t count, uint32_t seed, int low, int high) {
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(count);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(low + random() % (high - low + 1));
  return bytes;
}
// E4M3 codes without NaN.
std::vector<uint8_t> RandomE4m3(int64_t count, uint32_t seed) {
  std::vector<uint8_t> codes = RandomBytes(count, seed, 0, 255);
  for (uint8_t& c : codes) {
    if ((c & 0x7f) == 0x7f) c = 0x3c;
  }
  return codes;
}

class CudaLinear : public CudaTest {
 protected:
  ThreadPool pool_{2};
};

TEST_F(CudaLinear, QuantisesToTheCpusCodesAndScales) {
  for (const int64_t k : {32, 128, 160, 256, 4096}) {
    for (const float scale : {1.0f, 1e-6f, 1e4f}) {
      constexpr int64_t kRows = 37;
      std::vector<float> x = RandomBf16(kRows * k, 1, scale);
      x[0] = 448 * scale;  // a group whose largest is at a power-of-two boundary
      x[0] = RoundBf16(x[0]);
      const int64_t groups = (k + 127) / 128;
      DeviceArray<Bf16> device_x(ToDeviceBf16(x));
      DeviceArray<uint8_t> codes(kRows * k);
      DeviceArray<float> scales(kRows * groups);
      QuantiseRows({device_x.data(), k}, kRows, k, codes.data(), scales.data(), stream());
      std::vector<float> expected(kRows * k), expected_scales(kRows * groups);
      for (int64_t r = 0; r < kRows; ++r) {
        QuantiseActivations(x.data() + r * k, k, 128, expected.data() + r * k, expected_scales.data() + r * groups);
      }
      const std::vector<uint8_t> found = codes.Fetch();
      std::vector<float> values(found.size());
      std::transform(found.begin(), found.end(), values.begin(), DecodeE4m3);
      ASSERT_EQ(FirstDifference(scales.Fetch(), expected_scales), -1) << k;
      ASSERT_EQ(FirstDifference(values, expected), -1) << k;
    }
  }
}

constexpr int64_t kRowCounts[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33, 64, 65, 130};

TEST_F(CudaLinear, Fp8GivesTheBitsOfTheCpuForAnyNumberOfRows) {
  struct Shape {
    int64_t n, k;
  };
  for (const Shape s : {Shape{512, 256}, {64, 128}, {128, 32}, {200, 160}, {256, 4096}, {1024, 1024}, {96, 8192}}) {
    SCOPED_TRACE(absl::StrCat(s.n, "x", s.k));
    const int64_t blocks = (s.k + 127) / 128;
    const std::vector<uint8_t> codes = RandomE4m3(s.n * s.k, 3);
    const std::vector<uint8_t> scales = RandomBytes((s.n + 127) / 128 * blocks, 4, 118, 126);
    const PackedLinear packed = PackedLinear::FromFp8(codes.data(), scales.data(), s.n, s.k);
    DeviceArray<uint8_t> device_codes(codes), device_scales(scales);
    const Weight w{WeightKind::kFp8, s.n, s.k, device_codes.data(), device_scales.data()};
    constexpr int64_t kMost = 130;
    const std::vector<float> x = RandomBf16(kMost * s.k, 5);
    std::vector<float> x_codes(x.size()), x_scales(kMost * blocks), expected(kMost * s.n);
    for (int64_t r = 0; r < kMost; ++r) {
      QuantiseActivations(x.data() + r * s.k, s.k, 128, x_codes.data() + r * s.k, x_scales.data() + r * blocks);
    }
    MatMul(packed, {x_codes.data(), s.k, x_scales.data(), blocks}, kMost, expected.data(), s.n, pool_);
    DeviceArray<Bf16> device_x(ToDeviceBf16(x));
    DeviceArray<uint8_t> quantised(kMost * s.k);
    DeviceArray<float> quantised_scales(kMost * blocks);
    QuantiseRows({device_x.data(), s.k}, kMost, s.k, quantised.data(), quantised_scales.data(), stream());
    for (const int64_t rows : kRowCounts) {
      DeviceArray<float> out(rows * s.n);
      LinearFp8(w, {quantised.data(), s.k, quantised_scales.data(), blocks}, rows, {out.data(), s.n}, stream());
      const std::vector<float> wanted(expected.begin(), expected.begin() + rows * s.n);
      ASSERT_EQ(FirstDifference(out.Fetch(), wanted), -1) << rows << " rows";
    }
  }
}

TEST_F(CudaLinear, Bf16AndF32GiveTheBitsOfTheCpuForAnyNumberOfRows) {
  struct Shape {
    int64_t n, k;
  };
  for (const Shape s : {Shape{24, 1024}, {24, 16384}, {4, 1024}, {16, 256}, {1536, 256}, {64, 4096}, {512, 96}}) {
    for (const WeightKind kind : {WeightKind::kBf16, WeightKind::kF32}) {
      SCOPED_TRACE(absl::StrCat(s.n, "x", s.k, kind == WeightKind::kF32 ? " F32" : " BF16"));
      const std::vector<float> values = kind == WeightKind::kF32 ? RandomF32(s.n * s.k, 6) : RandomBf16(s.n * s.k, 6);
      std::vector<uint16_t> bits(values.size());
      std::transform(values.begin(), values.end(), bits.begin(), EncodeBf16);
      const PackedLinear packed = kind == WeightKind::kF32 ? PackedLinear::FromF32(values.data(), s.n, s.k)
                                                           : PackedLinear::FromBf16(bits.data(), s.n, s.k);
      DeviceArray<float> device_f32(values);
      DeviceArray<uint16_t> device_bf16(bits);
      const Weight w{kind, s.n, s.k,
                     kind == WeightKind::kF32 ? static_cast<const void*>(device_f32.data()) : device_bf16.data()};
      constexpr int64_t kMost = 130;
      const std::vector<float> x = RandomBf16(kMost * s.k, 7);
      std::vector<float> expected(kMost * s.n);
      MatMul(packed, {x.data(), s.k, nullptr, 0}, kMost, expected.data(), s.n, pool_);
      DeviceArray<Bf16> device_x(ToDeviceBf16(x));
      for (const int64_t rows : kRowCounts) {
        DeviceArray<float> out(rows * s.n);
        LinearBf16(w, {device_x.data(), s.k}, rows, {out.data(), s.n}, stream());
        const std::vector<float> wanted(expected.begin(), expected.begin() + rows * s.n);
        ASSERT_EQ(FirstDifference(out.Fetch(), wanted), -1) << rows << " rows";
      }
    }
  }
}

TEST_F(CudaLinear, GroupsMultiplyTheirOwnColumns) {
  constexpr int64_t kN = 64, kK = 1024, kGroups = 3, kMost = 70;
  const std::vector<float> values = RandomBf16(kGroups * kN * kK, 8), x = RandomBf16(kMost * kGroups * kK, 9);
  DeviceArray<Bf16> weights(ToDeviceBf16(values)), device_x(ToDeviceBf16(x));
  for (const int64_t rows : {int64_t{1}, int64_t{5}, kMost}) {
    DeviceArray<Bf16> out(rows * kGroups * kN);
    LinearGrouped({WeightKind::kBf16, kN, kK, weights.data()}, kGroups, {device_x.data(), kGroups * kK}, rows,
                  {out.data(), kGroups * kN}, stream());
    const std::vector<float> found = FromDeviceBf16(out.Fetch());
    for (int64_t g = 0; g < kGroups; ++g) {
      std::vector<uint16_t> bits(kN * kK);
      std::transform(values.begin() + g * kN * kK, values.begin() + (g + 1) * kN * kK, bits.begin(), EncodeBf16);
      const PackedLinear packed = PackedLinear::FromBf16(bits.data(), kN, kK);
      std::vector<float> expected(rows * kN);
      MatMul(packed, {x.data() + g * kK, kGroups * kK, nullptr, 0}, rows, expected.data(), kN, pool_);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < kN; ++n) {
          ASSERT_EQ(found[(r * kGroups + g) * kN + n], RoundBf16(expected[r * kN + n])) << g << " " << r << " " << n;
        }
      }
    }
  }
}

// Experts: FP4 products, SwiGLU between them, rows in the order of the pairs. SwiGLU's exponential is another
// library's, so a value of the intermediate may round the other way: bits are not asked for, a tenth of a percent is.
TEST_F(CudaLinear, RoutedExpertsAgreeWithTheCpu) {
  constexpr int kExperts = 16, kTop = 3;
  constexpr int64_t kHidden = 256, kWidth = 128;
  struct Expert {
    PackedLinear w1, w2, w3;
  };
  const auto codes = [](int64_t n, int64_t k, uint32_t seed) { return RandomBytes(n * k / 2, seed, 0, 255); };
  const auto scales = [](int64_t n, int64_t k, uint32_t seed) { return RandomBytes(n * k / 32, seed, 119, 123); };
  std::vector<uint8_t> w1, w2, w3, s1, s2, s3;
  std::vector<Expert> experts(kExperts);
  const auto add = [](std::vector<uint8_t>& all, const std::vector<uint8_t>& one) {
    all.insert(all.end(), one.begin(), one.end());
  };
  for (int e = 0; e < kExperts; ++e) {
    const uint32_t seed = 100 + 10 * e;
    const auto c1 = codes(kWidth, kHidden, seed), c2 = codes(kHidden, kWidth, seed + 1),
               c3 = codes(kWidth, kHidden, seed + 2);
    const auto x1 = scales(kWidth, kHidden, seed + 3), x2 = scales(kHidden, kWidth, seed + 4),
               x3 = scales(kWidth, kHidden, seed + 5);
    experts[e].w1 = PackedLinear::FromFp4(c1.data(), x1.data(), kWidth, kHidden);
    experts[e].w2 = PackedLinear::FromFp4(c2.data(), x2.data(), kHidden, kWidth);
    experts[e].w3 = PackedLinear::FromFp4(c3.data(), x3.data(), kWidth, kHidden);
    add(w1, c1), add(w2, c2), add(w3, c3), add(s1, x1), add(s2, x2), add(s3, x3);
  }
  DeviceArray<uint8_t> d1(w1), d2(w2), d3(w3), ds1(s1), ds2(s2), ds3(s3);
  const ExpertWeights weights{kExperts,  kHidden,    kWidth,     d1.data(), d2.data(),
                              d3.data(), ds1.data(), ds2.data(), ds3.data()};

  std::vector<float> first;  // the first row's, which may not depend on how many there are
  for (const int64_t rows : {1, 2, 7, 40, 90, 400}) {
    SCOPED_TRACE(rows);
    const std::vector<float> x = RandomBf16(rows * kHidden, 11);
    std::mt19937 random(12);
    std::vector<int32_t> chosen;
    std::vector<float> routing;
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<int32_t> ids(kExperts);
      for (int e = 0; e < kExperts; ++e) ids[e] = e;
      std::shuffle(ids.begin(), ids.end(), random);
      std::sort(ids.begin(), ids.begin() + kTop);
      chosen.insert(chosen.end(), ids.begin(), ids.begin() + kTop);
      for (int j = 0; j < kTop; ++j) routing.push_back(0.25f + static_cast<float>(random() % 100) / 100);
    }
    DeviceArray<Bf16> device_x(ToDeviceBf16(x)), out(rows * kTop * kHidden);
    DeviceArray<uint8_t> quantised(rows * kHidden);
    DeviceArray<float> quantised_scales(rows * 2), device_routing(routing);
    DeviceArray<int32_t> device_chosen(chosen);
    DeviceArray<uint8_t> workspace(ExpertWorkspaceBytes(kExperts, kHidden, kWidth, kTop, rows));
    QuantiseRows({device_x.data(), kHidden}, rows, kHidden, quantised.data(), quantised_scales.data(), stream());
    RoutedExperts(weights, {quantised.data(), kHidden, quantised_scales.data(), 2}, device_chosen.data(),
                  device_routing.data(), rows, kTop, 10.0f, workspace.data(), out.data(), stream());
    const std::vector<float> found = FromDeviceBf16(out.Fetch());

    std::vector<float> expected(found.size());
    for (int64_t pair = 0; pair < rows * kTop; ++pair) {
      const Expert& e = experts[chosen[pair]];
      std::vector<float> code(kHidden), scale(2), gate(kWidth), up(kWidth), a(kWidth), a_code(kWidth), a_scale(1);
      QuantiseActivations(x.data() + pair / kTop * kHidden, kHidden, 128, code.data(), scale.data());
      MatMul(e.w1, {code.data(), kHidden, scale.data(), 2}, 1, gate.data(), kWidth, pool_);
      MatMul(e.w3, {code.data(), kHidden, scale.data(), 2}, 1, up.data(), kWidth, pool_);
      for (int64_t i = 0; i < kWidth; ++i) {
        const float g = std::min(RoundBf16(gate[i]), 10.0f), p = std::clamp(RoundBf16(up[i]), -10.0f, 10.0f);
        a[i] = RoundBf16(g / (1 + std::exp(-g)) * p * routing[pair]);
      }
      QuantiseActivations(a.data(), kWidth, 128, a_code.data(), a_scale.data());
      float* y = expected.data() + pair * kHidden;
      MatMul(e.w2, {a_code.data(), kWidth, a_scale.data(), 1}, 1, y, kHidden, pool_);
      for (int64_t i = 0; i < kHidden; ++i) y[i] = RoundBf16(y[i]);
    }
    EXPECT_LT(RelativeNorm(found, expected), 1e-3);
    const std::vector<float> row(found.begin(), found.begin() + kTop * kHidden);
    if (first.empty()) first = row;
    EXPECT_EQ(FirstDifference(row, first), -1) << "the first row's bits";
  }
}

}  // namespace
}  // namespace millrace::cuda
