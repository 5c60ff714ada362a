// SPDX-License-Identifier: Apache-2.0
// `millrace router`: the front of a cluster as one process.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "engine/status.h"
#include "services/cli/command.h"
#include "services/cli/logging.h"
#include "services/cli/model_loading.h"
#include "services/common/config.h"
#include "services/common/drain.h"
#include "services/common/failpoints.h"
#include "services/router/router_process.h"
#include "spdlog/spdlog.h"

namespace millrace::cli {

int RunRouter(Arguments arguments) {
  std::string config_path;
  Flags flags("router", "Runs the front of a cluster: HTTP and gRPC outside, placement and hand-offs inside",
              "It loads the tokenizer, no weights, and serves as soon as its ports are open; /readyz says yes when a\n"
              "prefill and a decode worker that fit together have joined. SIGTERM drains: running requests finish,\n"
              "new ones are told to come back elsewhere.\n\n"
              "  millrace router --config cluster.json");
  flags.String("config", &config_path, "FILE", "The cluster's configuration document. Required.");
  std::string name = "router";
  flags.String("name", &name, "NAME", "Name in the log.");
  bool core_dumps = false;
  AddCoreDumpsFlag(flags, &core_dumps);
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "router", arguments, &exit_code)) return exit_code;
  if (config_path.empty()) return Fail("router", kExitUsage, "--config FILE is required; see millrace router --help");
  const absl::StatusOr<v1::ClusterConfig> config = LoadClusterConfig(config_path);
  if (!config.ok()) return Fail("router", kExitConfig, config.status());
  if (const char* points = std::getenv("MILLRACE_FAILPOINTS")) {
    if (absl::Status status = failpoints::Arm(points); !status.ok()) return Fail("router", kExitUsage, status);
  }
  static StopSignal stop;  // lives as long as the process, as its handler thread does
  stop.InstallHandlers();
  stop.LeaveWithin(name, absl::Milliseconds(config->timers().drain_grace_ms()) + kLeaveAfterGrace);
  SetUpLogging(
      {.role = "router", .name = name, .level = config->router().log_level(), .format = config->router().log_format()});
  KeepMemoryPrivate(core_dumps);

  auto process = router::RouterProcess::Start(*config);
  if (!process.ok()) {
    const int code = absl::IsUnavailable(process.status()) ? kExitUnavailable : ModelExitCode(process.status());
    return Fail("router", code, process.status());
  }
  spdlog::info("router ready: http {} grpc {} operator {} control {}", (*process)->http_address(),
               (*process)->grpc_address(), (*process)->operator_address(), (*process)->control_address());
  (*process)->WaitAndDrain(stop);
  process->reset();
  spdlog::info("router drained");
  return kExitOk;
}

}  // namespace millrace::cli
