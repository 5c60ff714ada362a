// SPDX-License-Identifier: Apache-2.0
// Which files of a model directory hold its weights.
//
// Either one model.safetensors, or model.safetensors.index.json naming the shard of every tensor. Names come from files
// we did not write, so they are only ever opened beneath the directory (mapped_file.h). Thread: pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "engine/model/mapped_file.h"

namespace millrace {

inline constexpr char kIndexFile[] = "model.safetensors.index.json";
inline constexpr char kSingleFile[] = "model.safetensors";

struct ShardIndex {
  std::vector<std::string> files;  // sorted, each once
  // Shard of each tensor; empty when there is a single file, which then lists its tensors itself.
  absl::flat_hash_map<std::string, std::string> weight_map;
  std::optional<int64_t> total_size;  // tensor bytes of all shards
};

absl::StatusOr<ShardIndex> ParseShardIndex(std::string_view json_text);

// Looks into `model_dir`. Unimplemented "unsupported format" when it holds pickles or GGUF instead, NotFound when it
// holds no weights, InvalidArgument when two answers are possible or a shard lies there that the index does not list.
absl::StatusOr<ShardIndex> FindShards(const std::string& model_dir, const ScopedFd& dir);

// Unimplemented when `path` itself is a weights file of a format that is not read; Ok for all else.
absl::Status RefuseOtherFormat(const std::string& path);

}  // namespace millrace
