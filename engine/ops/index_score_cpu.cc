// SPDX-License-Identifier: Apache-2.0
// See index_score_cpu.h. Byte products have no portable name in Highway, so x86's are called by theirs; everywhere else
// the same integers are summed one by one.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/ops/index_score_cpu.cc"
#include <hwy/foreach_target.h>
// Highway's per-target sections follow.
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/ops/index_score_cpu.h"
#include "engine/ops/rounding.h"

HWY_BEFORE_NAMESPACE();
namespace millrace {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using DI = hn::Rebind<int32_t, D>;
using V = hn::Vec<D>;
using VI = hn::Vec<DI>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
constexpr int kVectors = kIndexTile / kLanes;
constexpr int kQuadsPerGroup = 32 / 4;

// sums[v] = products of one group of a query head with the keys of a tile, where a key's value is code - 12.
HWY_INLINE void GroupProducts(const int8_t* HWY_RESTRICT query, const uint8_t (*HWY_RESTRICT codes)[kIndexTile][4],
                              int32_t bias, VI* sums) {
  const DI di;
#if HWY_TARGET == HWY_AVX2
  // 8 * 2 * 24 * 12 fits 16 bits.
  __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;
  for (int c = 0; c < kQuadsPerGroup; ++c) {
    int32_t quad;
    std::memcpy(&quad, query + 4 * c, 4);
    const __m256i q = _mm256_set1_epi32(quad);
    const __m256i* key = reinterpret_cast<const __m256i*>(codes[c]);
    sum0 = _mm256_add_epi16(sum0, _mm256_maddubs_epi16(_mm256_load_si256(key), q));
    sum1 = _mm256_add_epi16(sum1, _mm256_maddubs_epi16(_mm256_load_si256(key + 1), q));
  }
  const __m256i ones = _mm256_set1_epi16(1);
  sums[0] = hn::Sub(VI{_mm256_madd_epi16(sum0, ones)}, hn::Set(di, bias));
  sums[1] = hn::Sub(VI{_mm256_madd_epi16(sum1, ones)}, hn::Set(di, bias));
#elif HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  __m512i sum = _mm512_setzero_si512();
  for (int c = 0; c < kQuadsPerGroup; ++c) {
    int32_t quad;
    std::memcpy(&quad, query + 4 * c, 4);
    sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(_mm512_load_si512(codes[c]), _mm512_set1_epi32(quad)));
  }
  sums[0] = hn::Sub(VI{_mm512_madd_epi16(sum, _mm512_set1_epi16(1))}, hn::Set(di, bias));
#else
  HWY_ALIGN int32_t sum[kIndexTile] = {};
  for (int c = 0; c < kQuadsPerGroup; ++c) {
    for (int key = 0; key < kIndexTile; ++key) {
      for (int i = 0; i < 4; ++i) sum[key] += query[4 * c + i] * codes[c][key][i];
    }
  }
  for (int v = 0; v < kVectors; ++v) sums[v] = hn::Sub(hn::Load(di, sum + v * kLanes), hn::Set(di, bias));
#endif
}

void ScoreIndexTileV(const IndexRow* query, const float* weights, int heads, const IndexKeyTile& tile, float* scores) {
  const D d;
  V score[kVectors];
  for (int v = 0; v < kVectors; ++v) score[v] = hn::Zero(d);
  for (int h = 0; h < heads; ++h) {
    const IndexRow& q = query[h];
    V dot[kVectors];
    for (int v = 0; v < kVectors; ++v) dot[v] = hn::Zero(d);
    for (int g = 0; g < kIndexGroups; ++g) {
      VI sums[kVectors];
      GroupProducts(q.twice + g * 32, tile.codes + g * kQuadsPerGroup, 12 * q.sums[g], sums);
      const V scale = hn::Set(d, q.scales[g] * 0.25f);  // both sides were doubled
      for (int v = 0; v < kVectors; ++v) {
        const V key_scale = hn::Mul(scale, hn::Load(d, tile.scales[g] + v * kLanes));
        dot[v] = hn::MulAdd(hn::ConvertTo(d, sums[v]), key_scale, dot[v]);
      }
    }
    const V weight = hn::Set(d, weights[h]);
    // Zero comes first so that x86's maximum hands a NaN on.
    for (int v = 0; v < kVectors; ++v) score[v] = hn::MulAdd(weight, hn::Max(hn::Zero(d), dot[v]), score[v]);
  }
  for (int v = 0; v < kVectors; ++v) hn::StoreU(score[v], d, scores + v * kLanes);
  for (int i = 0; i < kIndexTile; ++i) scores[i] = RoundBf16(scores[i]);
}

