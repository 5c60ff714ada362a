// SPDX-License-Identifier: Apache-2.0
// What a sequence's state is, in bytes: one page of 128 tokens, and one state slot.
//
// A page holds every compressed entry its 128 tokens produce, layers in order: 32 CSA entries and 32 index keys per CSA
// layer, one entry per HCA layer. Inside a layer's block (which starts on 128 bytes): all bodies, all scale rows, all
// index nibbles, all index scales. A slot holds what does not grow: windows, pending compressor state, the MTP window
// and the streams of the last token. Payload sizes equal docs/model.md, "Cache". It knows sizes and offsets, not
// pointers and not how many pages exist (cache_pool.h). Thread: immutable.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/model/config.h"
#include "engine/numerics.h"

namespace millrace {

inline constexpr int kPageTokens = 128;  // lcm of the two ratios
inline constexpr int kCsaEntriesPerPage = 32;
inline constexpr int kSpeculativeSlots = 8;  // window room beyond the visible entries

// One KV entry: `release` 448 E4M3 + 64 BF16 bytes and a row of 7 E8M0 scales + 1 pad; `exact` 512 F32 and no scales.
struct EntryFormat {
  int body_bytes = 0;
  int scale_bytes = 0;
};

struct PageLayerLayout {
  LayerKind kind = LayerKind::kWindow;
  int64_t begin = 0, end = 0;      // of the layer's block in the page, aligned to 128; empty for window layers
  int entries = 0;                 // 32, 1 or 0
  int64_t bodies = 0, scales = 0;  // offsets in the page
  int64_t index_bodies = 0, index_scales = 0;  // CSA only
};

struct SlotLayerLayout {
  int64_t window_bodies = 0, window_scales = 0;  // ring of window_slots entries, slot = position mod window_slots
  // CSA: previous block's first halves and the unfinished block's rows, F32: kv then score of each.
  int64_t csa_prev = 0;    // [2][4][512]
  int64_t csa_cur = 0;     // [2][4][1024]
  int64_t index_prev = 0;  // [2][4][128]
  int64_t index_cur = 0;   // [2][4][256]
  int64_t hca_state = 0;   // [3][512]: running max, sum, weighted sum
};

struct CacheLayout {
  static CacheLayout Make(const ModelConfig& config, Numerics numerics, bool mtp);

  Numerics numerics = Numerics::kRelease;
  EntryFormat entry, index_key;
  int window = 0;        // 128
  int window_slots = 0;  // window + kSpeculativeSlots
  int64_t page_bytes = 0;
  int64_t page_payload_bytes = 0;            // without alignment
  std::vector<PageLayerLayout> page_layers;  // [L]
  int64_t slot_bytes = 0;
  std::vector<SlotLayerLayout> slot_layers;  // [L], plus one for MTP if kept
  int64_t last_streams = 0;                  // offset of X of the last token: [hc, D], BF16 or F32
  bool mtp = false;
  // Pieces a page is cut into for sending: boundaries in layers, e.g. {0, L} for one piece.
  std::vector<int> layer_ranges;
  // Short hash of everything above: part of the compatibility hash.
  std::string Id() const;
};

}  // namespace millrace
