// SPDX-License-Identifier: Apache-2.0
// See cache_extents.h.
#include "services/common/cache_extents.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "engine/device/device_copy.h"
#include "kvtransfer/digest.h"

namespace millrace {
namespace {

using kvtransfer::ConstMemory;
using kvtransfer::Memory;
using kvtransfer::MemoryKind;

absl::Status Copy(Memory to, ConstMemory from) {
  const auto bytes = static_cast<int64_t>(from.bytes);
  if (bytes == 0) return absl::OkStatus();
  const bool to_device = to.kind == MemoryKind::kDevice, from_device = from.kind == MemoryKind::kDevice;
  if (to_device && from_device) return CopyOnDevice(to.data, from.data, bytes);
  if (to_device) return CopyToDevice(to.data, from.data, bytes);
  if (from_device) return CopyFromDevice(to.data, from.data, bytes);
  std::memcpy(to.data, from.data, from.bytes);
  return absl::OkStatus();
}

void Digest(ConstMemory content, kvtransfer::DigestDone done) {
  if (content.kind == MemoryKind::kHost) return done(kvtransfer::ContentDigest(content.data, content.bytes));
  // Grown to the largest extent this thread has digested, tens of megabytes at most.
  thread_local std::vector<uint8_t> bytes;
  bytes.resize(std::max(bytes.size(), content.bytes));
  if (const absl::Status copied = Copy({bytes.data(), content.bytes}, content); !copied.ok()) return done(copied);
  done(kvtransfer::ContentDigest(bytes.data(), content.bytes));
}

}  // namespace

kvtransfer::MemoryFunctions CacheMemoryFunctions() { return {Copy, Digest, kvtransfer::kDigestXxh3, AttachDevice}; }

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