void HadamardV(const float* x, float* y) {
  const D d;
  std::copy_n(x, kIndexDim, y);
  int half = 1;
  for (; half < kLanes; half *= 2) {  // inside vectors: lanes that have the bit of `half` take the difference
    HWY_ALIGN int32_t partners[kLanes];
    HWY_ALIGN float signs[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      partners[lane] = lane ^ half;
      signs[lane] = (lane & half) != 0 ? -0.0f : 0.0f;
    }
    const auto partner = hn::SetTableIndices(d, partners);
    const V sign = hn::Load(d, signs);
    for (int i = 0; i < kIndexDim; i += kLanes) {
      const V v = hn::LoadU(d, y + i);
      hn::StoreU(hn::Add(hn::TableLookupLanes(v, partner), hn::Xor(v, sign)), d, y + i);
    }
  }
  for (; half < kIndexDim; half *= 2) {
    for (int i = 0; i < kIndexDim; i += 2 * half) {
      for (int j = i; j < i + half; j += kLanes) {
        const V a = hn::LoadU(d, y + j), b = hn::LoadU(d, y + j + half);
        hn::StoreU(hn::Add(a, b), d, y + j);
        hn::StoreU(hn::Sub(a, b), d, y + j + half);
      }
    }
  }
}

// Twice the E2M1 value of x * inverse for one group, ties to the even code (rounding.h).
void EncodeTwiceV(const float* x, float inverse, int8_t* twice) {
  const D d;
  const DI di;
  HWY_ALIGN int32_t values[32];
  for (int i = 0; i < 32; i += kLanes) {
    const V scaled = hn::Mul(hn::LoadU(d, x + i), hn::Set(d, inverse));
    const V a = hn::Abs(scaled);
    // A midpoint passed adds the step to the next magnitude: 1 up to 4, then 2, 2 and 4 (of the doubled values).
    const auto step = [&](auto passed, int size)
                          HWY_ATTR { return hn::IfThenElseZero(hn::RebindMask(di, passed), hn::Set(di, size)); };
    VI sum = step(hn::Gt(a, hn::Set(d, 0.25f)), 1);
    sum = hn::Add(sum, step(hn::Ge(a, hn::Set(d, 0.75f)), 1));
    sum = hn::Add(sum, step(hn::Gt(a, hn::Set(d, 1.25f)), 1));
    sum = hn::Add(sum, step(hn::Ge(a, hn::Set(d, 1.75f)), 1));
    sum = hn::Add(sum, step(hn::Gt(a, hn::Set(d, 2.5f)), 2));
    sum = hn::Add(sum, step(hn::Ge(a, hn::Set(d, 3.5f)), 2));
    sum = hn::Add(sum, step(hn::Gt(a, hn::Set(d, 5.0f)), 4));
    const auto negative = hn::RebindMask(di, hn::Lt(scaled, hn::Zero(d)));
    hn::Store(hn::IfThenElse(negative, hn::Neg(sum), sum), di, values + i);
  }
  for (int i = 0; i < 32; ++i) twice[i] = static_cast<int8_t>(values[i]);
}

