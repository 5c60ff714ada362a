// SPDX-License-Identifier: Apache-2.0
// Weights of packed_linear.h as AMX tiles want them, and widened for one row; what matmul_amx.cc computes with. Exact
// in either form. Only for sources that are compiled for AMX themselves.
#pragma once

#include "engine/ops/amx.h"

#ifdef MILLRACE_HAVE_AMX
#include "engine/ops/packed_linear.h"

namespace millrace::amx {

// One step of a panel: 32 inputs (pairs side by side) by 64 outputs, in tiles of 16.
inline constexpr int kTiles = PackedLinear::kPanel / kTileN;
struct Step {
  Tile tiles[kTiles];
};

// Weights of inputs k0 .. k0 + 31 of a panel of `width` outputs, times their scales, as BF16; outputs that the panel
// does not have are zero.
void FillStep(WeightKind kind, const uint8_t* panel, const float* scales, int width, int64_t k0, Step& step);

// E4M3 codes as half floats 2^8 too small: exponents and mantissas fit, subnormals become subnormals, which the
// widening from half floats takes in its stride (a multiplication of F32 subnormals takes a hundred cycles). n:
// multiple of 16.
MILLRACE_AMX inline void HalveFp8(const uint8_t* codes, int64_t n, uint16_t* half) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    const __m512i bits = _mm512_and_si512(_mm512_slli_epi16(code, 7), _mm512_set1_epi16(static_cast<short>(0xbf80)));
    _mm512_storeu_si512(half + i, bits);
  }
  for (; i < n; i += 16) {
    const __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(code, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i), bits);
  }
}

MILLRACE_AMX inline __m512 WidenHalf(const uint16_t* half) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}

// `codes` holds the nibbles of outputs `lane` and up; the table's index takes no more than its low four bits.
MILLRACE_AMX inline __m512 WidenFp4(const uint8_t* codes, bool high) {
  const __m512 table = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  __m512i raw = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  if (high) raw = _mm512_srli_epi32(raw, 4);
  return _mm512_permutexvar_ps(raw, table);
}

}  // namespace millrace::amx
#endif
