// SPDX-License-Identifier: Apache-2.0
// Routed experts on a card: twin of local_experts.h for a member of the pool, and for what a worker on a card runs of a
// pool's experts itself. Behind one function that every build has.
//
// Rows arrive in and leave to host memory, through one page-locked block each way; a call ends when its rows are there.
// Nothing on the card waits for anything outside it, so processes that share a card take turns. Results have the bits
// of a CUDA engine that runs all experts itself.
//
// Unimplemented: this build has no CUDA backend. FailedPrecondition: no driver or card, `exact` numerics, a model whose
// shapes or scales the kernels do not take. ResourceExhausted: the card is too small, with the sum that was asked for.
// InvalidArgument: no such expert.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "engine/moe/expert_computer.h"
#include "engine/moe/local_experts.h"

namespace millrace {

absl::StatusOr<std::unique_ptr<ExpertComputer>> CreateCudaExperts(const Checkpoint& checkpoint,
                                                                  LocalExpertsOptions options);

}  // namespace millrace
