// SPDX-License-Identifier: Apache-2.0
// Bytes between device memory and the host, for whoever carries cache extents (engine.h, CacheExtent), and how much
// there is.
//
// In every build; without CUDA there is no device memory to name, and each call says so. A copy is complete when the
// call returns, and ordered against the engine by the caller: extents are read after Forward returned, and written
// before CommitImport. Any thread; each has a stream of its own, so that a transfer does not wait for a step.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"

namespace millrace {

// Unimplemented: this build has no CUDA backend. Internal: the runtime refused, by name.
absl::Status CopyFromDevice(void* host, const void* device, int64_t bytes);
absl::Status CopyToDevice(void* device, const void* host, int64_t bytes);
absl::Status CopyOnDevice(void* to, const void* from, int64_t bytes);

// Makes the card that this process uses current on the calling thread, for a library that moves device memory by itself
// there. FailedPrecondition: no driver or card. Unimplemented as above.
absl::Status AttachDevice();

// Of the card that this process uses: free, and in all. Nothing in a build without CUDA, or when the runtime refuses.
// Asking makes a context where there is none, so ask only where the engine runs on a card.
struct DeviceMemoryBytes {
  int64_t free = 0, total = 0;
};
std::optional<DeviceMemoryBytes> DeviceMemory();

}  // namespace millrace
