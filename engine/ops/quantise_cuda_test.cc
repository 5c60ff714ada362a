// SPDX-License-Identifier: Apache-2.0
// Activation quantisation on the device: alone, to the CPU's values; behind a norm or a SwiGLU, against double
// precision.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/ops/cuda_quantise.h"
#include "engine/ops/cuda_test_util.h"
#include "engine/ops/packed_linear.h"

namespace millrace::cuda {
namespace {

using CudaQuantise = CudaTest;

// `found` are the rounded values of `x`, as the CPU has them, in the order of fragments.
void ExpectRounded(const std::vector<float>& x, int64_t rows, int64_t k, const std::vector<Bf16>& found) {
  const int64_t groups = (k + 127) / 128;
  const std::vector<float> values = FromDeviceBf16(found);
  std::vector<float> codes(k), scales(groups), expected(rows * k);
  for (int64_t r = 0; r < rows; ++r) {
    QuantiseActivations(x.data() + r * k, k, 128, codes.data(), scales.data());
    for (int64_t i = 0; i < k; ++i) expected[r * k + FragmentPlace(i)] = codes[i] * scales[i / 128];
  }
  // Activations differ in their last BF16 bit here and there; a code then does too.
  EXPECT_LT(RelativeNorm(values, expected), 2e-2);
  int64_t other = 0;
  for (size_t i = 0; i < values.size(); ++i) other += values[i] != expected[i] ? 1 : 0;
  EXPECT_LE(other, static_cast<int64_t>(values.size()) / 50);
}

TEST_F(CudaQuantise, RoundsToTheCpusValuesInTheOrderOfFragments) {
  constexpr int64_t kRows = 37;
  for (const int64_t k : {32, 128, 160, 4096}) {
    for (const float scale : {1.0f, 1e-6f, 1e4f}) {
      std::vector<float> x = RandomBf16(kRows * k, 1, scale);
      x[0] = RoundBf16(448 * scale);  // a group whose largest is at a power-of-two boundary
      DeviceArray<Bf16> device_x(ToDeviceBf16(x)), rounded(kRows * k);
      RoundRows({device_x.data(), k}, kRows, k, rounded.data(), stream());
      const std::vector<float> found = FromDeviceBf16(rounded.Fetch());
      std::vector<float> codes(k), scales((k + 127) / 128);
      for (int64_t r = 0; r < kRows; ++r) {
        QuantiseActivations(x.data() + r * k, k, 128, codes.data(), scales.data());
        for (int64_t i = 0; i < k; ++i) {
          ASSERT_EQ(found[r * k + FragmentPlace(i)], codes[i] * scales[i / 128]) << "row " << r << ", k " << i;
        }
      }
    }
  }
}

TEST_F(CudaQuantise, NormsAsTheCpuDoes) {
  for (const int64_t dim : {32, 128, 160, 1024, 1536}) {
    constexpr int64_t kRows = 9;
    const int64_t ld = dim + 64;
    const std::vector<float> x = RandomBf16(kRows * ld, 3), weight = RandomF32(dim, 4);
    DeviceArray<Bf16> device_x(ToDeviceBf16(x));
    DeviceArray<float> device_weight(weight);
    DeviceArray<Bf16> rounded(kRows * dim);
    NormRound({device_x.data(), ld}, device_weight.data(), kRows, dim, 1e-6f, rounded.data(), stream());
    std::vector<float> normed(kRows * dim);
    for (int64_t r = 0; r < kRows; ++r) {
      double squares = 0;
      for (int64_t i = 0; i < dim; ++i) squares += static_cast<double>(x[r * ld + i]) * x[r * ld + i];
      const double scale = 1.0 / std::sqrt(squares / static_cast<double>(dim) + 1e-6);
      for (int64_t i = 0; i < dim; ++i) {
        normed[r * dim + i] = RoundBf16(static_cast<float>(x[r * ld + i] * scale * weight[i]));
      }
    }
    SCOPED_TRACE(dim);
    ExpectRounded(normed, kRows, dim, rounded.Fetch());
  }
}

TEST_F(CudaQuantise, ActivatesAsTheCpuDoes) {
  for (const int64_t width : {32, 96, 128, 2048}) {
    constexpr int64_t kRows = 7;
    constexpr float kLimit = 2.0f;
    const int64_t ld = 2 * width + 32;
    const std::vector<float> x = RandomBf16(kRows * ld, 5, 3.0f);
    DeviceArray<Bf16> device_x(ToDeviceBf16(x));
    DeviceArray<Bf16> rounded(kRows * width);
    SwiGluRound({device_x.data(), ld}, {device_x.data() + width, ld}, kRows, width, kLimit, rounded.data(), stream());
    std::vector<float> activated(kRows * width);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t i = 0; i < width; ++i) {
        const double g = std::min(x[r * ld + i], kLimit), u = std::clamp(x[r * ld + width + i], -kLimit, kLimit);
        activated[r * width + i] = RoundBf16(static_cast<float>(g / (1.0 + std::exp(-g)) * u));
      }
    }
    SCOPED_TRACE(width);
    ExpectRounded(activated, kRows, width, rounded.Fetch());
  }
}

}  // namespace
}  // namespace millrace::cuda
