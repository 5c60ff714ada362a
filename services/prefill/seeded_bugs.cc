// SPDX-License-Identifier: Apache-2.0
// See seeded_bugs.h.
#include "services/prefill/seeded_bugs.h"

#include <algorithm>
#include <cstring>

#include "services/common/failpoints.h"

namespace millrace::prefill {
namespace {

std::vector<uint8_t>& CopyOf(Prompt& prompt, kvtransfer::ConstMemory truth) {
  const auto* bytes = static_cast<const uint8_t*>(truth.data);
  return prompt.altered.emplace_back(bytes, bytes + truth.bytes);
}

// The unfinished compression blocks of every layer, forgotten: all zero, as in a fresh slot.
void DropFrontier(std::vector<uint8_t>& slot, const CacheLayout& layout) {
  for (const SlotLayerLayout& layer : layout.slot_layers) {
    const auto zero = [&slot](int64_t begin, int64_t bytes) {
      if (begin > 0 && begin + bytes <= static_cast<int64_t>(slot.size())) std::memset(slot.data() + begin, 0, bytes);
    };
    zero(layer.csa_prev, int64_t{4} * 2 * 4 * 512);
    zero(layer.csa_cur, int64_t{4} * 2 * 4 * 1024);
    zero(layer.index_prev, int64_t{4} * 2 * 4 * 128);
    zero(layer.index_cur, int64_t{4} * 2 * 4 * 256);
    zero(layer.hca_state, int64_t{4} * 3 * 512);
  }
}

// Every CSA layer's entries moved by one: the second entry where the first belongs.
void ShiftRows(std::vector<uint8_t>& page, const CacheLayout& layout, int64_t page_offset) {
  for (const PageLayerLayout& layer : layout.page_layers) {
    if (layer.entries < 2) continue;
    const int64_t row = layout.entry.body_bytes;
    const int64_t begin = layer.bodies - page_offset, bytes = row * layer.entries;
    if (begin < 0 || begin + bytes > static_cast<int64_t>(page.size())) continue;
    std::memmove(page.data() + begin, page.data() + begin + row, static_cast<size_t>(bytes - row));
  }
}

}  // namespace

kvtransfer::ConstMemory SeededBugSource(Prompt& prompt, const CacheExtent& extent, const CacheLayout& layout,
                                        kvtransfer::ConstMemory truth) {
  if (truth.kind != kvtransfer::MemoryKind::kHost) return truth;
  if (extent.page < 0) {
    if (!failpoints::Bug("bug.drop_frontier")) return truth;
    std::vector<uint8_t>& copy = CopyOf(prompt, truth);
    DropFrontier(copy, layout);
    return {copy.data(), copy.size()};
  }
  if (failpoints::Bug("bug.off_by_one_row")) {
    int64_t offset = 0;
    for (const PageLayerLayout& layer : layout.page_layers) {
      if (&layer - layout.page_layers.data() == extent.layer_begin) offset = layer.begin;
    }
    std::vector<uint8_t>& copy = CopyOf(prompt, truth);
    ShiftRows(copy, layout, offset);
    return {copy.data(), copy.size()};
  }
  if (extent.page < 2 && failpoints::Bug("bug.swap_two_blocks")) {
    // The same layers of the other of the first two pages, if there is one.
    for (const CacheExtent& other : prompt.extents) {
      if (other.page == 1 - extent.page && other.layer_begin == extent.layer_begin && other.bytes == extent.bytes) {
        return {other.data, static_cast<size_t>(other.bytes)};
      }
    }
  }
  return truth;
}

}  // namespace millrace::prefill
