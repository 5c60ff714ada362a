// SPDX-License-Identifier: Apache-2.0
// See weight_tiles_amx.h. Full panels are filled by moving bytes and bits about, 128 weights at a time; what does not
// allow that (narrow panels, subnormals, scales at the ends of BF16's range) goes through F32.
#include "engine/ops/weight_tiles_amx.h"

#ifdef MILLRACE_HAVE_AMX
#include <algorithm>
#include <bit>

namespace millrace::amx {
namespace {

// A power of two that BF16's exponent field can take by addition, or subtraction, without leaving it.
bool IsModest(float scale) { return scale >= 0x1p-100f && scale <= 0x1p100f; }

// What one is to add to a BF16 value's bits to multiply it by a power of two.
int ExponentBits(float scale) { return (static_cast<int>(std::bit_cast<uint32_t>(scale) >> 23) - 127) * 128; }

// F32 values of two inputs' weights, each exact in BF16, as pairs.
MILLRACE_AMX inline __m512i Pair(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_or_si512(low,
                         _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Weights of inputs k and k + 1, outputs `lane` and up, times their scales, as pairs: any codes, scales and panel
// width.
MILLRACE_AMX inline __m512i AnyPairs(WeightKind kind, const uint8_t* panel, const float* scales, int width, int64_t k,
                                     int lane) {
  if (kind == WeightKind::kFp8) {
    uint16_t half[2][kTileN];
    HalveFp8(panel + k * width + lane, kTileN, half[0]);
    HalveFp8(panel + (k + 1) * width + lane, kTileN, half[1]);
    const __m512 back = _mm512_set1_ps(0x1p8f), scale = _mm512_set1_ps(scales[k / 128]);
    return Pair(_mm512_mul_ps(_mm512_mul_ps(WidenHalf(half[0]), back), scale),
                _mm512_mul_ps(_mm512_mul_ps(WidenHalf(half[1]), back), scale));
  }
  if (kind == WeightKind::kFp4) {
    const __m512 scale = _mm512_loadu_ps(scales + k / 32 * PackedLinear::kPanel + lane);
    const uint8_t* at = panel + k * 32 + lane % 32;
    return Pair(_mm512_mul_ps(WidenFp4(at, lane >= 32), scale), _mm512_mul_ps(WidenFp4(at + 32, lane >= 32), scale));
  }
  const uint16_t* at = reinterpret_cast<const uint16_t*>(panel) + k * width + lane;
  const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + width)));
  return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

MILLRACE_AMX void FillAnyStep(WeightKind kind, const uint8_t* panel, const float* scales, int width, int64_t k0,
                              Step& step) {
  for (int lane = 0; lane < PackedLinear::kPanel; lane += kTileN) {
    Tile& tile = step.tiles[lane / kTileN];
    for (int p = 0; p < kTileK / 2; ++p) {
      const __m512i pairs =
          lane < width ? AnyPairs(kind, panel, scales, width, k0 + 2 * p, lane) : _mm512_setzero_si512();
      _mm512_store_si512(tile.words[p], pairs);
    }
  }
}

// The order in which groups of four outputs must stand so that two rounds of interleaving inside 128 bits put outputs
// 16t .. 16t + 15 into tile t: a transposed 4 x 4.
MILLRACE_AMX inline __m512i GroupsOfFour() {
  return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// Stores one row of pairs in the four tiles, from bytes of even and odd inputs side by side: low and high bytes of BF16
// values, outputs in groups as above; `first` holds groups 0 and 1 of every 128 bits, `second` 2 and 3. `Finish` gets
// each vector and its tile.
template <typename Finish>
MILLRACE_AMX inline void StoreBytes(__m512i first_low, __m512i first_high, __m512i second_low, __m512i second_high,
                                    int p, Step& step, Finish finish) {
  _mm512_store_si512(step.tiles[0].words[p], finish(_mm512_unpacklo_epi8(first_low, first_high), 0));
  _mm512_store_si512(step.tiles[1].words[p], finish(_mm512_unpackhi_epi8(first_low, first_high), 1));
  _mm512_store_si512(step.tiles[2].words[p], finish(_mm512_unpacklo_epi8(second_low, second_high), 2));
  _mm512_store_si512(step.tiles[3].words[p], finish(_mm512_unpackhi_epi8(second_low, second_high), 3));
}

// FP8 in a full panel. BF16's exponent is E4M3's plus 120: its highest bit, that one's complement four times, and the
// rest, so both bytes are bits of the code, moved. Where a code has exponent 0 (zero or subnormal, rare in weights that
// were scaled to the format) the row of pairs is made the other way.
MILLRACE_AMX void FillFp8Step(const uint8_t* panel, const float* scales, int64_t k0, Step& step) {
  const __m512i high_bits = _mm512_set1_epi64(0x1020404040404080), low_bits = _mm512_set1_epi64(0x01020408);
  const __m512i exponents = _mm512_set1_epi8(0x78), groups = GroupsOfFour();
  const __m512i scale = _mm512_set1_epi16(static_cast<short>(ExponentBits(scales[k0 / 128])));
  for (int p = 0; p < kTileK / 2; ++p) {
    const uint8_t* at = panel + (k0 + 2 * p) * PackedLinear::kPanel;
    const __m512i even = _mm512_loadu_si512(at), odd = _mm512_loadu_si512(at + PackedLinear::kPanel);
    if ((_mm512_testn_epi8_mask(even, exponents) | _mm512_testn_epi8_mask(odd, exponents)) != 0) [[unlikely]] {
      for (int t = 0; t < kTiles; ++t) {
        _mm512_store_si512(step.tiles[t].words[p],
                           AnyPairs(WeightKind::kFp8, panel, scales, PackedLinear::kPanel, k0 + 2 * p, t * kTileN));
      }
      continue;
    }
    const __m512i a = _mm512_permutexvar_epi32(groups, even), b = _mm512_permutexvar_epi32(groups, odd);
    const __m512i first = _mm512_unpacklo_epi8(a, b), second = _mm512_unpackhi_epi8(a, b);
    StoreBytes(_mm512_gf2p8affine_epi64_epi8(first, low_bits, 0), _mm512_gf2p8affine_epi64_epi8(first, high_bits, 0x3c),
               _mm512_gf2p8affine_epi64_epi8(second, low_bits, 0),
               _mm512_gf2p8affine_epi64_epi8(second, high_bits, 0x3c), p, step,
               [&](__m512i words, int) MILLRACE_AMX { return _mm512_add_epi16(words, scale); });
  }
}

// FP4: bytes from tables. Scales are at most 1 here, so that an unsigned subtraction that stops at zero leaves zeros as
// they are (both of them are +0, which no sum can tell).
MILLRACE_AMX void FillFp4Step(const uint8_t* panel, const float* scales, int64_t k0, Step& step) {
  const __m512i low_bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
  const __m512i high_bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 63, 63, 63, 64, 64, 64, 64, 0, -65, -65, -65, -64, -64, -64, -64));
  const __m512i groups = GroupsOfFour(), nibble = _mm512_set1_epi8(15);
  __m512i less[kTiles];  // what to subtract from both values of a pair
  for (int t = 0; t < kTiles; ++t) {
    const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(scales + k0 / 32 * PackedLinear::kPanel + t * kTileN));
    const __m512i down = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), _mm512_srli_epi32(bits, 23)), 7);
    less[t] = _mm512_or_si512(down, _mm512_slli_epi32(down, 16));
  }
  const auto codes = [&](const uint8_t* pairs) MILLRACE_AMX {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1);
    return _mm512_permutexvar_epi32(groups, _mm512_and_si512(both, nibble));
  };
  for (int p = 0; p < kTileK / 2; ++p) {
    const uint8_t* at = panel + (k0 + 2 * p) * 32;
    const __m512i a = codes(at), b = codes(at + 32);
    const __m512i first = _mm512_unpacklo_epi8(a, b), second = _mm512_unpackhi_epi8(a, b);
    StoreBytes(_mm512_shuffle_epi8(low_bytes, first), _mm512_shuffle_epi8(high_bytes, first),
               _mm512_shuffle_epi8(low_bytes, second), _mm512_shuffle_epi8(high_bytes, second), p, step,
               [&](__m512i words, int t) MILLRACE_AMX { return _mm512_subs_epu16(words, less[t]); });
  }
}

