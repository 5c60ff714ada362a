// SPDX-License-Identifier: Apache-2.0
// The attention core on the CPU.
//
// One query row at a time: the window first (two tiles of 64 slots, oldest to newest, slots before the sequence
// masked), then the entries in tiles of 64; a softmax inside each segment of 18 tiles, segments merged in ascending
// order; the sink joins the normaliser at the end. The list and its tiles depend on the query's position only. Keys are
// F32 and meet vectors, or BF16 and meet AMX tiles (attention_amx.h).
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/ops/attention_amx.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/rounding.h"
#include "engine/ops/vector_cpu.h"

namespace millrace {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr int kTile = 64;
constexpr int kTilesPerSegment = 18;
constexpr int kSegment = kTile * kTilesPerSegment;
constexpr int kMaxHeads = 128;

// QueryTiles on vectors.
class QueryVectors {
 public:
  void Pack(const float* q, int heads, int64_t dim) {
    q_ = q;
    heads_ = heads;
    dim_ = dim;
  }
  void DotKeys(const float* const* keys, int num_keys, float scale, float* logits, int64_t ld) const {
    vec::DotHeads(q_, heads_, keys, num_keys, dim_, scale, logits, ld);
  }
  void SumValues(const float* p, int64_t ld, const float* const* keys, int num_keys, float* out) const {
    std::fill_n(out, heads_ * dim_, 0.0f);
    vec::AccumulateValues(p, ld, heads_, keys, num_keys, dim_, out);
  }

 private:
  const float* q_ = nullptr;
  int heads_ = 0;
  int64_t dim_ = 0;
};

// Softmax of `heads` queries over keys that come in tiles. A segment keeps its logits until it is full, so that every
// probability is rounded relative to the segment's own maximum, whatever tile that maximum is in.
template <typename Keys>
class SegmentedAttention {
 public:
  using Key = typename Keys::Key;
  // Begins a row; buffers are kept, so that a thread allocates for its first row only.
  void Start(const float* q, int heads, int64_t dim, bool round_p) {
    queries_.Pack(q, heads, dim);
    heads_ = heads;
    dim_ = dim;
    round_p_ = round_p;
    scale_ = 1.0f / std::sqrt(static_cast<float>(dim));
    n_ = 0;
    tiles_ = 0;
    first_ = true;
    logits_.resize(static_cast<int64_t>(heads) * kSegment);
    keys_.resize(kSegment);
    max_.resize(heads);
    sum_.resize(heads);
    out_.resize(heads * dim);
  }

  // At most kTile keys, none masked; an empty tile counts towards the segment all the same. Keys must stay readable
  // until the segment is closed, i.e. for kTilesPerSegment tiles.
  void Tile(const Key* keys, int n) {
    if (tiles_++ == kTilesPerSegment) {
      CloseSegment();
      tiles_ = 1;
    }
    if (n > 0) queries_.DotKeys(keys, n, scale_, logits_.data() + n_, kSegment);
    std::copy_n(keys, n, keys_.data() + n_);
    n_ += n;
  }

  // At least one key must have come.
  void Finish(const float* sink, bool round, float* out) {
    CloseSegment();
    for (int h = 0; h < heads_; ++h) {
      const float z = sum_[h] + std::exp(sink[h] - max_[h]);
      vec::Divide(out_.data() + h * dim_, z, dim_, round, out + h * dim_);
    }
  }

 private:
  void CloseSegment() {
    if (n_ == 0) return;
    float max[kMaxHeads], sum[kMaxHeads];
    vec::Softmax(logits_.data(), kSegment, heads_, n_, round_p_, max, sum);
    if (first_) {
      queries_.SumValues(logits_.data(), kSegment, keys_.data(), n_, out_.data());
      std::copy_n(max, heads_, max_.data());
      std::copy_n(sum, heads_, sum_.data());
    } else {
      segment_.resize(heads_ * dim_);
      queries_.SumValues(logits_.data(), kSegment, keys_.data(), n_, segment_.data());
      for (int h = 0; h < heads_; ++h) {
        const float new_max = std::max(max_[h], max[h]);
        const float a = std::exp(max_[h] - new_max), b = std::exp(max[h] - new_max);
        max_[h] = new_max;
        sum_[h] = sum_[h] * a + sum[h] * b;
        for (int64_t i = h * dim_; i < (h + 1) * dim_; ++i) out_[i] = out_[i] * a + segment_[i] * b;
      }
    }
    first_ = false;
    n_ = 0;
  }

  std::conditional_t<std::is_same_v<Keys, RowKeys>, QueryVectors, QueryTiles> queries_;
  int heads_ = 0;
  int64_t dim_ = 0;
  bool round_p_ = false, first_ = true;
  float scale_ = 1.0f;
  int n_ = 0, tiles_ = 0;
  std::vector<float> logits_;  // [heads, kSegment], probabilities once closed
  std::vector<Key> keys_;      // [kSegment]
  std::vector<float> max_, sum_, out_, segment_;
};

}  // namespace

