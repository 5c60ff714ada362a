// SPDX-License-Identifier: Apache-2.0
// See attention_amx.h. Logits have keys on the left (16 neighbours are a tile as they lie) and queries, packed once per
// row, on the right. Values have probabilities on the left and pairs of keys on the right, interleaved as the tiles
// want them 64 dims at a time, one block of 32 keys ahead of the products.
#include "engine/ops/attention_amx.h"

#include "engine/status.h"

#ifdef MILLRACE_HAVE_AMX
#include <algorithm>
#include <bit>

#include "engine/ops/rounding.h"

namespace millrace {
namespace {

using amx::CompilerBarrier;
using amx::kTileK;
using amx::kTileN;
using amx::kTileRows;
using amx::Tile;

constexpr int kDimStep = 64;  // dims interleaved together: four tiles

struct alignas(64) Sums {
  float of[4][kTileRows][kTileN];
};

alignas(64) constexpr uint16_t kZeros[kTileK] = {};
static_assert(TileKeys::kDims == kTileK && TileKeys::kTileRows == kTileRows);

// Upper halves of 32 F32 values.
MILLRACE_AMX inline __m512i Narrow(const float* x) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(x)), 16);
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(x + 16)), 16);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
}

// 16 keys as the rows of tiles: where they lie if they are neighbours, else copied to `copy`. With fewer keys the last
// rows are anything: a row's sums do not depend on the others, and theirs are not read.
MILLRACE_AMX TileKey KeyRows(const TileKey* keys, int n, int64_t dim, uint16_t* copy) {
  bool neighbours = true;
  for (int j = 1; j < n; ++j) neighbours &= keys[j] == TileKey{keys[0].at + j * kTileK, keys[0].step};
  if (neighbours) return keys[0];
  for (int64_t b = 0; b < dim / kTileK; ++b) {
    for (int j = 0; j < n; ++j) {
      _mm512_storeu_si512(copy + (b * kTileRows + j) * kTileK, _mm512_loadu_si512(keys[j].at + b * keys[j].step));
    }
  }
  return {copy, kTileRows * kTileK};
}

// sums of kGroups times 16 keys with up to 16 heads: [2 * group], of the first half of the dims, and [2 * group + 1].
template <int kGroups>
MILLRACE_AMX void DotGroups(const uint32_t* queries, const TileKey* rows, int64_t dim, Sums& sums) {
  const int64_t half = dim / kTileK / 2;
  CompilerBarrier();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kGroups > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t b = 0; b < half; ++b) {
    _tile_loadd(6, queries + b * kTileRows * kTileN, 64);
    _tile_loadd(4, rows[0].at + b * rows[0].step, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, queries + (b + half) * kTileRows * kTileN, 64);
    _tile_loadd(5, rows[0].at + (b + half) * rows[0].step, 64);
    _tile_dpbf16ps(1, 5, 7);
    if constexpr (kGroups > 1) {
      _tile_loadd(4, rows[1].at + b * rows[1].step, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, rows[1].at + (b + half) * rows[1].step, 64);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums.of[0], 64);
  _tile_stored(1, sums.of[1], 64);
  if constexpr (kGroups > 1) {
    _tile_stored(2, sums.of[2], 64);
    _tile_stored(3, sums.of[3], 64);
  }
  CompilerBarrier();
  for (int g = 0; g < kGroups; ++g) {
    for (int j = 0; j < kTileRows; ++j) {
      float* sum = sums.of[2 * g][j];
      _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_load_ps(sums.of[2 * g + 1][j])));
    }
  }
}

