// SPDX-License-Identifier: Apache-2.0
// `millrace expert`: one expert worker as a process.
#include "services/expert/expert_worker.h"

#include "services/cli/worker_command.h"

namespace millrace::cli {

int RunExpert(Arguments arguments) {
  return RunWorkerCommand({.command = "expert",
                           .summary = "Holds a share of the routed experts and computes for prefill and decode workers",
                           .role = v1::ROLE_EXPERT,
                           .run = expert::RunExpertWorker},
                          arguments);
}

}  // namespace millrace::cli
