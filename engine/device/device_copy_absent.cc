// SPDX-License-Identifier: Apache-2.0
// Stands in for device_copy_cuda.cc in builds without a CUDA compiler.
#include "engine/device/device_copy.h"

namespace millrace {
namespace {
absl::Status Absent() { return absl::UnimplementedError("device memory: this build has no CUDA backend"); }
}  // namespace

absl::Status CopyFromDevice(void* /*host*/, const void* /*device*/, int64_t /*bytes*/) { return Absent(); }
absl::Status CopyToDevice(void* /*device*/, const void* /*host*/, int64_t /*bytes*/) { return Absent(); }
absl::Status CopyOnDevice(void* /*to*/, const void* /*from*/, int64_t /*bytes*/) { return Absent(); }
absl::Status AttachDevice() { return Absent(); }
std::optional<DeviceMemoryBytes> DeviceMemory() { return std::nullopt; }

}  // namespace millrace
