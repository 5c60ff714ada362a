// SPDX-License-Identifier: Apache-2.0
// `millrace prefill`: one prefill worker as a process.
#include "services/prefill/prefill_worker.h"

#include "services/cli/worker_command.h"

namespace millrace::cli {

int RunPrefill(Arguments arguments) {
  return RunWorkerCommand(
      {.command = "prefill",
       .summary = "Computes prompts, draws their first token and hands their state to decode workers",
       .role = v1::ROLE_PREFILL,
       .run = prefill::RunPrefillWorker},
      arguments);
}

}  // namespace millrace::cli
