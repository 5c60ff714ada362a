// SPDX-License-Identifier: Apache-2.0
// See cache_extents.h.
#include "services/common/cache_extents.h"

namespace millrace {

kvtransfer::Memory ToMemory(const CacheExtent& extent, DeviceKind device) {
  return {extent.data, static_cast<size_t>(extent.bytes),
          device == DeviceKind::kCuda ? kvtransfer::MemoryKind::kDevice : kvtransfer::MemoryKind::kHost};
}

std::vector<kvtransfer::ExpectedExtent> ToExpectedExtents(absl::Span<const CacheExtent> extents, DeviceKind device) {
  std::vector<kvtransfer::ExpectedExtent> expected;
  expected.reserve(extents.size());
  for (const CacheExtent& extent : extents) {
    expected.push_back({static_cast<uint64_t>(extent.index), ToMemory(extent, device)});
  }
  return expected;
}

}  // namespace millrace
