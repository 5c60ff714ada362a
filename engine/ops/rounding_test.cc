// SPDX-License-Identifier: Apache-2.0
// The number formats against models that share nothing with them: every code spelled out by its definition, nearest
// values found by exhaustive search in double, scales found by counting powers of two.
#include "engine/ops/rounding.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace millrace {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

uint32_t Bits(float x) { return std::bit_cast<uint32_t>(x); }

// Sign, exponent and mantissa read as the format's text says; no NaN.
double SlowDecode(int code, int mantissa_bits, int exponent_bits, int bias) {
  const int mantissa = code % (1 << mantissa_bits);
  const int exponent = (code >> mantissa_bits) % (1 << exponent_bits);
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  const double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias);
  return (code >> (mantissa_bits + exponent_bits)) != 0 ? -magnitude : magnitude;
}

// Nearest of `magnitudes` (index = code), ties to the even code, clamped by construction; the sign bit goes on top.
int SlowEncode(float x, const std::vector<double>& magnitudes, int sign_code) {
  const double a = std::fabs(static_cast<double>(x));
  if (a >= magnitudes.back()) return (static_cast<int>(magnitudes.size()) - 1) | (std::signbit(x) ? sign_code : 0);
  int best = 0;
  for (int code = 1; code < static_cast<int>(magnitudes.size()); ++code) {
    const double distance = std::fabs(magnitudes[code] - a), best_distance = std::fabs(magnitudes[best] - a);
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? sign_code : 0);
}

std::vector<double> E4m3Magnitudes() {
  std::vector<double> m;
  for (int code = 0; code < 127; ++code) m.push_back(SlowDecode(code, 3, 4, 7));
  return m;
}

std::vector<double> E2m1Magnitudes() { return {0, 0.5, 1, 1.5, 2, 3, 4, 6}; }

// The values themselves, their midpoints, both FP32 neighbours of each, both signs, and values of every binade.
std::vector<float> HardValues(const std::vector<double>& magnitudes) {
  std::vector<float> values = {0.0f,  std::numeric_limits<float>::denorm_min(), 0x1p-126f, 500.0f,
                               1e30f, std::numeric_limits<float>::max(),        kInf};
  for (size_t i = 0; i < magnitudes.size(); ++i) {
    values.push_back(static_cast<float>(magnitudes[i]));
    if (i > 0) values.push_back(static_cast<float>((magnitudes[i - 1] + magnitudes[i]) / 2));
  }
  const size_t exact = values.size();
  for (size_t i = 0; i < exact; ++i) {
    values.push_back(std::nextafter(values[i], kInf));
    if (values[i] > 0) values.push_back(std::nextafter(values[i], 0.0f));
  }
  std::mt19937 random(17);
  for (int i = 0; i < 200000; ++i) {
    // Exponents from 2^-14 to 2^11, where the formats live.
    values.push_back(
        std::bit_cast<float>(static_cast<uint32_t>((113u + random() % 26) << 23 | (random() & 0x7fffffu))));
  }
  const size_t positive = values.size();
  for (size_t i = 0; i < positive; ++i) values.push_back(-values[i]);
  return values;
}

TEST(Bf16, RoundsToNearestEvenForEveryUpperHalf) {
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    const bool nan = (upper & 0x7f80) == 0x7f80 && (upper & 0x7f) != 0;
    const bool inf = (upper & 0x7fff) == 0x7f80;
    for (uint32_t lower : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const float x = std::bit_cast<float>(upper << 16 | lower);
      const float rounded = RoundBf16(x);
      ASSERT_EQ(Bits(rounded) & 0xffff, 0u);
      if (nan || (inf && lower != 0)) {
        ASSERT_TRUE(std::isnan(rounded)) << std::hex << upper << " " << lower;
        ASSERT_EQ(std::signbit(rounded), std::signbit(x));
        continue;
      }
      const bool up = lower > 0x8000 || (lower == 0x8000 && upper % 2 == 1);
      ASSERT_EQ(Bits(rounded) >> 16, upper + (up ? 1 : 0)) << std::hex << upper << " " << lower;
    }
  }
}

