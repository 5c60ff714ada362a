// SPDX-License-Identifier: Apache-2.0
// One worker process, from its arguments to its exit status.
#include "services/cli/worker_command.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/cli/logging.h"
#include "services/cli/model_loading.h"
#include "services/cli/terminal.h"
#include "services/common/config.h"
#include "services/common/drain.h"
#include "services/common/failpoints.h"
#include "services/common/metrics.h"
#include "services/router/http_server.h"
#include "spdlog/spdlog.h"

namespace millrace::cli {
namespace {

// /metrics, /healthz and /readyz of a worker, for whoever scrapes and probes it. Null where the configuration says
// "off".
absl::StatusOr<std::unique_ptr<router::HttpServer>> ServeMetrics(const std::string& listen,
                                                                 const prometheus::Registry& registry,
                                                                 const std::atomic<bool>& serving) {
  if (listen.empty() || listen == "off") return std::unique_ptr<router::HttpServer>();
  const size_t colon = listen.rfind(':');
  int port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(listen.substr(colon + 1), &port) || port < 0 || port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat("operator_listen: found \"", listen, "\", expected host:port"));
  }
  router::HttpServerOptions options;
  options.address = listen.substr(0, colon);
  options.port = static_cast<uint16_t>(port);
  options.threads = 1;
  options.limits.max_connections = 64;
  return router::HttpServer::Start(
      options, [&registry, &serving](router::HttpRequest request, std::shared_ptr<router::HttpExchange> exchange) {
        exchange->BodyConsumed();
        router::HttpResponse response;
        response.content_type = "text/plain; charset=utf-8";
        if (request.path == "/metrics") {
          response.content_type = std::string(kMetricsContentType);
          response.body = RenderMetrics(registry);
        } else if (request.path == "/healthz") {
          response.body = "ok\n";
        } else if (request.path == "/readyz") {  // as its gRPC health, which probes cannot ask over mutual TLS
          response.status = serving ? 200 : 503;
          response.body = serving ? "ready\n" : "not ready\n";
        } else {
          response.status = 404;
          response.body = "only /metrics, /healthz and /readyz are here\n";
        }
        exchange->Respond(std::move(response));
      });
}

}  // namespace

int RunWorkerCommand(const WorkerRole& role, Arguments arguments) {
  std::string config_path, name, advertise;
  bool watchdog = true, core_dumps = false;
  Flags flags(
      role.command, role.summary,
      absl::StrCat("The document is the cluster's, the same for every role; --name picks this worker's entry in\n"
                   "it. The worker dials the router, which may come later, and shows its progress there.\n"
                   "SIGTERM drains: what runs finishes, nothing new is taken.\n\n  millrace ",
                   role.command, " --config cluster.json --name ", role.command, "-0"));
  flags.String("config", &config_path, "FILE", "The cluster's configuration document. Required.");
  flags.String("name", &name, "NAME", "Which entry is ours. Default: the only one of this role.");
  flags.String(
      "advertise", &advertise, "HOST[:PORT]",
      "What others dial, instead of the entry's worker.advertise; such as a pod's address. Without a port: the "
      "one that was bound.");
  flags.Bool("watchdog", &watchdog, "End with status 70 when work is pending and no pass ends for too long.");
  AddCoreDumpsFlag(flags, &core_dumps);
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, role.command, arguments, &exit_code)) return exit_code;
  if (config_path.empty()) {
    return Fail(role.command, kExitUsage,
                absl::StrCat("--config FILE is required; see millrace ", role.command, " --help"));
  }
  const absl::StatusOr<v1::ClusterConfig> cluster = LoadClusterConfig(config_path);
  if (!cluster.ok()) return Fail(role.command, kExitConfig, cluster.status());
  absl::StatusOr<WorkerConfig> config = SelectWorker(*cluster, role.role, name);
  if (!config.ok()) return Fail(role.command, kExitConfig, config.status());
  if (!advertise.empty()) {
    if (absl::Status status = OverrideAdvertise(*config, advertise); !status.ok()) {
      return Fail(role.command, kExitUsage, status);
    }
  }
  if (const char* points = std::getenv("MILLRACE_FAILPOINTS")) {
    if (absl::Status status = failpoints::Arm(points); !status.ok()) return Fail(role.command, kExitUsage, status);
  }
  static StopSignal stop;  // lives as long as the process, as its handler thread does
  stop.InstallHandlers();
  stop.LeaveWithin(config->worker().name(),
                   absl::Milliseconds(config->cluster.timers().drain_grace_ms()) + kLeaveAfterGrace);
  SetUpLogging({.role = role.command,
                .name = config->worker().name(),
                .level = config->worker().log_level(),
                .format = config->worker().log_format()});
  KeepMemoryPrivate(core_dumps);

  prometheus::Registry registry;
  std::atomic<bool> serving{false};
  const auto metrics = ServeMetrics(config->worker().operator_listen(), registry, serving);
  if (!metrics.ok()) return Fail(role.command, kExitUnavailable, metrics.status());
  Progress progress("loading " + config->worker().name(), IsTerminal(STDERR_FILENO));
  WorkerEnvironment environment;
  environment.registry = &registry;
  environment.watchdog = watchdog;
  environment.on_serving = [&serving](bool on) { serving = on; };
  environment.progress = [&](int64_t done, int64_t total) {
    progress.Update(done, total);
    if (total > 0 && done >= total) progress.Finish();
  };
  const absl::Status status = role.run(*config, std::move(environment), stop);
  if (!status.ok()) {
    const int code = absl::IsUnavailable(status) ? kExitUnavailable : ModelExitCode(status);
    spdlog::error("{}", std::string(status.message()));
    return Fail(role.command, code, status);
  }
  spdlog::info("drained");
  return kExitOk;
}

}  // namespace millrace::cli
