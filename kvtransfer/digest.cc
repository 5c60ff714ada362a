// SPDX-License-Identifier: Apache-2.0
// Digests of host memory (XXH3-64) and their binding to a place; the contract is in digest.h.
#include "kvtransfer/digest.h"

#include <cstring>
#include <utility>

#include "xxhash.h"

namespace millrace::kvtransfer {

uint64_t ContentDigest(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

uint64_t BindDigest(uint64_t content_digest, LeaseKey key, uint64_t extent_id, uint64_t bytes) {
  const uint64_t bound[5] = {content_digest, key.lease, key.epoch, extent_id, bytes};
  return XXH3_64bits(bound, sizeof(bound));
}

MemoryFunctions HostMemoryFunctions() {
  MemoryFunctions functions;
  functions.copy = [](Memory destination, ConstMemory source) {
    if (destination.kind != MemoryKind::kHost || source.kind != MemoryKind::kHost)
      return absl::InvalidArgumentError("copy of device memory asked of functions that know only host memory");
    if (destination.bytes != source.bytes) return absl::InvalidArgumentError("copy between different sizes");
    if (source.bytes != 0) std::memcpy(destination.data, source.data, source.bytes);
    return absl::OkStatus();
  };
  functions.digest = [](ConstMemory content, DigestDone done) {
    if (content.kind != MemoryKind::kHost) {
      done(absl::InvalidArgumentError("digest of device memory asked of functions that know only host memory"));
      return;
    }
    done(ContentDigest(content.data, content.bytes));
  };
  functions.digest_algorithm = kDigestXxh3;
  return functions;
}

}  // namespace millrace::kvtransfer
