// SPDX-License-Identifier: Apache-2.0
// The one place where the engine's cache extents become the transfer's.
//
// The engine numbers a sequence's extents in an order that depends only on (layout, tokens); that number is the extent
// id on the wire, so both sides speak of the same piece without an address. Thread: engine thread.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "engine/cache/cache_layout.h"
#include "engine/engine.h"
#include "kvtransfer/memory.h"
#include "kvtransfer/receiver.h"

namespace millrace {

kvtransfer::Memory ToMemory(const CacheExtent& extent, DeviceKind device);

// How kvtransfer copies and digests cache memory of either kind. Device memory passes through the host, so that both
// kinds have the same digest. Any thread.
kvtransfer::MemoryFunctions CacheMemoryFunctions();

// What a receiver expects for a sequence of some length.
std::vector<kvtransfer::ExpectedExtent> ToExpectedExtents(absl::Span<const CacheExtent> extents, DeviceKind device);

// Whether the state in this extent is final once its sequence holds `tokens` tokens and layers below `layers_done` are
// complete: a page that is full, in the layers that are done. The last page's rest and the slot change until the end.
inline bool FinalAfter(const CacheExtent& extent, int64_t tokens, int layers_done) {
  return extent.page >= 0 && (extent.page + 1) * int64_t{kPageTokens} <= tokens && extent.layer_end <= layers_done;
}

}  // namespace millrace