// x = x / norm rounded to BF16 (a quotient: near-ties decide FP4 codes); returns the greatest magnitude.
float DivideAndRoundV(float* x, float norm, int n) {
  const D d;
  const hn::Rebind<uint32_t, D> du;
  V greatest = hn::Zero(d);
  for (int i = 0; i < n; i += kLanes) {
    const V v = hn::Div(hn::LoadU(d, x + i), hn::Set(d, norm));
    const auto bits = hn::BitCast(du, v);
    const auto lsb = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
    const auto high = hn::And(hn::Add(bits, hn::Add(lsb, hn::Set(du, 0x7fffu))), hn::Set(du, 0xffff0000u));
    const V rounded = hn::IfThenElse(hn::IsNaN(v), v, hn::BitCast(d, high));
    hn::StoreU(rounded, d, x + i);
    greatest = hn::Max(greatest, hn::Abs(rounded));
  }
  return hn::GetLane(hn::MaxOfLanes(d, greatest));
}

// The codes of one stored key, 12 + twice the value, in order of dims.
void ExpandKeyV(const uint8_t* HWY_RESTRICT body, uint8_t* HWY_RESTRICT codes) {
  alignas(16) static constexpr uint8_t kCodes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < kIndexDim / 2; ++i) {
    codes[2 * i] = kCodes[body[i] & 15];
    codes[2 * i + 1] = kCodes[body[i] >> 4];
  }
#else
  const hn::FixedTag<uint8_t, 16> d8;
  const hn::RepartitionToWide<decltype(d8)> d16;
  const auto table = hn::Load(d8, kCodes), nibble = hn::Set(d8, 15);
  for (int i = 0; i < kIndexDim / 2; i += 16) {
    const auto pair = hn::LoadU(d8, body + i);
    const auto low = hn::TableLookupBytes(table, hn::And(pair, nibble));
    const auto high =
        hn::TableLookupBytes(table, hn::And(hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, pair))), nibble));
    hn::StoreU(hn::InterleaveLower(d8, low, high), d8, codes + 2 * i);
    hn::StoreU(hn::InterleaveUpper(d8, low, high), d8, codes + 2 * i + 16);
  }
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace millrace
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "engine/ops/amx.h"

namespace millrace {
HWY_EXPORT(ScoreIndexTileV);
HWY_EXPORT(HadamardV);
HWY_EXPORT(DivideAndRoundV);
HWY_EXPORT(EncodeTwiceV);
HWY_EXPORT(ExpandKeyV);

void QuantiseIndex(const float* x, IndexRow& row) {
  alignas(64) float y[kIndexDim];
  HWY_DYNAMIC_DISPATCH(HadamardV)(x, y);
  const float norm = std::sqrt(static_cast<float>(kIndexDim));
  for (int g = 0; g < kIndexGroups; ++g) {
    float* group = y + g * 32;
    const int exponent = Fp4Scale(HWY_DYNAMIC_DISPATCH(DivideAndRoundV)(group, norm, 32));
    row.scales[g] = PowerOfTwo(exponent);
    int8_t* twice = row.twice + g * 32;
    HWY_DYNAMIC_DISPATCH(EncodeTwiceV)(group, PowerOfTwo(-exponent), twice);
    row.sums[g] = 0;
    for (int i = 0; i < 32; ++i) row.sums[g] += twice[i];
  }
}

void LoadIndexTileKey(const uint8_t* body, const uint8_t* scales, int i, IndexKeyTile& tile) {
  alignas(16) uint8_t codes[kIndexDim];
  HWY_DYNAMIC_DISPATCH(ExpandKeyV)(body, codes);
  for (int c = 0; c < kIndexDim / 4; ++c) std::memcpy(tile.codes[c][i], codes + 4 * c, 4);
  for (int g = 0; g < kIndexGroups; ++g) tile.scales[g][i] = DecodeE8m0(scales[g]);
}

void ScoreIndexTiles(const IndexRow* query, const float* weights, int heads, const IndexKeyTile* tiles,
                     int64_t num_tiles, float* scores) {
  if (AmxAvailable()) return ScoreIndexTilesAmx(query, weights, heads, tiles, num_tiles, scores);
  for (int64_t t = 0; t < num_tiles; ++t) {
    HWY_DYNAMIC_DISPATCH(ScoreIndexTileV)(query, weights, heads, tiles[t], scores + t * kIndexTile);
  }
}

}  // namespace millrace
#endif  // HWY_ONCE
