// SPDX-License-Identifier: Apache-2.0
// Encoding, strict decoding and checking of manifests; the contract is in manifest.h.
//
// Wire format, little endian, no padding:
//   u32 magic "MRMF", u32 version, u32 digest algorithm, u64 lease, u64 epoch, u64 extents, u64 metadata bytes,
//   extents x {u64 id, u64 bytes, u64 digest}, metadata, u64 whole digest.
// The whole digest is taken over everything before it, so one flipped bit anywhere is found.
#include "kvtransfer/manifest.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "kvtransfer/status.h"

namespace millrace::kvtransfer {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire is little endian and so are all our machines");

constexpr uint32_t kMagic = 0x464d524d;  // "MRMF"
constexpr uint32_t kVersion = 1;
constexpr size_t kFixedBytes = 3 * sizeof(uint32_t) + 4 * sizeof(uint64_t);
constexpr size_t kExtentBytes = 3 * sizeof(uint64_t);
constexpr size_t kDigestBytes = sizeof(uint64_t);

template <typename T>
void Append(std::string& out, T value) {
  static_assert(std::is_unsigned_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

template <typename T>
T Take(absl::string_view& in) {
  T value;
  std::memcpy(&value, in.data(), sizeof(value));
  in.remove_prefix(sizeof(value));
  return value;
}

std::string EncodeBody(const Manifest& manifest) {
  std::string out;
  out.reserve(kFixedBytes + manifest.extents.size() * kExtentBytes + manifest.metadata.size() + kDigestBytes);
  Append(out, kMagic);
  Append(out, kVersion);
  Append(out, manifest.digest_algorithm);
  Append(out, manifest.key.lease);
  Append(out, manifest.key.epoch);
  Append<uint64_t>(out, manifest.extents.size());
  Append<uint64_t>(out, manifest.metadata.size());
  for (const ManifestExtent& extent : manifest.extents) {
    Append(out, extent.extent_id);
    Append(out, extent.bytes);
    Append(out, extent.digest);
  }
  out += manifest.metadata;
  return out;
}

std::string Id(LeaseKey key) { return absl::StrCat("lease ", absl::Hex(key.lease), " epoch ", key.epoch); }

absl::Status CheckAlgorithm(uint32_t algorithm) {
  if (algorithm == kDigestXxh3 || algorithm == kDigestDevice) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("manifest: digest_algorithm ", algorithm,
                                                 ", expected 1 (xxh3) or 2 (device): integrity is required"));
}

absl::Status CheckAscending(const std::vector<ManifestExtent>& extents) {
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].extent_id > extents[i - 1].extent_id) continue;
    return absl::InvalidArgumentError(absl::StrCat("manifest: extent ", extents[i].extent_id, " follows extent ",
                                                   extents[i - 1].extent_id, ", expected ascending ids"));
  }
  return absl::OkStatus();
}

}  // namespace

uint64_t WholeDigest(const Manifest& manifest) { return ContentDigest(EncodeBody(manifest)); }

void Seal(Manifest& manifest) {
  std::sort(manifest.extents.begin(), manifest.extents.end(),
            [](const ManifestExtent& a, const ManifestExtent& b) { return a.extent_id < b.extent_id; });
  manifest.whole_digest = WholeDigest(manifest);
}

std::string EncodeManifest(const Manifest& manifest) {
  std::string out = EncodeBody(manifest);
  Append(out, manifest.whole_digest);
  return out;
}

