// SPDX-License-Identifier: Apache-2.0
// The name of the CUDA kernels, in builds with them and without: peers compare it before they pair. No device code.
#pragma once

#include <string>

namespace millrace {

// Raised whenever a change of the CUDA kernels changes bits.
inline constexpr int kCudaKernelRevision = 2;

inline std::string CudaKernelSet() { return "cuda/sm90/" + std::to_string(kCudaKernelRevision); }

}  // namespace millrace
