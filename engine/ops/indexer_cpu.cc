// SPDX-License-Identifier: Apache-2.0
// Which compressed entries a CSA row attends to: scores of all visible index keys, then the k best.
//
// In `release` keys and queries are FP4 and are scored as codes (index_score_cpu.h); wherever one of them is not (the
// `exact` numerics, or a rounding point switched off) they are scored as F32. Rows of a pass share the work of widening
// keys; a row's scores depend on its own query and its sequence's keys only.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "engine/ops/cpu_ops.h"
#include "engine/ops/index_score_cpu.h"
#include "engine/ops/rounding.h"
#include "engine/ops/vector_cpu.h"
#include "engine/round_up.h"

namespace millrace {
namespace {

// Appends the indices of the k best scores, ties to the lower index, ascending.
void TopK(const float* scores, int64_t n, int k, std::vector<uint64_t>& scratch, std::vector<int32_t>& out) {
  if (n <= k) {
    for (int32_t i = 0; i < n; ++i) out.push_back(i);
    return;
  }
  // Scores as integers that sort like them, the index below, complemented so that the lower one is the better.
  const auto key = [scores](int64_t i) {
    const uint32_t bits = std::bit_cast<uint32_t>(scores[i] + 0.0f);  // -0 is 0
    const uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(i);
  };
  scratch.resize(n);
  for (int64_t i = 0; i < n; ++i) scratch[i] = key(i);
  std::nth_element(scratch.begin(), scratch.begin() + k - 1, scratch.end(), std::greater<>());
  const uint64_t last = scratch[k - 1];  // no two keys are equal, so k of them are not below this one
  for (int32_t i = 0; i < n; ++i) {
    if (key(i) >= last) out.push_back(i);
  }
}

}  // namespace

// Fills scores [rows, ld] of rows r0 .. r0 + rows of one sequence against its first `n_max` keys.
void CpuOps::ScoreCodes(const SequenceRows& s, int layer, int64_t r0, int64_t rows, int64_t n_max, int heads,
                        float* scores, int64_t ld) {
  const PageLayerLayout& l = layout_.page_layers[layer];
  constexpr int64_t kTiles = 32;  // what a thread keeps in its second-level cache
  static_assert(kCsaEntriesPerPage % kIndexTile == 0);
  index_tiles_.resize(kTiles);
  for (int64_t e0 = 0; e0 < n_max; e0 += kTiles * kIndexTile) {
    const int64_t end = std::min(n_max, e0 + kTiles * kIndexTile);
    for (int64_t e = e0; e < end; ++e) {
      const uint8_t* page = (*s.pages)[e / l.entries];
      const int64_t i = e % l.entries;
      LoadIndexTileKey(page + l.index_bodies + i * layout_.index_key.body_bytes,
                       page + l.index_scales + i * layout_.index_key.scale_bytes,
                       static_cast<int>((e - e0) % kIndexTile), index_tiles_[(e - e0) / kIndexTile]);
    }
    pool_.For(rows, [&](int64_t r) {
      const int64_t row = s.row + r0 + r;
      // A whole tile is scored even if the row sees a part of it: what lies beyond is never read.
      const int64_t limit = std::min((s.start + r0 + r + 1) / 4, end);
      if (limit <= e0) return;
      ScoreIndexTiles(index_queries_.data() + row * heads, index_weights_.data() + row * heads, heads,
                      index_tiles_.data(), (limit - e0 + kIndexTile - 1) / kIndexTile, scores + r * ld + e0);
    });
  }
}

// The same from F32 queries and keys.
void CpuOps::ScoreFloats(const SequenceRows& s, int layer, const float* q, int64_t r0, int64_t rows, int64_t n_max,
                         int heads, float* scores, int64_t ld) {
  const PageLayerLayout& l = layout_.page_layers[layer];
  constexpr int64_t kBlock = 512;
  index_keys_.resize(kBlock * kIndexDim);
  for (int64_t e0 = 0; e0 < n_max; e0 += kBlock) {
    const int64_t end = std::min(n_max, e0 + kBlock);
    for (int64_t e = e0; e < end; ++e) {
      const uint8_t* page = (*s.pages)[e / l.entries];
      const int64_t i = e % l.entries;
      LoadIndexKey(page + l.index_bodies + i * layout_.index_key.body_bytes,
                   page + l.index_scales + i * layout_.index_key.scale_bytes,
                   index_keys_.data() + (e - e0) * kIndexDim);
    }
    pool_.For(rows, [&](int64_t r) {
      const int64_t row = s.row + r0 + r;
      const int64_t limit = std::min((s.start + r0 + r + 1) / 4, end);
      for (int64_t e = e0; e < limit; ++e) {
        const float score = vec::IndexScore(q + row * heads * kIndexDim, index_weights_.data() + row * heads, heads,
                                            index_keys_.data() + (e - e0) * kIndexDim);
        scores[r * ld + e] = rounding_.index_score ? RoundBf16(score) : score;
      }
    });
  }
}

void CpuOps::IndexSelect(int layer, const Pass& pass, float* q, const float* weights, int heads, int topk,
                         RopeRows rope, Selection& selection) {
  selection.entries.clear();
  selection.offset.assign(1, 0);
  selection.all = false;

  const bool codes = layout_.numerics == Numerics::kRelease && rounding_.index_score;
  if (codes) index_queries_.resize(std::max<size_t>(index_queries_.size(), pass.num_rows * heads));
  pool_.For(pass.num_rows, [&](int64_t r) {
    for (int64_t i = r * heads; i < (r + 1) * heads; ++i) {
      float* head = q + i * kIndexDim;
      RotateRow(head, kIndexDim, rope.cos + r * 32, rope.sin + r * 32, 1);
      if (codes) {
        QuantiseIndex(head, index_queries_[i]);
      } else {
        SimulateIndex(head);
      }
    }
  });
  const float scale =
      static_cast<float>(1.0 / std::sqrt(static_cast<double>(kIndexDim)) / std::sqrt(static_cast<double>(heads)));
  index_weights_.resize(std::max<size_t>(index_weights_.size(), pass.num_rows * heads));
  for (int64_t i = 0; i < pass.num_rows * heads; ++i) {
    index_weights_[i] = weights[i] * scale;
    if (rounding_.index_score) index_weights_[i] = RoundBf16(index_weights_[i]);
  }

  std::vector<std::vector<int32_t>> chosen(pass.num_rows);
  for (const SequenceRows& s : pass.sequences) {
    // A tile of rows at a time bounds the score matrix.
    const int64_t visible = (s.start + s.count) / 4;
    const int64_t tile_rows = std::clamp<int64_t>((int64_t{4} << 20) / std::max<int64_t>(visible, 1), 1, s.count);
    for (int64_t r0 = 0; r0 < s.count; r0 += tile_rows) {
      const int64_t rows = std::min(tile_rows, s.count - r0);
      const int64_t n_max = (s.start + r0 + rows) / 4, ld = RoundUp(n_max, kIndexTile);
      index_row_scores_.resize(std::max<size_t>(index_row_scores_.size(), rows * ld));
      float* scores = index_row_scores_.data();
      if (codes) {
        ScoreCodes(s, layer, r0, rows, n_max, heads, scores, ld);
      } else {
        ScoreFloats(s, layer, q, r0, rows, n_max, heads, scores, ld);
      }
      pool_.For(rows, [&](int64_t r) {
        static thread_local std::vector<uint64_t> scratch;
        TopK(scores + r * ld, (s.start + r0 + r + 1) / 4, topk, scratch, chosen[s.row + r0 + r]);
      });
    }
  }
  for (const std::vector<int32_t>& row : chosen) {
    selection.entries.insert(selection.entries.end(), row.begin(), row.end());
    selection.offset.push_back(static_cast<int64_t>(selection.entries.size()));
  }
}

}  // namespace millrace