// BF16 in a full panel, 32 outputs at a time: groups of four interleave into two tiles.
MILLRACE_AMX void FillBf16Step(const uint8_t* panel, int64_t k0, Step& step) {
  const __m512i groups = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int p = 0; p < kTileK / 2; ++p) {
    const uint8_t* at = panel + (k0 + 2 * p) * PackedLinear::kPanel * 2;
    for (int half = 0; half < 2; ++half) {
      const __m512i a = _mm512_permutexvar_epi64(groups, _mm512_loadu_si512(at + half * 64));
      const __m512i b = _mm512_permutexvar_epi64(groups, _mm512_loadu_si512(at + half * 64 + PackedLinear::kPanel * 2));
      _mm512_store_si512(step.tiles[2 * half].words[p], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(step.tiles[2 * half + 1].words[p], _mm512_unpackhi_epi16(a, b));
    }
  }
}

}  // namespace

MILLRACE_AMX void FillStep(WeightKind kind, const uint8_t* panel, const float* scales, int width, int64_t k0,
                           Step& step) {
  const bool full = width == PackedLinear::kPanel;
  if (full && kind == WeightKind::kBf16) return FillBf16Step(panel, k0, step);
  if (full && kind == WeightKind::kFp8 && IsModest(scales[k0 / 128])) return FillFp8Step(panel, scales, k0, step);
  if (kind == WeightKind::kFp4) {
    const float* block = scales + k0 / 32 * PackedLinear::kPanel;
    if (std::all_of(block, block + PackedLinear::kPanel, [](float s) { return IsModest(s) && s <= 1; })) {
      return FillFp4Step(panel, scales, k0, step);
    }
  }
  FillAnyStep(kind, panel, scales, width, k0, step);
}

}  // namespace millrace::amx
#endif
