// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels and a card take: asked before anything is put on it. Thread: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/device/cuda_device.h"
#include "engine/model/config.h"
#include "engine/numerics.h"

namespace millrace::cuda {

// FailedPrecondition: not `release`, the only numerics that the kernels have.
absl::Status CheckNumerics(Numerics numerics);

// FailedPrecondition: a shape beyond the kernels' own limits, with its name and what was found.
absl::Status CheckShapes(const ModelConfig& config);

// Left to the driver: kernels' code, captured graphs.
inline constexpr int64_t kHeadroom = 256 << 20;

// One line: every part with its bytes, their sum, what is free. ResourceExhausted with that line: it does not fit.
absl::StatusOr<std::string> MemoryBudget(const DeviceInfo& device,
                                         const std::vector<std::pair<std::string, int64_t>>& parts);

}  // namespace millrace::cuda
