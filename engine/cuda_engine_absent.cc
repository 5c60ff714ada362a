// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda_engine.cc in builds without a CUDA compiler.
#include "engine/cuda_engine.h"

namespace millrace {

absl::StatusOr<std::unique_ptr<Engine>> CreateCudaEngine(std::shared_ptr<const Checkpoint> /*checkpoint*/,
                                                         EngineOptions /*options*/) {
  return absl::UnimplementedError("device: this build has no CUDA backend (configured without a CUDA 13 compiler)");
}

}  // namespace millrace