// 32 keys, dims i .. i + 63, in pairs of keys. Tile 0 holds dims 0-3, 8-11, 16-19, 24-27 of these, tile 1 the other
// ones up to 31; tiles 2 and 3 the same of the upper 32.
MILLRACE_AMX inline void InterleaveKeys(const TileKey* keys, int64_t i, Tile (&tiles)[4]) {
  const int64_t block = i / kTileK;
  for (int p = 0; p < kTileRows; ++p) {
    const TileKey &a = keys[2 * p], &b = keys[2 * p + 1];
    for (int64_t half = 0; half < 2; ++half) {
      const __m512i even = _mm512_loadu_si512(a.at + (block + half) * a.step);
      const __m512i odd = _mm512_loadu_si512(b.at + (block + half) * b.step);
      _mm512_store_si512(tiles[2 * half].words[p], _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(tiles[2 * half + 1].words[p], _mm512_unpackhi_epi16(even, odd));
    }
  }
}

// Dims i .. i + 63 of up to 16 heads, whose weights [heads, 32 * blocks] begin at `weights`.
MILLRACE_AMX void SumDims(const uint16_t* weights, const TileKey* keys, int blocks, int64_t i, Sums& sums) {
  Tile tiles[2][4];
  const int64_t stride = blocks * kTileK * 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  InterleaveKeys(keys, i, tiles[0]);
  for (int b = 0; b < blocks; ++b) {
    if (b + 1 < blocks) InterleaveKeys(keys + (b + 1) * kTileK, i, tiles[(b + 1) % 2]);
    const Tile(&values)[4] = tiles[b % 2];
    CompilerBarrier();
    _tile_loadd(4, weights + b * kTileK, stride);
    _tile_loadd(5, &values[0], 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, &values[1], 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, &values[2], 64);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, &values[3], 64);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, sums.of[0], 64);
  _tile_stored(1, sums.of[1], 64);
  _tile_stored(2, sums.of[2], 64);
  _tile_stored(3, sums.of[3], 64);
  CompilerBarrier();
}

}  // namespace

// BF16's exponent is E4M3's plus 120, so both bytes are bits of the code, moved (matmul_amx.cc does the same), and the
// scale is an addition to it. That leaves codes of exponent 0 (zeros, subnormals), few in a group that was scaled to
// the format, and scales that the addition cannot do.
MILLRACE_AMX void LoadKvEntryBf16(const uint8_t* body, const uint8_t* scales, int64_t plain, int64_t rope,
                                  uint16_t* out, int64_t step) {
  const __m512i in_order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i high_bits = _mm512_set1_epi64(0x1020404040404080), low_bits = _mm512_set1_epi64(0x01020408);
  for (int64_t i = 0; i < plain; i += 64, out += 2 * step) {
    const __m512i codes = _mm512_loadu_si512(body + i);
    const int exponent = scales[i / 64] - 127;
    if (_mm512_testn_epi8_mask(codes, _mm512_set1_epi8(0x78)) != 0 || exponent < -100 || exponent > 100) [[unlikely]] {
      const float factor = DecodeE8m0(scales[i / 64]);
      for (int j = 0; j < 64; ++j) out[j / kTileK * step + j % kTileK] = EncodeBf16(DecodeE4m3(body[i + j]) * factor);
      continue;
    }
    const __m512i scale = _mm512_set1_epi16(static_cast<short>(exponent * 128));
    const __m512i halves = _mm512_permutexvar_epi64(in_order, codes);
    const __m512i low = _mm512_gf2p8affine_epi64_epi8(halves, low_bits, 0);
    const __m512i high = _mm512_gf2p8affine_epi64_epi8(halves, high_bits, 0x3c);
    _mm512_storeu_si512(out, _mm512_add_epi16(_mm512_unpacklo_epi8(low, high), scale));
    _mm512_storeu_si512(out + step, _mm512_add_epi16(_mm512_unpackhi_epi8(low, high), scale));
  }
  for (int64_t i = 0; i < rope; i += 32, out += step) {
    _mm512_storeu_si512(out, _mm512_loadu_si512(body + plain + 2 * i));
  }
}

MILLRACE_AMX void QueryTiles::Pack(const float* q, int heads, int64_t dim) {
  CHECK(dim % kDimStep == 0 && dim <= 512, "attention on tiles takes dims in groups of 64, 512 at most");
  const int64_t blocks = dim / kTileK, groups = (heads + kTileN - 1) / kTileN;
  // Places of heads that do not exist are zero, and stay so between rows.
  if (heads != heads_ || dim != dim_) queries_.assign(groups * blocks * kTileRows * kTileN, 0);
  heads_ = heads;
  dim_ = dim;
  const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(kTileN));
  for (int h = 0; h < heads; ++h) {
    uint32_t* group = queries_.data() + h / kTileN * blocks * kTileRows * kTileN + h % kTileN;
    for (int64_t b = 0; b < blocks; ++b) {
      _mm512_i32scatter_epi32(group + b * kTileRows * kTileN, places, Narrow(q + h * dim + b * kTileK), 4);
    }
  }
}

