// SPDX-License-Identifier: Apache-2.0
// The CUDA backend of engine.h, behind one function that every build has.
//
// Unimplemented: this build has no CUDA backend. FailedPrecondition: no driver or card, `exact` numerics (the backend
// has the release's rounding points only), a model whose shapes the kernels do not take. ResourceExhausted: the card is
// too small, with the sum that was asked for. `checkpoint` and `options` were checked by Engine::Create.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine/engine.h"

namespace millrace {

absl::StatusOr<std::unique_ptr<Engine>> CreateCudaEngine(std::shared_ptr<const Checkpoint> checkpoint,
                                                         EngineOptions options);

}  // namespace millrace
