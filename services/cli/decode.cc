// SPDX-License-Identifier: Apache-2.0
// `millrace decode`: one decode worker as a process.
#include "services/decode/decode_worker.h"

#include "services/cli/worker_command.h"

namespace millrace::cli {

int RunDecode(Arguments arguments) {
  return RunWorkerCommand({.command = "decode",
                           .summary = "Receives the state of prompts and continues them, token by token",
                           .role = v1::ROLE_DECODE,
                           .run = decode::RunDecodeWorker},
                          arguments);
}

}  // namespace millrace::cli
