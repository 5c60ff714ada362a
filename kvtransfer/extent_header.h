// SPDX-License-Identifier: Apache-2.0
// The header of a hand-off message, shared by sender.cc and receiver.cc. Internal to kvtransfer.
//
// Single: the payload is one extent. Packed: the payload is a table of PackedEntry followed by the extents' bytes in
// the table's order. The header carries a digest of itself, so a damaged header is recognised as such and not mistaken
// for another lease's message.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>

#include "absl/types/span.h"
#include "kvtransfer/digest.h"

namespace millrace::kvtransfer::internal {

struct ExtentHeader {
  static constexpr uint32_t kMagic = 0x5458524d;  // "MRXT"
  static constexpr uint16_t kVersion = 1;
  enum Form : uint16_t { kSingle = 1, kPacked = 2 };

  uint32_t magic = kMagic;
  uint16_t version = kVersion;
  uint16_t form = kSingle;
  uint32_t digest_algorithm = 0;
  uint32_t num_extents = 1;
  uint64_t lease = 0;
  uint64_t epoch = 0;
  uint64_t extent_id = 0;  // single: the extent; packed: 0
  uint64_t bytes = 0;      // of the payload
  uint64_t digest = 0;     // single: bound digest of the extent; packed: content digest of the table
  uint64_t self = 0;       // content digest of everything above

  LeaseKey key() const { return {lease, epoch}; }
  void Seal() { self = ContentDigest(this, offsetof(ExtentHeader, self)); }
};
static_assert(sizeof(ExtentHeader) == 64);

struct PackedEntry {
  uint64_t extent_id = 0;
  uint64_t bytes = 0;
  uint64_t digest = 0;  // bound
};
static_assert(sizeof(PackedEntry) == 24);

inline std::optional<ExtentHeader> ParseExtentHeader(absl::Span<const uint8_t> bytes) {
  ExtentHeader header;
  if (bytes.size() != sizeof(header)) return std::nullopt;
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.magic != ExtentHeader::kMagic || header.version != ExtentHeader::kVersion) return std::nullopt;
  if (header.self != ContentDigest(&header, offsetof(ExtentHeader, self))) return std::nullopt;
  return header;
}

}  // namespace millrace::kvtransfer::internal
