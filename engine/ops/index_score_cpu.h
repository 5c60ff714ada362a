// SPDX-License-Identifier: Apache-2.0
// The lightning indexer's arithmetic on FP4 codes: a score is a sum of exact integers, scaled.
//
// A group of 32 products of two E2M1 values is an integer when both are doubled, at most 32 * 144: it is summed in
// integers and is exact in FP32 after its power-of-two scales, so these scores equal those of the plain F32 loop
// (vec::IndexScore on the widened values) bit for bit, on every instruction set. Only selection of entries is
// indexer_cpu.cc. Source: docs/model.md, "Lightning indexer". Thread: pure functions.
#pragma once

#include <cstdint>

namespace millrace {

inline constexpr int kIndexDim = 128;
inline constexpr int kIndexGroups = 4;  // scale groups of 32 dims
inline constexpr int kIndexTile = 16;   // keys scored together

// One query head or key in FP4.
struct IndexRow {
  int8_t twice[kIndexDim];     // the E2M1 values, doubled
  float scales[kIndexGroups];  // powers of two
  int32_t sums[kIndexGroups];  // of `twice`
};

// Hadamard transform of x [128], over sqrt(128), BF16, then FP4.
void QuantiseIndex(const float* x, IndexRow& row);

// kIndexTile keys side by side, four dims of each in turn.
struct alignas(64) IndexKeyTile {
  uint8_t codes[kIndexDim / 4][kIndexTile][4];  // 12 + twice the value
  float scales[kIndexGroups][kIndexTile];
};

// Puts a stored key (64 bytes of pairs, 4 E8M0 scales) at place `i` of a tile.
void LoadIndexTileKey(const uint8_t* body, const uint8_t* scales, int i, IndexKeyTile& tile);

// scores [num_tiles * kIndexTile] = per key the sum over the query's heads, in order, of weight * relu(dot), where dot
// adds its four groups in order; rounded to BF16. query and weights [heads].
void ScoreIndexTiles(const IndexRow* query, const float* weights, int heads, const IndexKeyTile* tiles,
                     int64_t num_tiles, float* scores);
// The same on AMX tiles (index_score_amx.cc), which ScoreIndexTiles prefers; AmxAvailable() must hold.
void ScoreIndexTilesAmx(const IndexRow* query, const float* weights, int heads, const IndexKeyTile* tiles,
                        int64_t num_tiles, float* scores);

}  // namespace millrace
