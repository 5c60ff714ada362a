// SPDX-License-Identifier: Apache-2.0
// Every operation of the forward pass once, cut at launch granularity: the page to read before any kernel.
//
// The model (engine/model) calls these in order; CpuOps and the CUDA backend implement them. Shapes are row-major; T is
// the number of rows of the pass and may be 0; all activations are F32 storage here, holding BF16 values wherever the
// numerics round (engine/numerics.h). Outputs never alias inputs unless said. No operation looks at another row except
// through the cache of its own sequence, so a row's bits depend on its sequence only.
// Source of every formula: docs/model.md. Thread: engine thread. Shapes are CHECKed, inputs are trusted.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "absl/types/span.h"
#include "engine/cache/cache_layout.h"
#include "engine/ops/attention_keys.h"
#include "engine/ops/packed_linear.h"

namespace millrace {

// A table of rows kept as stored: BF16 bits or F32.
struct HostRows {
  Buffer<uint16_t> bf16;  // exactly one of the two is filled
  Buffer<float> f32;
  int64_t dim = 0;
};

// RoPE of one layer kind: inverse frequencies of the 32 pairs.
struct RopeFrequencies {
  float f[32] = {};
};

// cos and sin of every row of the pass, F32 [T, 32].
struct RopeRows {
  const float* cos = nullptr;
  const float* sin = nullptr;
};

// The rows of one sequence in a pass, and where its state lies.
struct SequenceRows {
  int64_t row = 0;    // first row in the pass
  int64_t count = 0;  // rows
  int64_t start = 0;  // position of the first row
  uint8_t* slot = nullptr;
  const std::vector<uint8_t*>* pages = nullptr;  // base of page p (tokens 128p ...)
};

struct Pass {
  absl::Span<const SequenceRows> sequences;
  int64_t num_rows = 0;
  const int64_t* positions = nullptr;  // [T]
  const int32_t* token_ids = nullptr;  // [T]
};

struct HyperConnectionWeights {
  PackedLinear fn;           // F32 [(2 + hc) * hc, hc * D], or [hc, hc * D] for the head
  std::vector<float> base;   // [(2 + hc) * hc] or [hc]
  std::vector<float> scale;  // [3] or [1]
};

struct CompressorWeights {
  PackedLinear wkv, wgate;  // BF16 or F32, products in FP32
  std::vector<float> ape;   // [ratio, width]
  std::vector<float> norm;  // [head]
};

// Keys of the window that the rows of a pass may see: per sequence the old entries still visible to its first row,
// then its own rows; values of the stored entries, in the form that attention reads. Keys of sequences with few rows
// may be left where they are stored.
struct WindowKeys {
  static constexpr int64_t kInSlot = -1;
  int slot_layer = 0;  // whose window this is
  RowKeys rows;        // [sum over sequences of (old + count)], or `tiles` in their place
  TileKeys tiles;
  std::vector<int64_t> first;  // per sequence: index of the key of position `first_position`, or kInSlot
  std::vector<int64_t> first_position;
};

// Compressed entries each row attends to, ascending.
struct Selection {
  bool all = false;             // every visible entry; `entries` is unused
  std::vector<int64_t> offset;  // [T + 1] into entries
  std::vector<int32_t> entries;
};

// Whether every row of a pass sees so few entries that none is left out: then there is nothing to score.
inline bool SelectsAll(const Pass& pass, int topk) {
  for (const SequenceRows& s : pass.sequences) {
    if ((s.start + s.count) / 4 > topk) return false;
  }
  return true;
}

// One weight and where its product goes, for linears that share an input.
struct LinearCall {
  const PackedLinear* weight = nullptr;
  float* out = nullptr;
  bool round = true;           // round the output to BF16 where the numerics do (FP32 linears do not)
  int64_t out_ld = 0;          // floats from one row of `out` to the next; 0: the weight's outputs, without a gap
  bool quantise_input = true;  // an FP8 or FP4 weight quantises its input; wo_a, stored as FP8, is a BF16 product
};

class Ops {
 public:
  virtual ~Ops() = default;

  // table F32 or BF16 rows; streams [T, hc, D]: hc copies of the token's row.
  virtual void Embed(const HostRows& table, const int32_t* ids, int64_t rows, int hc, float* streams) = 0;

