// SPDX-License-Identifier: Apache-2.0
// The products of attention on Intel's AMX tiles, for queries, keys and probabilities that are BF16 values.
//
// In `release` all of them are: queries and rotated dims are rounded to BF16, stored dims are E4M3 times a power of
// two, probabilities are rounded before they meet a value. Products are therefore exact, and summed in FP32 in the
// order that the tile instruction fixes (blocks of 32 dims for logits, of 32 keys for values, in ascending order;
// inside a block the even and the odd ones apart; the two halves of the dims of a logit apart). A head's sums do not
// depend on the other heads or on where the keys lie. Subnormal values count as zero. Used by sparse_attention_cpu.cc;
// without AMX the same steps are vec::DotHeads and vec::AccumulateValues on F32, with other bits.
//
// Thread: any; tiles are configured and released inside each call. AmxAvailable() must hold. dim is a multiple of 64.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/ops/amx.h"
#include "engine/ops/attention_keys.h"

namespace millrace {

// A stored KV entry as a TileKey at `out`: as vec::LoadKvEntry, whose values all are BF16 values.
void LoadKvEntryBf16(const uint8_t* body, const uint8_t* scales, int64_t plain, int64_t rope, uint16_t* out,
                     int64_t step);

// The queries of one row, laid out for tiles; kept between rows, so that a thread allocates once.
class QueryTiles {
 public:
  // q [heads, dim], F32 holding BF16 values.
  void Pack(const float* q, int heads, int64_t dim);

  // logits[h * ld + j] = scale * (q_h · keys[j]).
  void DotKeys(const TileKey* keys, int num_keys, float scale, float* logits, int64_t ld);

  // out[h] = sum_j p[h * ld + j] * keys[j], out [heads, dim]; p holds BF16 values.
  void SumValues(const float* p, int64_t ld, const TileKey* keys, int num_keys, float* out);

 private:
  int heads_ = 0;
  int64_t dim_ = 0;
  std::vector<uint32_t> queries_;  // [heads / 16][dim / 32][16 pairs of dims][16 heads]
  std::vector<uint16_t> gathered_, weights_;
  std::vector<TileKey> padded_;
};

}  // namespace millrace