TEST(Bf16, NamedValues) {
  EXPECT_EQ(RoundBf16(1.0f), 1.0f);
  EXPECT_EQ(RoundBf16(1.00390625f), 1.0f);       // tie, even below
  EXPECT_EQ(RoundBf16(1.01171875f), 1.015625f);  // tie, even above
  EXPECT_EQ(RoundBf16(std::numeric_limits<float>::max()), kInf);
  EXPECT_EQ(RoundBf16(-kInf), -kInf);
  EXPECT_TRUE(std::signbit(RoundBf16(-0.0f)));
  EXPECT_TRUE(std::isnan(RoundBf16(std::bit_cast<float>(0x7f800001u))));  // payload only in the lower half
}

TEST(E4m3, DecodesAllCodesByDefinition) {
  for (int code = 0; code < 256; ++code) {
    const float value = DecodeE4m3(static_cast<uint8_t>(code));
    if ((code & 127) == 127) {
      EXPECT_TRUE(std::isnan(value)) << code;
      continue;
    }
    EXPECT_EQ(Bits(value), Bits(static_cast<float>(SlowDecode(code, 3, 4, 7)))) << code;
    EXPECT_EQ(EncodeE4m3(value), code);
  }
  EXPECT_EQ(DecodeE4m3(0x01), 0x1p-9f);
  EXPECT_EQ(DecodeE4m3(0x08), 0x1p-6f);
  EXPECT_EQ(DecodeE4m3(0x38), 1.0f);
  EXPECT_EQ(DecodeE4m3(0x7e), 448.0f);
}

TEST(E4m3, EncodesToTheNearestCodeTiesToEven) {
  const std::vector<double> magnitudes = E4m3Magnitudes();
  for (float x : HardValues(magnitudes)) ASSERT_EQ(EncodeE4m3(x), SlowEncode(x, magnitudes, 128)) << std::hexfloat << x;
}

TEST(E4m3, ClampsAndKeepsNan) {
  EXPECT_EQ(DecodeE4m3(EncodeE4m3(449.0f)), 448.0f);
  EXPECT_EQ(DecodeE4m3(EncodeE4m3(-kInf)), -448.0f);
  EXPECT_EQ(EncodeE4m3(kNan), 0x7f);
  EXPECT_EQ(EncodeE4m3(-0.0f), 0x80);
  EXPECT_EQ(EncodeE4m3(-0x1p-10f), 0x80);  // half a step: to even, zero
  EXPECT_EQ(EncodeE4m3(0x1.8p-9f), 0x02);  // a step and a half: to even, two
}

TEST(E2m1, DecodesAllCodesByDefinition) {
  for (int code = 0; code < 16; ++code) {
    const float value = DecodeE2m1(static_cast<uint8_t>(code));
    EXPECT_EQ(Bits(value), Bits(static_cast<float>(SlowDecode(code, 1, 2, 1)))) << code;
    EXPECT_EQ(EncodeE2m1(value), code);
    EXPECT_EQ(Bits(DecodeE2m1(static_cast<uint8_t>(code | 0xf0))), Bits(value));
  }
}

TEST(E2m1, TiesGoToTheEvenCode) {
  const float ties[][2] = {{0.25f, 0}, {0.75f, 1}, {1.25f, 1}, {1.75f, 2}, {2.5f, 2}, {3.5f, 4}, {5.0f, 4}};
  for (const auto& [x, value] : ties) {
    EXPECT_EQ(DecodeE2m1(EncodeE2m1(x)), value) << x;
    EXPECT_EQ(Bits(DecodeE2m1(EncodeE2m1(-x))), Bits(-value)) << x;
  }
}

TEST(E2m1, EncodesToTheNearestCodeTiesToEven) {
  const std::vector<double> magnitudes = E2m1Magnitudes();
  for (float x : HardValues(magnitudes)) ASSERT_EQ(EncodeE2m1(x), SlowEncode(x, magnitudes, 8)) << std::hexfloat << x;
  EXPECT_EQ(EncodeE2m1(kNan), 7);
}

TEST(E8m0, EveryByteIsAPowerOfTwoExceptNan) {
  for (int b = 0; b < 255; ++b) {
    const float value = DecodeE8m0(static_cast<uint8_t>(b));
    EXPECT_EQ(static_cast<double>(value), std::ldexp(1.0, b - 127)) << b;
    EXPECT_EQ(EncodeE8m0(b - 127), b);
    EXPECT_EQ(PowerOfTwo(b - 127), value);
  }
  EXPECT_EQ(Bits(DecodeE8m0(0)), 0x00400000u);
  EXPECT_TRUE(std::isnan(DecodeE8m0(255)));
  EXPECT_TRUE(std::isnan(PowerOfTwo(128)));
}

