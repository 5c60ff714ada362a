// SPDX-License-Identifier: Apache-2.0
// The number formats of a release, one scalar at a time: BF16, E4M3, E2M1, E8M0 and the power-of-two group scales.
//
// These are the definitions the CPU reference computes with and every fast path (vector code, CUDA) is compared with,
// bit for bit. All roundings are to nearest, ties to the even code. All functions are pure and constexpr; they assume
// the default rounding mode and no flushing of denormals where a comment says so, and never fail: NaN stays NaN in the
// formats that have one. Formats: docs/model.md, "Number formats".
#pragma once

#include <bit>
#include <cstdint>

namespace millrace {

// BF16: the upper half of an FP32.

constexpr uint16_t EncodeBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x0040u);  // quiet, sign kept
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // may carry into infinity, rightly
}

constexpr float DecodeBf16(uint16_t b) { return std::bit_cast<float>(static_cast<uint32_t>(b) << 16); }

constexpr float RoundBf16(float x) { return DecodeBf16(EncodeBf16(x)); }

// E4M3 (fn): bias 7, subnormal step 2^-9, largest 448, no infinity, NaN = 0x7f and 0xff.

inline constexpr float kE4m3Max = 448.0f;

// Values beyond +-448 (infinities too) clamp to it; NaN becomes 0x7f, as `cvt.rn.satfinite.e4m3x2.f32` has it.
constexpr uint8_t EncodeE4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 24) & 0x80u;
  if (magnitude > 0x7f800000u) return 0x7f;
  if (magnitude >= std::bit_cast<uint32_t>(kE4m3Max)) return static_cast<uint8_t>(sign | 0x7eu);
  if (magnitude < std::bit_cast<uint32_t>(0x1p-6f)) {
    // One ulp at 2^14 is 2^-9, the subnormal step: the addition rounds. 8 steps are 0x08, the smallest normal.
    const float shifted = std::bit_cast<float>(magnitude) + 0x1p14f;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0x1p14f)));
  }
  const uint32_t rounded = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;  // 8 exponent, 3 mantissa bits
  return static_cast<uint8_t>(sign | (rounded - ((127u - 7u) << 3)));
}

constexpr float DecodeE4m3(uint8_t code) {
  const uint32_t sign = (code & 0x80u) << 24;
  const uint32_t exponent = (code >> 3) & 15u, mantissa = code & 7u;
  if ((code & 0x7fu) == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (exponent == 0) {
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-9f));
  }
  return std::bit_cast<float>(sign | ((exponent + 127u - 7u) << 23) | (mantissa << 20));
}

// E2M1 (FP4): bit 3 is the sign, magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6.

inline constexpr float kE2m1Max = 6.0f;

// Ties go to the even code: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4. Values beyond +-6
// clamp; NaN, which the format lacks, becomes +6, as `cvt.rn.satfinite.e2m1x2.f32` has it. The sign of zero is kept.
constexpr uint8_t EncodeE2m1(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const float a = std::bit_cast<float>(bits & 0x7fffffffu);
  if (a != a) return 7;
  // How many of the seven midpoints x has passed; a midpoint below an even code belongs to the code above it.
  const int code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
  return static_cast<uint8_t>(((bits >> 28) & 8u) | static_cast<uint32_t>(code));
}

// Only the low four bits of `code` count.
constexpr float DecodeE2m1(uint8_t code) {
  constexpr float kMagnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const float a = kMagnitudes[code & 7];
  return (code & 8) != 0 ? -a : a;
}

// E8M0: 2^(b - 127). b = 0 is 2^-127, an FP32 subnormal and not zero; b = 255 is NaN.

constexpr float DecodeE8m0(uint8_t b) {
  if (b == 0) return std::bit_cast<float>(0x00400000u);
  if (b == 255) return std::bit_cast<float>(0x7fc00000u);
  return std::bit_cast<float>(static_cast<uint32_t>(b) << 23);
}

// `exponent` in -127 .. 127, or 128 for NaN.
constexpr uint8_t EncodeE8m0(int exponent) { return static_cast<uint8_t>(exponent + 127); }

// 2^exponent, same range: 128 is NaN.
constexpr float PowerOfTwo(int exponent) { return DecodeE8m0(EncodeE8m0(exponent)); }

// Group scales.

inline constexpr float kInvE4m3Max = 1.0f / 448.0f;  // fl32(1/448)
inline constexpr float kInvE2m1Max = 1.0f / 6.0f;    // fl32(1/6)
inline constexpr float kActAmaxFloor = 1e-4f;
inline constexpr float kFp4AmaxFloor = 6.0f * 0x1p-126f;

// ceil(log2(amax * inv_max)) read off the fields of the FP32 product, for amax >= 0 with a normal product (both floors
// see to that). A product that is not finite gives 128: a NaN scale, so that the group is seen to be broken.
constexpr int PowerOfTwoScale(float amax, float inv_max) {
  const uint32_t bits = std::bit_cast<uint32_t>(amax * inv_max) & 0x7fffffffu;
  if (bits >= 0x7f800000u) return 128;
  return static_cast<int>(bits >> 23) - 127 + ((bits & 0x7fffffu) != 0 ? 1 : 0);
}

// Exponent of an FP8 group's scale; the smallest is -22. Written so that a NaN amax passes the floor.
constexpr int ActQuantScale(float amax) {
  return PowerOfTwoScale(amax <= kActAmaxFloor ? kActAmaxFloor : amax, kInvE4m3Max);
}

// Exponent of an FP4 group's scale; the smallest is -126.
constexpr int Fp4Scale(float amax) {
  return PowerOfTwoScale(amax <= kFp4AmaxFloor ? kFp4AmaxFloor : amax, kInvE2m1Max);
}

// An element through its group's format and back: x / 2^exponent is exact (or too small for the format anyway), and so
// is the result, in BF16 too.
constexpr float SimulateE4m3(float x, int exponent) {
  return DecodeE4m3(EncodeE4m3(x / PowerOfTwo(exponent))) * PowerOfTwo(exponent);
}
constexpr float SimulateE2m1(float x, int exponent) {
  return DecodeE2m1(EncodeE2m1(x / PowerOfTwo(exponent))) * PowerOfTwo(exponent);
}

}  // namespace millrace
