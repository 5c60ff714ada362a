// SPDX-License-Identifier: Apache-2.0
// The tensor-core linears against sums in double precision, and every number of rows against every other, bit by bit.
//
// Needs a card; skipped without one. The bound of FP8 allows for what the tensor cores keep of a product: of a block of
// 128 they sum with about 13 bits below the largest term, measured at up to 8.5e-4 of the sum of magnitudes; BF16 sums
// keep FP32. What planning does is tested without a card in tensor_linear_plan_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "engine/ops/cuda_quantise.h"
#include "engine/ops/cuda_test_util.h"
#include "engine/ops/rounding.h"

namespace millrace::cuda {
namespace {

constexpr double kBound = 2e-6;  // of the sum of magnitudes

// Values with a wide spread of magnitudes and some outliers, as activations have.
std::vector<uint16_t> RandomBf16Bits(int64_t count, uint32_t seed) {
  std::vector<uint16_t> out(count);
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> pool(1 << 16);
  for (float& v : pool) v = normal(engine) * std::exp2(std::floor(normal(engine) * 1.5f));
  for (int64_t i = 0; i < count; ++i) out[i] = EncodeBf16(pool[engine() & 0xffff]);
  return out;
}

std::vector<uint8_t> RandomE4m3(int64_t count, uint32_t seed) {
  std::vector<uint8_t> out(count);
  std::mt19937 engine(seed);
  for (uint8_t& code : out) {
    code = static_cast<uint8_t>(engine() >> 13);
    if ((code & 0x7f) == 0x7f) code ^= 0x40;
  }
  return out;
}

std::vector<uint8_t> RandomScales(int64_t count, uint32_t seed) {
  std::vector<uint8_t> out(count);
  std::mt19937 engine(seed);
  for (uint8_t& s : out) s = static_cast<uint8_t>(112 + engine() % 6);
  return out;
}

struct Shape {
  int64_t n, k;
};

class CudaTensorLinear : public CudaTest {};

// One FP8 weight and quantised rows, on both sides.
struct Fp8Case {
  Fp8Case(Shape s, int64_t max_rows, uint32_t seed)
      : shape(s),
        groups((s.k + 127) / 128),
        weight_host(RandomE4m3(s.n * s.k, seed)),
        scales_host(RandomScales((s.n + 127) / 128 * groups, seed + 1)),
        x_host(RandomBf16Bits(max_rows * s.k, seed + 2)),
        weight_data(weight_host),
        weight_scales(scales_host),
        x(x_host),
        rounded(max_rows * s.k),
        scratch(s.n * s.k) {
    RoundRows({reinterpret_cast<const Bf16*>(x.data()), s.k}, max_rows, s.k, rounded.data(), nullptr);
    rounded_host = FromDeviceBf16(rounded.Fetch());
  }
  Weight weight() { return {WeightKind::kFp8, shape.n, shape.k, weight_data.data(), weight_scales.data()}; }
  // The exact product, and the sum of its terms' magnitudes.
  std::pair<double, double> Exact(int64_t row, int64_t n) const {
    double sum = 0, magnitude = 0;
    for (int64_t k = 0; k < shape.k; ++k) {
      const double term = static_cast<double>(rounded_host[row * shape.k + FragmentPlace(k)]) *
                          DecodeE4m3(weight_host[n * shape.k + k]) *
                          DecodeE8m0(scales_host[n / 128 * groups + k / 128]);
      sum += term;
      magnitude += std::abs(term);
    }
    return {sum, magnitude};
  }