void CpuOps::SparseAttention(int layer, const Pass& pass, const float* q, int heads, const float* sink,
                             const WindowKeys& window, const Selection& selection, RopeRows rope, float* out) {
  if (tiles_) {
    Attend(layer, pass, q, heads, sink, window, window.tiles, selection, rope, out);
  } else {
    Attend(layer, pass, q, heads, sink, window, window.rows, selection, rope, out);
  }
}

template <typename Keys>
void CpuOps::Attend(int layer, const Pass& pass, const float* q, int heads, const float* sink, const WindowKeys& window,
                    const Keys& window_keys, const Selection& selection, RopeRows rope, float* out) {
  const int64_t dim = config_.head_dim, slots = layout_.window;
  const LayerKind kind = layer < 0 ? LayerKind::kWindow : layout_.page_layers[layer].kind;
  const int ratio = kind == LayerKind::kCsa ? 4 : 128;
  const bool all = kind != LayerKind::kCsa || selection.all;

  // A stored entry comes from far away, a few keys before it is widened.
  constexpr int64_t kAhead = 4;
  const auto prefetch = [&](const Stored& stored) {
    for (int64_t line = 0; line < layout_.entry.body_bytes; line += 64) __builtin_prefetch(stored.body + line);
    __builtin_prefetch(stored.scales);
  };
  // One row. Without `shared_entries` its entries are widened for itself, and so is a window that is still in its slot.
  const auto attend = [&](size_t i, int64_t r, const Keys* shared_entries) {
    const SequenceRows& s = pass.sequences[i];
    const bool in_slot = window.first[i] == WindowKeys::kInSlot;
    const int64_t row = s.row + r, position = s.start + r;
    static thread_local SegmentedAttention<Keys> attention;
    attention.Start(q + row * heads * dim, heads, dim, rounding_.attention_p);
    // A ring of one segment, whose keys are read when it closes, and of the tile that is loaded before that.
    constexpr int64_t kRing = kSegment + kTile;
    static thread_local Keys own;
    if (shared_entries == nullptr) own.Reserve(kRing, dim);
    int64_t num_own = 0;
    const auto load = [&](const Stored& stored) {
      const int64_t at = num_own++ % kRing;
      LoadEntry(stored, own, at);
      return own[at];
    };
    typename Keys::Key keys[kTile];
    for (int64_t tile = 0; tile < slots; tile += kTile) {
      int n = 0;
      for (int64_t j = tile; j < std::min<int64_t>(tile + kTile, slots); ++j) {
        const int64_t p = position - (slots - 1) + j;
        if (p < 0) continue;
        if (in_slot) {
          prefetch(WindowPlace(s, window.slot_layer, p + kAhead));
          keys[n++] = load(WindowPlace(s, window.slot_layer, p));
        } else {
          keys[n++] = window_keys[window.first[i] + p - window.first_position[i]];
        }
      }
      attention.Tile(keys, n);
    }
    const int64_t count = kind == LayerKind::kWindow ? 0
                          : all                      ? (position + 1) / ratio
                                                     : selection.offset[row + 1] - selection.offset[row];
    const auto entry_at = [&](int64_t e) { return all ? e : selection.entries[selection.offset[row] + e]; };
    for (int64_t e0 = 0; e0 < count; e0 += kTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTile, count - e0));
      for (int j = 0; j < n; ++j) {
        const int64_t entry = entry_at(e0 + j);
        if (shared_entries != nullptr) {
          keys[j] = (*shared_entries)[entry];
        } else {
          const int64_t ahead = e0 + j + kAhead;
          if (ahead < count) prefetch(EntryPlace(s, layer, entry_at(ahead)));
          keys[j] = load(EntryPlace(s, layer, entry));
        }
      }
      attention.Tile(keys, n);
    }
    float* o = out + row * heads * dim;
    attention.Finish(sink, rounding_.attention_out, o);
    for (int h = 0; h < heads; ++h) RotateRow(o + h * dim, dim, rope.cos + row * 32, rope.sin + row * 32, -1);
  };

  std::vector<std::pair<size_t, int64_t>> alone;  // sequence and row
  for (size_t i = 0; i < pass.sequences.size(); ++i) {
    const SequenceRows& s = pass.sequences[i];
    if (s.count <= kRowsAlone) {
      for (int64_t r = 0; r < s.count; ++r) alone.emplace_back(i, r);
      continue;
    }
    // With several rows each entry is widened once for all of them, as long as that stays small; the values are the
    // same either way.
    const int64_t visible = kind == LayerKind::kWindow ? 0 : (s.start + s.count) / ratio;
    constexpr int64_t kSharedEntries = 32 << 10;
    static thread_local Keys widened;
    const Keys* shared_entries = nullptr;
    if (visible <= kSharedEntries) {
      widened.Reserve(std::max<int64_t>(visible, 1), dim);
      Keys& entries = widened;
      pool_.For(visible, [&](int64_t e) { LoadEntry(EntryPlace(s, layer, e), entries, e); });
      shared_entries = &entries;
    }
    pool_.For(s.count, [&](int64_t r) { attend(i, r, shared_entries); });
  }
  pool_.For(static_cast<int64_t>(alone.size()), [&](int64_t i) { attend(alone[i].first, alone[i].second, nullptr); });
}

}  // namespace millrace