  // mHC before a sublayer: streams [T, hc, D] -> u [T, D] = RMSNorm(sum_j pre_j X_j) with `norm` [D]; post [T, hc];
  // comb [T, hc, hc] (source, destination), after Sinkhorn.
  virtual void HyperConnectionPre(const float* streams, const HyperConnectionWeights& w, const float* norm,
                                  int64_t rows, float* u, float* post, float* comb) = 0;
  // streams[k] = post[k] * out + sum_j comb[j][k] * streams[j], in place.
  virtual void HyperConnectionPost(const float* out, const float* post, const float* comb, int64_t rows,
                                   float* streams) = 0;
  // The last mix, no Sinkhorn: z [T, D] = RMSNorm(sum_j p_j X_j).
  virtual void HyperHead(const float* streams, const HyperConnectionWeights& w, const float* norm, int64_t rows,
                         float* z) = 0;

  // Products of one input x [T, ld >= K] with several weights; the input is quantised once if a weight asks for it.
  virtual void Linear(const float* x, int64_t ld, int64_t rows, std::initializer_list<LinearCall> calls) = 0;

  // out [T, dim] = RMSNorm(x) * weight; may alias. weight null: unweighted.
  virtual void RmsNorm(const float* x, const float* weight, int64_t rows, int64_t dim, float* out) = 0;

  virtual void PrepareRope(const RopeFrequencies& f, const int64_t* positions, int64_t rows, float* cos,
                           float* sin) = 0;

  // q [T, heads, 512] in place: per-head RMSNorm without weight, then RoPE of the last 64 dims.
  virtual void QueryNormRope(float* q, int heads, RopeRows rope, int64_t rows) = 0;

  // kv [T, 512] (output of wkv) -> norm, RoPE, FP8 simulation; fills `window` with the old and new keys and writes the
  // newest into each sequence's ring. Must come before the layer's attention and only once per layer and pass.
  virtual void WindowAppend(int slot_layer, const Pass& pass, const float* kv, const float* norm, RopeRows rope,
                            WindowKeys& window) = 0;

  // Pooling of CSA: kv and score [T, 1024] main, [T, 256] index (scores without ape). Updates pending rows and writes
  // every entry and index key that these rows complete.
  virtual void CompressCsa(int layer, const Pass& pass, const float* kv, const float* score, const float* index_kv,
                           const float* index_score, const CompressorWeights& main, const CompressorWeights& index,
                           const RopeFrequencies& f) = 0;
  // Pooling of HCA, online per channel: kv and score [T, 512].
  virtual void CompressHca(int layer, const Pass& pass, const float* kv, const float* score, const CompressorWeights& w,
                           const RopeFrequencies& f) = 0;

  // Lightning indexer, for a pass that does not select all: q [T, heads, 128] (output of wq_b, overwritten), weights
  // [T, heads] (output of weights_proj).
  virtual void IndexSelect(int layer, const Pass& pass, float* q, const float* weights, int heads, int topk,
                           RopeRows rope, Selection& selection) = 0;

  // Window, then entries, one softmax with the sink. q [T, heads, 512] -> out [T, heads, 512], inverse RoPE applied.
  // `layer` -1: window only (and `selection` is ignored).
  virtual void SparseAttention(int layer, const Pass& pass, const float* q, int heads, const float* sink,
                               const WindowKeys& window, const Selection& selection, RopeRows rope, float* out) = 0;

  // Scores sqrt(softplus(u · Wᵀ)); experts [T, k] ascending and their weights [T, k]. Either bias (selection) or a
  // table tid2eid [V, k] is given.
  virtual void Gate(const float* u, const PackedLinear& w, const float* bias, const int32_t* tid2eid,
                    const int32_t* ids, int64_t rows, int k, float route_scale, int32_t* experts, float* weights) = 0;

  // a = silu(min(g, limit)) * clamp(p, ±limit) * (weight of the row or 1); g, p, a [T, I]; a may alias g.
  virtual void SwiGlu(const float* g, const float* p, const float* weights, int64_t rows, int64_t width, float limit,
                      float* a) = 0;

  // out [T, D] = sum over k in order of expert_rows [T, k, D], then shared [T, D].
  virtual void CombineExperts(const float* expert_rows, const float* shared, int64_t rows, int k, int64_t dim,
                              float* out) = 0;
};

}  // namespace millrace
