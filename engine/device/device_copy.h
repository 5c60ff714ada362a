// SPDX-License-Identifier: Apache-2.0
// Bytes between device memory and the host, for whoever carries cache extents (engine.h, CacheExtent).
//
// In every build; without CUDA there is no device memory to name, and each call says so. A copy is complete when the
// call returns, and ordered against the engine by the caller: extents are read after Forward returned, and written
// before CommitImport. Any thread; each has a stream of its own, so that a transfer does not wait for a step.
#pragma once

#include <cstdint>

#include "absl/status/status.h"

namespace millrace {

// Unimplemented: this build has no CUDA backend. Internal: the runtime refused, by name.
absl::Status CopyFromDevice(void* host, const void* device, int64_t bytes);
absl::Status CopyToDevice(void* device, const void* host, int64_t bytes);
absl::Status CopyOnDevice(void* to, const void* from, int64_t bytes);

}  // namespace millrace
