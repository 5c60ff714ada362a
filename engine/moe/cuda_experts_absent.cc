// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda_experts.cc in builds without a CUDA compiler.
#include "engine/moe/cuda_experts.h"

namespace millrace {

absl::StatusOr<std::unique_ptr<ExpertComputer>> CreateCudaExperts(const Checkpoint& /*checkpoint*/,
                                                                  LocalExpertsOptions /*options*/) {
  return absl::UnimplementedError("device: this build has no CUDA backend (configured without a CUDA 13 compiler)");
}

}  // namespace millrace
