// SPDX-License-Identifier: Apache-2.0
// Digests that say not only which bytes, but whose and where.
//
// A digest of the bytes alone would call a swapped block right. So the content's digest (XXH3-64, or what
// MemoryFunctions gives) is bound to lease, epoch, extent and length by a second hash. This finds accidents of every
// kind; it is no defence against a forger, which is what the authenticated control plane is for.
#pragma once

#include <cstdint>

#include "absl/strings/string_view.h"
#include "kvtransfer/memory.h"

namespace millrace::kvtransfer {

// How content digests are made. Zero is "none" and always refused.
enum DigestAlgorithm : uint32_t { kDigestNone = 0, kDigestXxh3 = 1, kDigestDevice = 2 };

// One hand-off: a lease as named by its grantor, and its epoch, which grows when the same lease is begun again.
struct LeaseKey {
  uint64_t lease = 0;
  uint64_t epoch = 0;
  friend bool operator==(const LeaseKey& a, const LeaseKey& b) { return a.lease == b.lease && a.epoch == b.epoch; }
  template <typename H>
  friend H AbslHashValue(H h, const LeaseKey& k) {
    return H::combine(std::move(h), k.lease, k.epoch);
  }
};

// XXH3-64 of host bytes.
uint64_t ContentDigest(const void* data, size_t bytes);
inline uint64_t ContentDigest(absl::string_view bytes) { return ContentDigest(bytes.data(), bytes.size()); }

// The content's digest bound to its place.
uint64_t BindDigest(uint64_t content_digest, LeaseKey key, uint64_t extent_id, uint64_t bytes);

}  // namespace millrace::kvtransfer
