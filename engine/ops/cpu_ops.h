// SPDX-License-Identifier: Apache-2.0
// The CPU backend of ops.h. One file per group of operations (`*_cpu.cc`); this header only declares the class.
//
// Right first: plain loops in the order of the formula, over the vector loops of vector_cpu.h and the panel product of
// packed_linear.h. Thread: engine thread; rows are spread over the pool.
#pragma once

#include <memory>

#include "engine/model/config.h"
#include "engine/numerics.h"
#include "engine/ops/amx.h"
#include "engine/ops/index_score_cpu.h"
#include "engine/ops/ops.h"

namespace millrace {

class CpuOps : public Ops {
 public:
  // `pool` and `layout` are borrowed and outlive this. `tiles` may keep attention off AMX tiles where they could be
  // used.
  CpuOps(const ModelConfig& config, const CacheLayout& layout, Rounding rounding, ThreadPool& pool, bool tiles = true)
      : config_(config),
        layout_(layout),
        rounding_(rounding),
        pool_(pool),
        tiles_(tiles && rounding == Rounding::All() && AmxAvailable()) {}

  void Embed(const HostRows& table, const int32_t* ids, int64_t rows, int hc, float* streams) override;
  void HyperConnectionPre(const float* streams, const HyperConnectionWeights& w, const float* norm, int64_t rows,
                          float* u, float* post, float* comb) override;
  void HyperConnectionPost(const float* out, const float* post, const float* comb, int64_t rows,
                           float* streams) override;
  void HyperHead(const float* streams, const HyperConnectionWeights& w, const float* norm, int64_t rows,
                 float* z) override;
  void Linear(const float* x, int64_t ld, int64_t rows, std::initializer_list<LinearCall> calls) override;
  void RmsNorm(const float* x, const float* weight, int64_t rows, int64_t dim, float* out) override;
  void PrepareRope(const RopeFrequencies& f, const int64_t* positions, int64_t rows, float* cos, float* sin) override;
  void QueryNormRope(float* q, int heads, RopeRows rope, int64_t rows) override;
  void WindowAppend(int slot_layer, const Pass& pass, const float* kv, const float* norm, RopeRows rope,
                    WindowKeys& window) override;
  void CompressCsa(int layer, const Pass& pass, const float* kv, const float* score, const float* index_kv,
                   const float* index_score, const CompressorWeights& main, const CompressorWeights& index,
                   const RopeFrequencies& f) override;
  void CompressHca(int layer, const Pass& pass, const float* kv, const float* score, const CompressorWeights& w,
                   const RopeFrequencies& f) override;
  void IndexSelect(int layer, const Pass& pass, float* q, const float* weights, int heads, int topk, RopeRows rope,
                   Selection& selection) override;
  void SparseAttention(int layer, const Pass& pass, const float* q, int heads, const float* sink,
                       const WindowKeys& window, const Selection& selection, RopeRows rope, float* out) override;
  void Gate(const float* u, const PackedLinear& w, const float* bias, const int32_t* tid2eid, const int32_t* ids,
            int64_t rows, int k, float route_scale, int32_t* experts, float* weights) override;
  void SwiGlu(const float* g, const float* p, const float* weights, int64_t rows, int64_t width, float limit,
              float* a) override;
  void CombineExperts(const float* expert_rows, const float* shared, int64_t rows, int k, int64_t dim,
                      float* out) override;

 private:
  // RMSNorm of one row.
  void NormRow(const float* x, const float* weight, int64_t dim, float* out) const;
  // RoPE of the last 64 of `dim` dims with cos and sin of one position; sign -1 is the inverse.
  void RotateRow(float* x, int64_t dim, const float* cos, const float* sin, float sign) const;
  // Norm, rotation and storage rounding of a pooled entry that begins at `position`, in place.
  void FinishEntry(float* e, int64_t dim, const CompressorWeights& w, int64_t position, const RopeFrequencies& f) const;
  // FP8 simulation of the non-rotated dims of one KV entry, in place.
  void SimulateKv(float* entry) const;
  // Hadamard and FP4 simulation of one index query or key of 128 dims, in place.
  void SimulateIndex(float* x) const;
  // Where an entry is stored: one of the window's ring, or a compressed one.
  struct Stored {
    uint8_t *body, *scales;
  };
  Stored WindowPlace(const SequenceRows& s, int slot_layer, int64_t position) const {
    const SlotLayerLayout& l = layout_.slot_layers[slot_layer];
    const int64_t i = position % layout_.window_slots;
    return {s.slot + l.window_bodies + i * layout_.entry.body_bytes,
            s.slot + l.window_scales + i * layout_.entry.scale_bytes};
  }
  Stored EntryPlace(const SequenceRows& s, int layer, int64_t entry) const {
    const PageLayerLayout& l = layout_.page_layers[layer];
    uint8_t* page = (*s.pages)[entry / l.entries];
    const int64_t i = entry % l.entries;
    return {page + l.bodies + i * layout_.entry.body_bytes, page + l.scales + i * layout_.entry.scale_bytes};
  }
  void StoreEntry(const float* entry, const Stored& place) const;
  // Key i of an array from its stored form, or from its F32 values.
  void LoadEntry(const Stored& stored, RowKeys& keys, int64_t i) const;
  void LoadEntry(const Stored& stored, TileKeys& keys, int64_t i) const;
  void PutKey(const float* key, RowKeys& keys, int64_t i) const;
  void PutKey(const float* key, TileKeys& keys, int64_t i) const;
  // One index key to and from its stored form.
  void StoreIndexKey(const float* key, uint8_t* body, uint8_t* scales) const;
  void LoadIndexKey(const uint8_t* body, const uint8_t* scales, float* key) const;
  // Up to so many rows of a sequence load the window for themselves when they attend, from a ring that must still hold
  // all of it then: with a batch of sequences, keys widened ahead would leave the cache before they are read.
  static constexpr int64_t kRowsAlone = 2;
  static_assert(kRowsAlone <= kSpeculativeSlots);
  // SparseAttention on keys of one form.
  template <typename Keys>
  void Attend(int layer, const Pass& pass, const float* q, int heads, const float* sink, const WindowKeys& window,
              const Keys& window_keys, const Selection& selection, RopeRows rope, float* out);
  void ScoreCodes(const SequenceRows& s, int layer, int64_t r0, int64_t rows, int64_t n_max, int heads, float* scores,
                  int64_t ld);
  void ScoreFloats(const SequenceRows& s, int layer, const float* q, int64_t r0, int64_t rows, int64_t n_max, int heads,
                   float* scores, int64_t ld);
  void StreamScales(const float* streams, const HyperConnectionWeights& w, int64_t rows);

  const ModelConfig& config_;
  const CacheLayout& layout_;
  const Rounding rounding_;
  ThreadPool& pool_;
  const bool tiles_;                   // attention runs on AMX tiles: everything it multiplies is a BF16 value
  std::vector<float> codes_, scales_;  // quantised activations of Linear
  std::vector<uint16_t> plain_bits_, quantised_bits_;  // its inputs as tiles want them
  std::vector<float> mixes_;                           // [T, (2 + hc) hc] of the mHC product
  std::vector<float> gate_logits_;
  // Indexer: queries as codes, weights, and the keys of one block.
  std::vector<IndexRow> index_queries_;
  std::vector<float> index_weights_, index_row_scores_, index_keys_;
  std::vector<IndexKeyTile> index_tiles_;
};

}  // namespace millrace