  Shape shape;
  int64_t groups;
  std::vector<uint8_t> weight_host, scales_host;
  std::vector<uint16_t> x_host;
  std::vector<float> rounded_host;
  DeviceArray<uint8_t> weight_data, weight_scales;
  DeviceArray<uint16_t> x;
  DeviceArray<Bf16> rounded, scratch;
};

void RunProduct(Fp8Case& c, int64_t rows, LinearOut out) {
  LinearFp8(c.weight(), {c.rounded.data(), c.shape.k}, rows, out, c.scratch.data(), nullptr);
}

std::vector<float> RunFp8(Fp8Case& c, int64_t rows) {
  DeviceArray<float> out(rows * c.shape.n);
  RunProduct(c, rows, LinearOut(out.data(), c.shape.n));
  return out.Fetch();
}

// Rows that differ between two results, at most `rows` of them compared. NaN equals itself here.
int64_t DifferingRows(const std::vector<float>& a, const std::vector<float>& b, int64_t rows, int64_t n) {
  int64_t differing = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (std::memcmp(a.data() + r * n, b.data() + r * n, n * sizeof(float)) != 0) ++differing;
  }
  return differing;
}

void ExpectNearExact(const std::vector<float>& got, int64_t rows, int64_t n, double bound, double rounding,
                     const std::function<std::pair<double, double>(int64_t, int64_t)>& exact) {
  std::mt19937 engine(7);
  double worst = 0;
  for (int i = 0; i < 1500; ++i) {
    // Corners first: they are where tiles end.
    const int64_t row = i < 4 ? (i % 2) * (rows - 1) : engine() % rows;
    const int64_t output = i < 4 ? (i / 2) * (n - 1) : engine() % n;
    const auto [sum, magnitude] = exact(row, output);
    const double error = std::abs(got[row * n + output] - sum);
    ASSERT_LE(error, bound * magnitude + rounding * std::abs(sum)) << "row " << row << " output " << output;
    worst = std::max(worst, error / magnitude);
  }
  for (float y : got) ASSERT_TRUE(std::isfinite(y)) << "an output was not written";
  testing::Test::RecordProperty("worst_error_over_magnitudes", std::to_string(worst));
}

constexpr int64_t kLadder[] = {1,  2,  3,  4,  5,  6,  7,  8,   9,   10,  11,  12,  13,  14,  15,
                               16, 17, 31, 32, 33, 64, 65, 100, 127, 128, 129, 256, 257, 1024};

TEST_F(CudaTensorLinear, Fp8IsNearTheExactSumAndARowHasTheSameBitsAmongAnyNumberOfRows) {
  for (const Shape shape :
       {Shape{4096, 8192}, Shape{1024, 4096}, Shape{512, 4096}, Shape{8192, 1024}, Shape{2048, 4096}, Shape{512, 256},
        Shape{64, 128}, Shape{200, 272}, Shape{72, 16}, Shape{1536, 7168}}) {
    SCOPED_TRACE(testing::Message() << "n " << shape.n << " k " << shape.k);
    constexpr int64_t kRows = 4096;
    Fp8Case c(shape, kRows, static_cast<uint32_t>(shape.n + shape.k));
    const std::vector<float> all = RunFp8(c, kRows);
    ExpectNearExact(all, kRows, shape.n, kBound, 0, [&](int64_t r, int64_t n) { return c.Exact(r, n); });
    for (const int64_t rows : kLadder) {
      EXPECT_EQ(DifferingRows(RunFp8(c, rows), all, rows, shape.n), 0) << rows << " rows";
    }
    if (HasFailure()) return;
  }
}

TEST_F(CudaTensorLinear, Fp8RoundedOutputIsTheRoundingOfTheF32Output) {
  for (const int64_t rows : {1, 16, 40, 300}) {
    for (const int64_t n : {4096, 196}) {
      Fp8Case c({n, 512}, rows, 5);
      const std::vector<float> wide = RunFp8(c, rows);
      const int64_t ld = n + 8;
      DeviceArray<uint16_t> out(rows * ld);
      RunProduct(c, rows, LinearOut(reinterpret_cast<Bf16*>(out.data()), ld));
      const std::vector<uint16_t> narrow = out.Fetch();
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < n; ++i) ASSERT_EQ(narrow[r * ld + i], EncodeBf16(wide[r * n + i])) << r << " " << i;
        for (int64_t i = n; i < ld; ++i) ASSERT_EQ(narrow[r * ld + i], 0xffff) << "written beyond the row";
      }
    }
  }
}

TEST_F(CudaTensorLinear, Bf16IsNearTheExactSumAndARowHasTheSameBitsAmongAnyNumberOfRows) {
  for (const Shape shape : {Shape{1024, 4096}, Shape{64, 4096}, Shape{256, 4096}, Shape{1536, 256}, Shape{200, 264},
                            Shape{16, 256}, Shape{8192, 7168}}) {
    SCOPED_TRACE(testing::Message() << "n " << shape.n << " k " << shape.k);
    constexpr int64_t kRows = 1024;
    const std::vector<uint16_t> w_host = RandomBf16Bits(shape.n * shape.k, 11),
                                x_host = RandomBf16Bits(kRows * shape.k, 12);
    DeviceArray<uint16_t> w(w_host), x(x_host);
    const auto run = [&](int64_t rows) {
      DeviceArray<float> out(rows * shape.n);
      LinearBf16({WeightKind::kBf16, shape.n, shape.k, w.data()}, {reinterpret_cast<const Bf16*>(x.data()), shape.k},
                 rows, {out.data(), shape.n}, nullptr);
      return out.Fetch();
    };
    const std::vector<float> all = run(kRows);
    ExpectNearExact(all, kRows, shape.n, kBound, 0, [&](int64_t r, int64_t n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < shape.k; ++k) {
        const double term =
            static_cast<double>(DecodeBf16(x_host[r * shape.k + k])) * DecodeBf16(w_host[n * shape.k + k]);
        sum += term;
        magnitude += std::abs(term);
      }
      return std::make_pair(sum, magnitude);
    });
    for (const int64_t rows : kLadder) {
      EXPECT_EQ(DifferingRows(run(rows), all, rows, shape.n), 0) << rows << " rows";
    }
    if (HasFailure()) return;
  }
}

TEST_F(CudaTensorLinear, GroupsSideBySideAreTheProductsOfEachGroup) {
  constexpr int kGroups = 8;
  constexpr int64_t kN = 1024, kK = 512;
  for (const int64_t rows : {1, 5, 64, 100, 200, 700}) {
    const std::vector<uint16_t> w_host = RandomBf16Bits(kGroups * kN * kK, 21),
                                x_host = RandomBf16Bits(rows * kGroups * kK, 22);
    DeviceArray<uint16_t> w(w_host), x(x_host);
    DeviceArray<float> together(rows * kGroups * kN);
    const Bf16* x_data = reinterpret_cast<const Bf16*>(x.data());
    LinearGrouped({WeightKind::kBf16, kN, kK, w.data()}, kGroups, {x_data, kGroups * kK}, rows,
                  {together.data(), kGroups * kN}, nullptr);
    const std::vector<float> got = together.Fetch();
    for (int g = 0; g < kGroups; ++g) {
      DeviceArray<float> alone(rows * kN);
      LinearBf16({WeightKind::kBf16, kN, kK, w.data() + g * kN * kK}, {x_data + g * kK, kGroups * kK}, rows,
                 {alone.data(), kN}, nullptr);
      const std::vector<float> want = alone.Fetch();
      for (int64_t r = 0; r < rows; ++r) {
        ASSERT_EQ(std::memcmp(got.data() + (r * kGroups + g) * kN, want.data() + r * kN, kN * sizeof(float)), 0)
            << "group " << g << " row " << r << " of " << rows;
      }
    }
  }
}

}  // namespace
}  // namespace millrace::cuda
