// SPDX-License-Identifier: Apache-2.0
// Makes a checkpoint of random weights in the released format, on disk or in memory: for tests, benchmarks and `inspect
// --make-random`.
//
// Magnitudes are those of an initialised network (every linear keeps the variance of its input), so activations stay
// finite through any number of layers; text out of it is noise. A tensor's bytes depend on the seed and its name only:
// the first layers of two sizes of one preset are equal. Thread: pure functions.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/checkpoint.h"
#include "engine/model/preset_config.h"

namespace millrace {

struct RandomCheckpointOptions {
  uint64_t seed = 0;
  int64_t max_shard_bytes = int64_t{2} << 30;               // a larger tensor gets a shard of its own
  std::function<void(int64_t done, int64_t all)> progress;  // bytes
};

// Writes shards, index and config.json (last) into `out_dir`, which is created if absent. The configuration decides the
// format: with quantization_config FP8 and FP4 with scales, without it BF16. InvalidArgument for a bad configuration,
// AlreadyExists if `out_dir` holds a model, ResourceExhausted before writing anything if the disk is too small.
absl::Status MakeRandomCheckpoint(const std::string& config_json, const std::string& out_dir,
                                  const RandomCheckpointOptions& options = {});

// The same for a preset cut to `changes`.
absl::Status MakeRandomCheckpoint(ModelPreset preset, PresetChanges changes, const std::string& out_dir,
                                  const RandomCheckpointOptions& options = {});

// The same bytes without a disk, drawn by several threads; `max_shard_bytes` and `progress` are not used.
absl::StatusOr<std::unique_ptr<Checkpoint>> RandomCheckpointInMemory(const std::string& config_json,
                                                                     const RandomCheckpointOptions& options = {});

}  // namespace millrace