absl::StatusOr<Manifest> DecodeManifest(absl::string_view bytes, const ManifestLimits& limits) {
  const absl::string_view all = bytes;
  if (all.size() < kFixedBytes + kDigestBytes) {
    return absl::DataLossError(
        absl::StrCat("manifest: ", all.size(), " bytes, expected at least ", kFixedBytes + kDigestBytes));
  }
  if (const uint32_t magic = Take<uint32_t>(bytes); magic != kMagic)
    return absl::DataLossError(absl::StrCat("manifest: magic ", absl::Hex(magic), ", expected ", absl::Hex(kMagic)));
  if (const uint32_t version = Take<uint32_t>(bytes); version != kVersion)
    return absl::FailedPreconditionError(absl::StrCat("manifest: version ", version, ", expected ", kVersion));

  Manifest manifest;
  manifest.digest_algorithm = Take<uint32_t>(bytes);
  manifest.key.lease = Take<uint64_t>(bytes);
  manifest.key.epoch = Take<uint64_t>(bytes);
  const uint64_t num_extents = Take<uint64_t>(bytes);
  const uint64_t metadata_bytes = Take<uint64_t>(bytes);
  if (num_extents > limits.max_extents) {
    return absl::InvalidArgumentError(
        absl::StrCat("manifest: ", num_extents, " extents, expected at most ", limits.max_extents));
  }
  if (metadata_bytes > limits.max_metadata_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("manifest: ", metadata_bytes, " bytes of metadata, expected at most ", limits.max_metadata_bytes));
  }
  // Both counts are bounded by now; the division keeps the sum from wrapping whatever the limits are.
  if (num_extents > all.size() / kExtentBytes || metadata_bytes > all.size() ||
      all.size() != kFixedBytes + num_extents * kExtentBytes + metadata_bytes + kDigestBytes) {
    return absl::DataLossError(absl::StrCat("manifest: ", all.size(), " bytes do not hold exactly ", num_extents,
                                            " extents and ", metadata_bytes, " bytes of metadata"));
  }
  absl::string_view tail = all.substr(all.size() - kDigestBytes);
  manifest.whole_digest = Take<uint64_t>(tail);
  const uint64_t found = ContentDigest(all.substr(0, all.size() - kDigestBytes));
  if (found != manifest.whole_digest) {
    return absl::DataLossError(absl::StrCat("manifest: whole digest ", absl::Hex(found), ", expected ",
                                            absl::Hex(manifest.whole_digest), " (damaged in transit)"));
  }
  RETURN_IF_ERROR(CheckAlgorithm(manifest.digest_algorithm));
  manifest.extents.reserve(num_extents);
  for (uint64_t i = 0; i < num_extents; ++i) {
    ManifestExtent& extent = manifest.extents.emplace_back();
    extent.extent_id = Take<uint64_t>(bytes);
    extent.bytes = Take<uint64_t>(bytes);
    extent.digest = Take<uint64_t>(bytes);
  }
  RETURN_IF_ERROR(CheckAscending(manifest.extents));
  manifest.metadata = std::string(bytes.substr(0, metadata_bytes));
  return manifest;
}

absl::Status CheckManifest(const Manifest& manifest, LeaseKey key, uint32_t digest_algorithm,
                           absl::Span<const ExpectedLength> expected) {
  if (manifest.key.lease != key.lease)
    return absl::FailedPreconditionError(absl::StrCat("manifest is for ", Id(manifest.key), ", expected ", Id(key)));
  if (manifest.key.epoch != key.epoch)
    return absl::FailedPreconditionError(
        absl::StrCat("stale epoch: manifest is for ", Id(manifest.key), ", live is ", Id(key)));
  if (const uint64_t found = WholeDigest(manifest); found != manifest.whole_digest) {
    return absl::DataLossError(absl::StrCat(Id(key), ": manifest's whole digest ", absl::Hex(found), ", expected ",
                                            absl::Hex(manifest.whole_digest)));
  }
  if (manifest.digest_algorithm != digest_algorithm) {
    return absl::InvalidArgumentError(absl::StrCat(Id(key), ": manifest has digest_algorithm ",
                                                   manifest.digest_algorithm, ", expected ", digest_algorithm));
  }
  RETURN_IF_ERROR(CheckAscending(manifest.extents));
  const std::string counts =
      absl::StrCat(" (manifest has ", manifest.extents.size(), " extents, lease expects ", expected.size(), ")");
  for (size_t i = 0; i < std::max(expected.size(), manifest.extents.size()); ++i) {
    const bool missing =
        i >= manifest.extents.size() || (i < expected.size() && manifest.extents[i].extent_id > expected[i].extent_id);
    if (missing)
      return absl::InvalidArgumentError(absl::StrCat(Id(key), ": extent ", expected[i].extent_id, " missing", counts));
    if (i >= expected.size() || manifest.extents[i].extent_id < expected[i].extent_id) {
      return absl::InvalidArgumentError(
          absl::StrCat(Id(key), ": extent ", manifest.extents[i].extent_id, " unexpected", counts));
    }
    if (manifest.extents[i].bytes != expected[i].bytes) {
      return absl::InvalidArgumentError(absl::StrCat(Id(key), ": extent ", expected[i].extent_id, " has ",
                                                     manifest.extents[i].bytes, " bytes, expected ",
                                                     expected[i].bytes));
    }
  }
  return absl::OkStatus();
}

}  // namespace millrace::kvtransfer
