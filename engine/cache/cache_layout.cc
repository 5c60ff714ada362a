// SPDX-License-Identifier: Apache-2.0
// Sums up what cache_layout.h describes. Every offset is 64-bit: one page of Pro is 0.6 MB and a million tokens have
// 8,192 of them.
#include "engine/cache/cache_layout.h"

#include <xxhash.h>

#include "absl/strings/str_cat.h"
#include "engine/round_up.h"
#include "engine/status.h"

namespace millrace {
namespace {

// Pieces of about equal bytes, at least `kMinRangeBytes` each: finer ones cost more per message than they hide.
constexpr int64_t kMinRangeBytes = 256 << 10;

std::vector<int> CutLayers(const std::vector<PageLayerLayout>& layers, int64_t page_bytes) {
  const int num_layers = static_cast<int>(layers.size());
  int pieces = static_cast<int>(page_bytes / kMinRangeBytes);
  pieces = pieces < 1 ? 1 : pieces > 4 ? 4 : pieces;
  std::vector<int> cuts = {0};
  for (int p = 1; p < pieces; ++p) {
    int layer = cuts.back() + 1;
    while (layer < num_layers && layers[layer].begin < page_bytes * p / pieces) ++layer;
    if (layer < num_layers) cuts.push_back(layer);
  }
  cuts.push_back(num_layers);
  return cuts;
}

}  // namespace

CacheLayout CacheLayout::Make(const ModelConfig& config, Numerics numerics, bool mtp) {
  CacheLayout l;
  l.numerics = numerics;
  l.mtp = mtp;
  l.window = config.sliding_window;
  l.window_slots = config.sliding_window + kSpeculativeSlots;
  const bool release = numerics == Numerics::kRelease;
  const int head = config.head_dim, rope = config.rope_head_dim, index_dim = config.index_head_dim;
  if (release) {
    l.entry = {(head - rope) + 2 * rope, 8};  // 448 E4M3, 64 BF16; 7 scales and a pad
    l.index_key = {index_dim / 2, index_dim / 32};
  } else {
    l.entry = {4 * head, 0};
    l.index_key = {4 * index_dim, 0};
  }

  int64_t at = 0;
  for (LayerKind kind : config.layer_kinds) {
    PageLayerLayout p;
    p.kind = kind;
    p.begin = at = RoundUp(at, 128);
    p.entries = kind == LayerKind::kCsa ? kCsaEntriesPerPage : kind == LayerKind::kHca ? 1 : 0;
    p.bodies = at;
    at += static_cast<int64_t>(p.entries) * l.entry.body_bytes;
    p.scales = at;
    at += static_cast<int64_t>(p.entries) * l.entry.scale_bytes;
    l.page_payload_bytes += static_cast<int64_t>(p.entries) * (l.entry.body_bytes + l.entry.scale_bytes);
    if (kind == LayerKind::kCsa) {
      p.index_bodies = at;
      at += static_cast<int64_t>(p.entries) * l.index_key.body_bytes;
      p.index_scales = at;
      at += static_cast<int64_t>(p.entries) * l.index_key.scale_bytes;
      l.page_payload_bytes += static_cast<int64_t>(p.entries) * (l.index_key.body_bytes + l.index_key.scale_bytes);
    }
    p.end = at;
    l.page_layers.push_back(p);
  }
  l.page_bytes = RoundUp(at, 128);
  if (l.page_bytes == 0) l.page_bytes = 128;  // a window-only model still counts tokens in pages
  l.layer_ranges = CutLayers(l.page_layers, l.page_bytes);

  at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t offset = at = RoundUp(at, 128);
    at += bytes;
    return offset;
  };
  const int slot_layers = config.num_hidden_layers + (mtp ? 1 : 0);
  for (int n = 0; n < slot_layers; ++n) {
    const LayerKind kind = n < config.num_hidden_layers ? config.layer_kinds[n] : LayerKind::kWindow;
    SlotLayerLayout s;
    s.window_bodies = take(static_cast<int64_t>(l.window_slots) * l.entry.body_bytes);
    s.window_scales = take(static_cast<int64_t>(l.window_slots) * l.entry.scale_bytes);
    if (kind == LayerKind::kCsa) {
      s.csa_prev = take(2 * 4 * head * 4);
      s.csa_cur = take(2 * 4 * 2 * head * 4);
      s.index_prev = take(2 * 4 * index_dim * 4);
      s.index_cur = take(2 * 4 * 2 * index_dim * 4);
    } else if (kind == LayerKind::kHca) {
      s.hca_state = take(3 * head * 4);
    }
    l.slot_layers.push_back(s);
  }
  l.last_streams = take(static_cast<int64_t>(config.hc_mult) * config.hidden_size * (release ? 2 : 4));
  l.slot_bytes = RoundUp(at, 128);
  return l;
}

std::string CacheLayout::Id() const {
  std::string text = absl::StrCat("v1;", NumericsName(numerics), ";", entry.body_bytes, ",", entry.scale_bytes, ";",
                                  index_key.body_bytes, ",", index_key.scale_bytes, ";", window, ",", window_slots, ";",
                                  page_bytes, ";", slot_bytes, ";", last_streams, ";", mtp);
  for (const PageLayerLayout& p : page_layers) absl::StrAppend(&text, ";", p.begin, "-", p.end, "x", p.entries);
  for (int cut : layer_ranges) absl::StrAppend(&text, "/", cut);
  return absl::StrCat(absl::Hex(XXH3_64bits(text.data(), text.size()), absl::kZeroPad16));
}

}  // namespace millrace