MILLRACE_AMX void QueryTiles::DotKeys(const TileKey* keys, int num_keys, float scale, float* logits, int64_t ld) {
  static constexpr amx::TileConfig kConfig({16, 16, 16, 16, 16, 16, 16, 16});
  constexpr int kGroups = 2;
  gathered_.resize(kGroups * kTileRows * dim_);
  Sums sums;
  const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(kTileN));
  amx::ConfigureTiles(kConfig);
  for (int j = 0; j < num_keys; j += kGroups * kTileRows) {
    const int n = std::min(num_keys - j, kGroups * kTileRows), groups = (n + kTileRows - 1) / kTileRows;
    TileKey rows[kGroups];
    for (int g = 0; g < groups; ++g) {
      rows[g] = KeyRows(keys + j + g * kTileRows, std::min(n - g * kTileRows, kTileRows), dim_,
                        gathered_.data() + g * kTileRows * dim_);
    }
    for (int h = 0; h < heads_; h += kTileN) {
      const uint32_t* queries = queries_.data() + h * dim_ / 2;
      if (groups == 1) {
        DotGroups<1>(queries, rows, dim_, sums);
      } else {
        DotGroups<2>(queries, rows, dim_, sums);
      }
      for (int i = 0; i < std::min(kTileN, heads_ - h); ++i) {
        for (int g = 0; g < groups; ++g) {
          const int left = n - g * kTileRows;
          const __mmask16 part = static_cast<__mmask16>(left >= kTileRows ? 0xffff : (1 << left) - 1);
          const __m512 sum = _mm512_i32gather_ps(places, &sums.of[2 * g][0][i], 4);
          _mm512_mask_storeu_ps(logits + (h + i) * ld + j + g * kTileRows, part,
                                _mm512_mul_ps(sum, _mm512_set1_ps(scale)));
        }
      }
    }
  }
  amx::ReleaseTiles();
}

MILLRACE_AMX void QueryTiles::SumValues(const float* p, int64_t ld, const TileKey* keys, int num_keys, float* out) {
  const int blocks = (num_keys + kTileK - 1) / kTileK, width = blocks * kTileK;
  weights_.resize(heads_ * width);
  for (int h = 0; h < heads_; ++h) {
    for (int j = 0; j < width; j += kTileN) {
      const __mmask16 part = static_cast<__mmask16>(num_keys - j >= kTileN ? 0xffff
                                                    : num_keys <= j        ? 0
                                                                           : (1 << (num_keys - j)) - 1);
      const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(part, p + h * ld + j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights_.data() + h * width + j),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
  }
  // The last block is filled up with keys of weight zero.
  padded_.assign(keys, keys + num_keys);
  padded_.resize(width, TileKey{kZeros, 0});

  const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  Sums sums;
  for (int h = 0; h < heads_; h += kTileRows) {
    const uint8_t rows = static_cast<uint8_t>(std::min(kTileRows, heads_ - h));
    const amx::TileConfig config({rows, rows, rows, rows, rows, 16, 16, 16});
    amx::ConfigureTiles(config);
    for (int64_t i = 0; i < dim_; i += kDimStep) {
      SumDims(weights_.data() + h * width, padded_.data(), blocks, i, sums);
      for (int r = 0; r < rows; ++r) {
        for (int half = 0; half < 2; ++half) {
          const __m512 a = _mm512_load_ps(sums.of[2 * half][r]), b = _mm512_load_ps(sums.of[2 * half + 1][r]);
          float* at = out + (h + r) * dim_ + i + half * 32;
          _mm512_storeu_ps(at, _mm512_permutex2var_ps(a, lower, b));
          _mm512_storeu_ps(at + 16, _mm512_permutex2var_ps(a, upper, b));
        }
      }
    }
  }
  amx::ReleaseTiles();
}

}  // namespace millrace

#else

namespace millrace {
void LoadKvEntryBf16(const uint8_t*, const uint8_t*, int64_t, int64_t, uint16_t*, int64_t) {
  CHECK(false, "AMX on a processor without it");
}
void QueryTiles::Pack(const float*, int, int64_t) { CHECK(false, "AMX on a processor without it"); }
void QueryTiles::DotKeys(const TileKey*, int, float, float*, int64_t) { CHECK(false, "AMX on a processor without it"); }
void QueryTiles::SumValues(const float*, int64_t, const TileKey*, int, float*) {
  CHECK(false, "AMX on a processor without it");
}
}  // namespace millrace

#endif
