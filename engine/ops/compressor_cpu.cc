// SPDX-License-Identifier: Apache-2.0
// Window and compressed KV on the CPU: what is stored for a token, and how tokens are pooled into entries.
//
// Everything here touches cache memory of one sequence at a time, in position order; storing a value and loading it
// again gives the same F32 value, so decode reads what prefill computed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/ops/attention_amx.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/matmul_amx.h"
#include "engine/ops/rounding.h"
#include "engine/ops/vector_cpu.h"

namespace millrace {
namespace {

// Exponent of the scale of one FP4 group of 32.
int Fp4GroupExponent(const float* x) {
  float amax = 0;
  for (int i = 0; i < 32; ++i) amax = std::max(amax, std::abs(x[i]));
  return Fp4Scale(amax);
}

}  // namespace

void CpuOps::SimulateKv(float* entry) const {
  if (!rounding_.kv_quant) return;
  const int64_t plain = config_.head_dim - config_.rope_head_dim;
  float scales[16];
  QuantiseActivations(entry, plain, 64, entry, scales);
  for (int64_t i = 0; i < plain; i += 64)
    vec::Scale(entry + i, scales[i / 64], std::min<int64_t>(64, plain - i), entry + i);
}

void CpuOps::SimulateIndex(float* x) const {
  if (!rounding_.index_fp4) return;
  IndexRow row;
  QuantiseIndex(x, row);
  for (int i = 0; i < kIndexDim; ++i) x[i] = 0.5f * static_cast<float>(row.twice[i]) * row.scales[i / 32];
}

void CpuOps::StoreEntry(const float* entry, const Stored& place) const {
  uint8_t *body = place.body, *scales = place.scales;
  if (layout_.numerics == Numerics::kExact) {
    std::memcpy(body, entry, layout_.entry.body_bytes);
    return;
  }
  const int plain = config_.head_dim - config_.rope_head_dim;
  float codes[512], factors[8];
  QuantiseActivations(entry, plain, 64, codes, factors);
  vec::EncodeE4m3Values(codes, plain, body);
  for (int g = 0; g < plain / 64; ++g) scales[g] = static_cast<uint8_t>(std::bit_cast<uint32_t>(factors[g]) >> 23);
  for (int i = 0; i < config_.rope_head_dim; ++i) {
    const uint16_t bits = EncodeBf16(entry[plain + i]);
    std::memcpy(body + plain + 2 * i, &bits, 2);
  }
  scales[plain / 64] = 0;
}

void CpuOps::LoadEntry(const Stored& stored, RowKeys& keys, int64_t i) const {
  if (layout_.numerics == Numerics::kExact) {
    std::memcpy(keys.at(i), stored.body, layout_.entry.body_bytes);
    return;
  }
  vec::LoadKvEntry(stored.body, stored.scales, config_.head_dim - config_.rope_head_dim, config_.rope_head_dim,
                   keys.at(i));
}

void CpuOps::LoadEntry(const Stored& stored, TileKeys& keys, int64_t i) const {
  LoadKvEntryBf16(stored.body, stored.scales, config_.head_dim - config_.rope_head_dim, config_.rope_head_dim,
                  keys.at(i), keys.step());
}

void CpuOps::PutKey(const float* key, RowKeys& keys, int64_t i) const {
  std::copy_n(key, config_.head_dim, keys.at(i));
}

void CpuOps::PutKey(const float* key, TileKeys& keys, int64_t i) const {
  for (int b = 0; b < config_.head_dim / TileKeys::kDims; ++b) {
    const float* block = key + b * TileKeys::kDims;
    NarrowRows({block, TileKeys::kDims}, 1, TileKeys::kDims, keys.at(i) + b * keys.step());
  }
}

void CpuOps::StoreIndexKey(const float* key, uint8_t* body, uint8_t* scales) const {
  if (layout_.numerics == Numerics::kExact) {
    std::memcpy(body, key, layout_.index_key.body_bytes);
    return;
  }
  for (int g = 0; g < 4; ++g) {
    const int exponent = Fp4GroupExponent(key + g * 32);
    const float inverse = PowerOfTwo(-exponent);
    for (int i = g * 32; i < g * 32 + 32; i += 2) {
      body[i / 2] = static_cast<uint8_t>(EncodeE2m1(key[i] * inverse) | EncodeE2m1(key[i + 1] * inverse) << 4);
    }
    scales[g] = EncodeE8m0(exponent);
  }
}

void CpuOps::LoadIndexKey(const uint8_t* body, const uint8_t* scales, float* key) const {
  if (layout_.numerics == Numerics::kExact) {
    std::memcpy(key, body, layout_.index_key.body_bytes);
    return;
  }
  for (int g = 0; g < 4; ++g) {
    const float scale = DecodeE8m0(scales[g]);
    for (int i = g * 16; i < g * 16 + 16; ++i) {
      key[2 * i] = DecodeE2m1(body[i]) * scale;
      key[2 * i + 1] = DecodeE2m1(body[i] >> 4) * scale;
    }
  }
}

void CpuOps::WindowAppend(int slot_layer, const Pass& pass, const float* kv, const float* norm, RopeRows rope,
                          WindowKeys& window) {
  const int64_t dim = config_.head_dim;
  window.slot_layer = slot_layer;
  window.first.clear();
  window.first_position.clear();
  int64_t total = 0;
  for (const SequenceRows& s : pass.sequences) {
    const int64_t old = std::min<int64_t>(s.start, layout_.window - 1);
    const bool kept = s.count > kRowsAlone;
    window.first.push_back(kept ? total : WindowKeys::kInSlot);
    window.first_position.push_back(s.start - old);
    if (kept) total += old + s.count;
  }
  if (tiles_) {
    window.tiles.Reserve(total, dim);
  } else {
    window.rows.Reserve(total, dim);
  }
  pool_.For(static_cast<int64_t>(pass.sequences.size()), [&](int64_t i) {
    const SequenceRows& s = pass.sequences[i];
    const bool kept = window.first[i] != WindowKeys::kInSlot;
    const auto append = [&](auto& keys) {
      int64_t at = window.first[i];
      for (int64_t p = window.first_position[i]; kept && p < s.start; ++p) {
        LoadEntry(WindowPlace(s, slot_layer, p), keys, at++);
      }
      for (int64_t r = 0; r < s.count; ++r) {
        float key[512];
        NormRow(kv + (s.row + r) * dim, norm, dim, key);
        RotateRow(key, dim, rope.cos + (s.row + r) * 32, rope.sin + (s.row + r) * 32, 1);
        SimulateKv(key);
        if (s.count - r <= layout_.window_slots) StoreEntry(key, WindowPlace(s, slot_layer, s.start + r));
        if (kept) PutKey(key, keys, at++);
      }
    };
    if (tiles_) {
      append(window.tiles);
    } else {
      append(window.rows);
    }
  });
}

void CpuOps::FinishEntry(float* e, int64_t dim, const CompressorWeights& w, int64_t position,
                         const RopeFrequencies& f) const {
  if (rounding_.compressed_entry) vec::RoundBf16(e, dim);
  NormRow(e, w.norm.data(), dim, e);
  float cos[32], sin[32];
  for (int i = 0; i < 32; ++i) {
    const double angle = static_cast<float>(position) * f.f[i];
    cos[i] = static_cast<float>(std::cos(angle));
    sin[i] = static_cast<float>(std::sin(angle));
  }
  RotateRow(e, dim, cos, sin, 1);
}

void CpuOps::CompressCsa(int layer, const Pass& pass, const float* kv, const float* score, const float* index_kv,
                         const float* index_score, const CompressorWeights& main, const CompressorWeights& index,
                         const RopeFrequencies& f) {
  const PageLayerLayout& page_layout = layout_.page_layers[layer];
  const SlotLayerLayout& slot_layout = layout_.slot_layers[layer];

  // Takes one row into the pending block; at the block's last row pools it with the previous block's first halves.
  const auto pool_row = [](float* prev, float* cur, int64_t dim, int64_t position, const float* row_kv,
                           const float* row_score, const std::vector<float>& ape, float* entry) {
    const int64_t width = 2 * dim, r = position % 4;
    float* cur_kv = cur + r * width;
    float* cur_score = cur + 4 * width + r * width;
    std::copy_n(row_kv, width, cur_kv);
    for (int64_t c = 0; c < width; ++c) cur_score[c] = row_score[c] + ape[r * width + c];
    if (r != 3) return false;
    const float *scores[8], *values[8];
    int rows = 0;
    for (int j = 0; j < 4 && position > 3; ++j, ++rows) {  // block 0 has no previous block
      values[rows] = prev + j * dim;
      scores[rows] = prev + 4 * dim + j * dim;
    }
    for (int j = 0; j < 4; ++j, ++rows) {
      values[rows] = cur + j * width + dim;
      scores[rows] = cur + 4 * width + j * width + dim;
    }
    vec::PoolRows(scores, values, rows, dim, entry);
    for (int j = 0; j < 4; ++j) {
      std::copy_n(cur + j * width, dim, prev + j * dim);
      std::copy_n(cur + 4 * width + j * width, dim, prev + 4 * dim + j * dim);
    }
    return true;
  };

  pool_.For(static_cast<int64_t>(pass.sequences.size()), [&](int64_t i) {
    const SequenceRows& s = pass.sequences[i];
    const int64_t dim = config_.head_dim, index_dim = config_.index_head_dim;
    const auto state = [&](int64_t offset) { return reinterpret_cast<float*>(s.slot + offset); };
    float entry[512], key[128];
    for (int64_t r = 0; r < s.count; ++r) {
      const int64_t position = s.start + r, row = s.row + r;
      const bool complete = pool_row(state(slot_layout.csa_prev), state(slot_layout.csa_cur), dim, position,
                                     kv + row * 2 * dim, score + row * 2 * dim, main.ape, entry);
      pool_row(state(slot_layout.index_prev), state(slot_layout.index_cur), index_dim, position,
               index_kv + row * 2 * index_dim, index_score + row * 2 * index_dim, index.ape, key);
      if (!complete) continue;
      const int64_t n = position / 4, in_page = n % kCsaEntriesPerPage;
      uint8_t* page = (*s.pages)[n / kCsaEntriesPerPage];
      FinishEntry(entry, dim, main, n * 4, f);
      SimulateKv(entry);
      StoreEntry(entry, EntryPlace(s, layer, n));
      FinishEntry(key, index_dim, index, n * 4, f);
      SimulateIndex(key);
      StoreIndexKey(key, page + page_layout.index_bodies + in_page * layout_.index_key.body_bytes,
                    page + page_layout.index_scales + in_page * layout_.index_key.scale_bytes);
    }
  });
}

void CpuOps::CompressHca(int layer, const Pass& pass, const float* kv, const float* score, const CompressorWeights& w,
                         const RopeFrequencies& f) {
  const int64_t dim = config_.head_dim;
  pool_.For(static_cast<int64_t>(pass.sequences.size()), [&](int64_t i) {
    const SequenceRows& s = pass.sequences[i];
    float* max = reinterpret_cast<float*>(s.slot + layout_.slot_layers[layer].hca_state);
    float* sum = max + dim;
    float* weighted = sum + dim;
    float with_ape[512], entry[512];
    for (int64_t r = 0; r < s.count; ++r) {
      const int64_t position = s.start + r, row = s.row + r, in_block = position % 128;
      if (in_block == 0) {
        std::fill_n(max, dim, -std::numeric_limits<float>::infinity());
        std::fill_n(sum, 2 * dim, 0.0f);
      }
      for (int64_t c = 0; c < dim; ++c) with_ape[c] = score[row * dim + c] + w.ape[in_block * dim + c];
      vec::OnlineSoftmaxStep(with_ape, kv + row * dim, dim, max, sum, weighted);
      if (in_block != 127) continue;
      for (int64_t c = 0; c < dim; ++c) entry[c] = weighted[c] / sum[c];
      const int64_t n = position / 128;
      FinishEntry(entry, dim, w, n * 128, f);
      SimulateKv(entry);
      StoreEntry(entry, EntryPlace(s, layer, n));
    }
  });
}

}  // namespace millrace
