// SPDX-License-Identifier: Apache-2.0
// The scores of index_score_cpu.h with the sums of products on Intel's AMX tiles. These are integers, so they are the
// same everywhere, and what follows them is written in the same order: the bits do not depend on who computed.
#include "engine/ops/amx.h"
#include "engine/ops/index_score_cpu.h"
#include "engine/status.h"

#ifdef MILLRACE_HAVE_AMX
#include <algorithm>

namespace millrace {
namespace {

constexpr int kHeadsPerTile = amx::kTileRows, kQuadsPerGroup = 32 / 4;
static_assert(kIndexTile == amx::kTileN);

struct alignas(64) GroupSums {
  int32_t of[kIndexGroups][kHeadsPerTile][kIndexTile];
};

MILLRACE_AMX inline __m512 RoundToBf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_and_si512(_mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))),
                                           _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  // NaN must stay NaN: adding could carry its mantissa away.
  return _mm512_mask_mov_ps(_mm512_castsi512_ps(rounded), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

// Products of the queries in tiles 4 to 7, one per group, with a tile of keys.
MILLRACE_AMX void SumGroups(const IndexKeyTile& keys, GroupSums& sums) {
  amx::CompilerBarrier();
  _tile_loadd(2, keys.codes[0], 64);
  _tile_zero(0);
  _tile_dpbsud(0, 4, 2);
  _tile_loadd(3, keys.codes[kQuadsPerGroup], 64);
  _tile_zero(1);
  _tile_dpbsud(1, 5, 3);
  _tile_stored(0, sums.of[0], 64);
  _tile_loadd(2, keys.codes[2 * kQuadsPerGroup], 64);
  _tile_zero(0);
  _tile_dpbsud(0, 6, 2);
  _tile_stored(1, sums.of[1], 64);
  _tile_loadd(3, keys.codes[3 * kQuadsPerGroup], 64);
  _tile_zero(1);
  _tile_dpbsud(1, 7, 3);
  _tile_stored(0, sums.of[2], 64);
  _tile_stored(1, sums.of[3], 64);
  amx::CompilerBarrier();
}

}  // namespace

MILLRACE_AMX void ScoreIndexTilesAmx(const IndexRow* query, const float* weights, int heads, const IndexKeyTile* tiles,
                                     int64_t num_tiles, float* scores) {
  GroupSums sums;
  for (int first = 0; first < heads; first += kHeadsPerTile) {
    const int n = std::min(heads - first, kHeadsPerTile);
    const auto rows = static_cast<uint8_t>(n);
    amx::TileConfig config({rows, rows, kQuadsPerGroup, kQuadsPerGroup, rows, rows, rows, rows});
    for (int t = 4; t < 8; ++t) config.bytes[t] = 32;
    amx::ConfigureTiles(config);
    const IndexRow* q = query + first;
    amx::CompilerBarrier();
    _tile_loadd(4, q->twice, sizeof(IndexRow));
    _tile_loadd(5, q->twice + 32, sizeof(IndexRow));
    _tile_loadd(6, q->twice + 64, sizeof(IndexRow));
    _tile_loadd(7, q->twice + 96, sizeof(IndexRow));
    for (int64_t t = 0; t < num_tiles; ++t) {
      SumGroups(tiles[t], sums);
      __m512 key_scales[kIndexGroups];
      for (int g = 0; g < kIndexGroups; ++g) key_scales[g] = _mm512_load_ps(tiles[t].scales[g]);
      float* at = scores + t * kIndexTile;
      __m512 score = first == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(at);
      for (int h = 0; h < n; ++h) {
        __m512 dot = _mm512_setzero_ps();
        for (int g = 0; g < kIndexGroups; ++g) {
          // Codes are 12 more than what they mean, and both sides were doubled.
          const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums.of[g][h]), _mm512_set1_epi32(12 * q[h].sums[g]));
          const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(q[h].scales[g] * 0.25f), key_scales[g]);
          dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, dot);
        }
        // Zero comes first so that the maximum hands a NaN on.
        score = _mm512_fmadd_ps(_mm512_set1_ps(weights[first + h]), _mm512_max_ps(_mm512_setzero_ps(), dot), score);
      }
      _mm512_storeu_ps(at, first + n == heads ? RoundToBf16(score) : score);
    }
    amx::ReleaseTiles();
  }
}

}  // namespace millrace

#else

namespace millrace {
void ScoreIndexTilesAmx(const IndexRow*, const float*, int, const IndexKeyTile*, int64_t, float*) {
  CHECK(false, "AMX on a processor without it");
}
}  // namespace millrace

#endif
