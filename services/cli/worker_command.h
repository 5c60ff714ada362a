// SPDX-License-Identifier: Apache-2.0
// What `prefill`, `decode` and `expert` share: flags, configuration, log, metrics port, exit statuses.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "millrace/v1/types.pb.h"
#include "services/cli/command.h"
#include "services/common/worker_core.h"

namespace millrace::cli {

struct WorkerRole {
  std::string command;  // "prefill"
  std::string summary;  // one sentence without a full stop
  v1::Role role = v1::ROLE_UNSPECIFIED;
  absl::Status (*run)(const WorkerConfig&, WorkerEnvironment, const StopSignal&) = nullptr;
};

int RunWorkerCommand(const WorkerRole& role, Arguments arguments);

}  // namespace millrace::cli
