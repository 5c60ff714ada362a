// SPDX-License-Identifier: Apache-2.0
// What a hand-off must contain: every extent with its length and digest, and the state that goes with them.
//
// The sender's last word. Extents say what has to lie in the receiver's memory; `metadata` is opaque here (token 0,
// sampler state, lengths) and is covered by the whole digest. Nothing is inferred: what the manifest does
// not say is not so. Receiver::Verify compares it with what was expected and with what arrived.
//
// Thread: none of its own; values and pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kvtransfer/digest.h"

namespace millrace::kvtransfer {

struct ManifestExtent {
  uint64_t extent_id = 0;  // opaque; unique in a manifest
  uint64_t bytes = 0;
  uint64_t digest = 0;  // bound, see BindDigest
  friend bool operator==(const ManifestExtent&, const ManifestExtent&) = default;
};

struct Manifest {
  LeaseKey key;
  uint32_t digest_algorithm = kDigestXxh3;
  std::vector<ManifestExtent> extents;  // ascending extent_id
  std::string metadata;
  uint64_t whole_digest = 0;  // over all of the above; Seal sets it
};

// Sorts the extents and sets whole_digest. Whoever fills a Manifest by hand calls this last.
void Seal(Manifest& manifest);
uint64_t WholeDigest(const Manifest& manifest);

// What a receiver is prepared to read. Checked before anything is allocated.
struct ManifestLimits {
  size_t max_extents = 1u << 20;
  size_t max_metadata_bytes = 4u << 20;
};

// Version 1: magic, version, algorithm, lease, epoch, counts, extents, metadata, whole digest; little endian.
std::string EncodeManifest(const Manifest& manifest);

// DataLoss: damaged (too short, trailing bytes, bad magic, digest wrong). InvalidArgument: well-formed but not to be
// believed (counts over limits, ids unsorted or repeated, digest algorithm none or unknown). FailedPrecondition:
// another version. Every message names the field, what was found and what was expected.
absl::StatusOr<Manifest> DecodeManifest(absl::string_view bytes, const ManifestLimits& limits = {});

// One extent that a receiver has set memory aside for.
struct ExpectedLength {
  uint64_t extent_id = 0;
  uint64_t bytes = 0;
};

// Whether the manifest is sound in itself and lists exactly the expected extents. `expected` ascends by extent_id.
// FailedPrecondition: another lease, or a stale epoch. InvalidArgument: an extent missing, unexpected, or of another
// length, an algorithm that we do not require. DataLoss: whole digest wrong. The first fault is named with its ids.
absl::Status CheckManifest(const Manifest& manifest, LeaseKey key, uint32_t digest_algorithm,
                           absl::Span<const ExpectedLength> expected);

}  // namespace millrace::kvtransfer
