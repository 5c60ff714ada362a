// SPDX-License-Identifier: Apache-2.0
// manifest.json: the hash of every tensor, so that a flipped bit or a shard of another revision is noticed.
//
// Optional, ours, beside the weights: {"format": "millrace-manifest-1", "hash": "xxh3-128", "tensors": {name: 32 hex
// digits}}. The released checkpoints come without; write one when the download has been verified. XXH3 is chosen for
// its speed (memory bandwidth): it finds damage and mix-ups, not somebody who forges both files. Thread: pure
// functions.
#pragma once

#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/checkpoint.h"
#include "engine/model/mapped_file.h"

namespace millrace {

inline constexpr char kManifestFile[] = "manifest.json";

using TensorHashes = absl::flat_hash_map<std::string, std::string>;

// 32 hex digits of XXH3-128 over the tensor's bytes.
std::string TensorHash(const HostTensor& tensor);

// Nothing if there is no manifest; InvalidArgument if it is not one.
absl::StatusOr<std::optional<TensorHashes>> LoadManifest(const ScopedFd& model_dir);

// Hashes every tensor of the inventory and writes `model_dir`/manifest.json, replacing an older one.
absl::Status WriteManifest(const Checkpoint& checkpoint, const std::string& model_dir);

}  // namespace millrace