// The smallest e with r <= 2^e, by counting.
int SlowCeilLog2(float r) {
  int e = -149;
  while (static_cast<double>(r) > std::ldexp(1.0, e)) ++e;
  return e;
}

TEST(Scales, NamedExamples) {
  EXPECT_EQ(ActQuantScale(0.5f), -9);
  EXPECT_EQ(ActQuantScale(1.0f), -8);
  EXPECT_EQ(ActQuantScale(3.5f), -7);
  EXPECT_EQ(ActQuantScale(447.0f), 0);
  EXPECT_EQ(ActQuantScale(450.0f), 1);
  EXPECT_EQ(ActQuantScale(0.0f), -22);
  EXPECT_EQ(ActQuantScale(1e-4f), -22);
  EXPECT_EQ(Fp4Scale(0.1f), -5);
  EXPECT_EQ(Fp4Scale(1.0f), -2);
  EXPECT_EQ(Fp4Scale(3.0f), -1);
  EXPECT_EQ(Fp4Scale(6.0f), 0);
  EXPECT_EQ(Fp4Scale(6.03f), 1);
  EXPECT_EQ(Fp4Scale(0.0f), -126);
}

TEST(Scales, AreTheCeilingOfTheFp32Product) {
  std::mt19937 random(3);
  for (int i = 0; i < 20000; ++i) {
    const float amax = std::bit_cast<float>(static_cast<uint32_t>(random() & 0x7fffffffu));
    if (!(amax <= std::numeric_limits<float>::max())) continue;
    const float act = std::fmax(amax, 1e-4f), fp4 = std::fmax(amax, std::ldexp(6.0f, -126));
    ASSERT_EQ(ActQuantScale(amax), SlowCeilLog2(act * (1.0f / 448.0f))) << std::hexfloat << amax;
    ASSERT_EQ(Fp4Scale(amax), SlowCeilLog2(fp4 * (1.0f / 6.0f))) << std::hexfloat << amax;
  }
}

// For BF16 inputs the FP32 product never crosses a power of two the real quotient does not: the scale is the real
// ceiling, so no element clamps.
TEST(Scales, AreTheRealCeilingForEveryBf16Amax) {
  for (uint32_t upper = 0; upper < 0x7f80; ++upper) {
    const float amax = DecodeBf16(static_cast<uint16_t>(upper));
    if (amax >= 1e-4f) {
      const int e = ActQuantScale(amax);
      ASSERT_LE(amax, std::ldexp(448.0, e)) << amax;
      ASSERT_GT(amax, std::ldexp(448.0, e - 1)) << amax;
    }
    if (amax >= 6.0f * 0x1p-126f) {
      const int e = Fp4Scale(amax);
      ASSERT_LE(amax, std::ldexp(6.0, e)) << amax;
      ASSERT_GT(amax, std::ldexp(6.0, e - 1)) << amax;
    }
  }
}

TEST(Scales, BrokenGroupsGetANanScale) {
  for (float amax : {kInf, kNan}) {
    EXPECT_TRUE(std::isnan(PowerOfTwo(ActQuantScale(amax))));
    EXPECT_TRUE(std::isnan(PowerOfTwo(Fp4Scale(amax))));
  }
}

// Why an FP8 or FP4 cache reproduces the simulated BF16 values bit for bit.
TEST(Simulate, ResultsAreExactInBf16) {
  std::mt19937 random(5);
  for (int i = 0; i < 100000; ++i) {
    const float x = RoundBf16(std::ldexp(static_cast<float>(random()) / 4294967296.0f - 0.5f, int(random() % 24) - 12));
    const float amax = RoundBf16(std::fabs(x) * (1.0f + static_cast<float>(random() % 16)));
    const int act = ActQuantScale(amax), fp4 = Fp4Scale(amax);
    const float e4m3 = SimulateE4m3(x, act), e2m1 = SimulateE2m1(x, fp4);
    ASSERT_EQ(Bits(e4m3), Bits(RoundBf16(e4m3)));
    ASSERT_EQ(Bits(e2m1), Bits(RoundBf16(e2m1)));
    ASSERT_LE(std::fabs(e4m3 - x), std::fmax(std::fabs(x) / 16, std::ldexp(1.0f, act - 10)));
    ASSERT_LE(std::fabs(e2m1 - x), std::fmax(std::fabs(x) / 4, std::ldexp(1.0f, fp4 - 2)));
  }
}

}  // namespace
}  // namespace millrace
