// SPDX-License-Identifier: Apache-2.0
// What the three worker roles have in common: identity, metrics, the gRPC server, the transport, membership.
//
// A role starts the server and joins before it loads anything, so that its progress can be seen; its services answer
// Unavailable until the role calls SetReady. The order of the end matters and is the role's to keep: engine thread,
// then server, then membership, then transport (Shutdown does the last three).
//
// Thread: the role's main thread, except where a method says otherwise.
#pragma once

#include <prometheus/registry.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "kvtransfer/transport.h"
#include "millrace/v1/cluster.pb.h"
#include "services/common/config.h"
#include "services/common/drain.h"
#include "services/common/engine_loop.h"
#include "services/common/incarnation.h"
#include "services/common/join_client.h"
#include "services/common/request_trace.h"
#include "services/common/rpc.h"
#include "services/common/startup_watch.h"
#include "services/common/trace_export.h"
#include "services/common/worker_metrics.h"

namespace millrace {

// What surrounds a worker. Everything is optional: empty means what the configuration and the process give.
struct WorkerEnvironment {
  // Tests put all roles into one process: their transports meet in one hub, and they may share one checkpoint.
  std::function<absl::StatusOr<std::unique_ptr<kvtransfer::Transport>>()> make_transport;
  std::shared_ptr<const Checkpoint> checkpoint;
  // Instead of Engine::Create.
  std::function<absl::StatusOr<std::unique_ptr<Engine>>(EngineOptions)> make_engine;
  // Where metrics go; must outlive the worker. Null: a registry of its own, which nobody reads.
  prometheus::Registry* registry = nullptr;
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress;
  std::function<void(bool)> on_serving;  // as the gRPC health of this worker changes; any thread
  // Exits with status 70 when work is pending and no pass ends for too long, with 69 when the start-up stands still.
  // Not in tests inside one process.
  bool watchdog = false;
};

struct WorkerHooks {
  std::function<void(v1::WorkerStatus&)> fill_status;  // the loop's part; any thread
  std::function<absl::Status()> ready;                 // beyond being loaded: the expert pool is complete; any thread
  // The join thread; must not block.
  std::function<void(const IncarnationId& router)>
      on_new_router;  // another router than before: the old one's work ends
  std::function<void(const std::string& why)> on_router_lost;
  std::function<void(const v1::PeerList&)> on_peers;
};

class WorkerCore {
 public:
  WorkerCore(WorkerConfig config, WorkerEnvironment environment);
  ~WorkerCore();  // Shutdown

  // Binds, serves, joins. Unavailable: the address is taken. InvalidArgument: security.tls, with the file at fault.
  absl::Status StartServer(const std::vector<grpc::Service*>& services, std::vector<std::string> service_names);
  absl::Status MakeTransport();
  // NotFound, InvalidArgument: what is wrong with the model, in one line.
  absl::StatusOr<std::shared_ptr<const Checkpoint>> OpenCheckpoint();
  absl::StatusOr<Numerics> ChooseNumerics(const Checkpoint& checkpoint) const;
  void Waiting(std::string for_what);                // the stage of the start-up; said when it stops moving
  void ReportProgress(int64_t done, int64_t total);  // any thread
  // Everything is there; `ready` needs role-specific fields only. Hooks are called from here on.
  void SetReady(WorkerHooks hooks, v1::WorkerReady ready);
  void Nudge();  // any thread: something changed that the router should know soon
  // Unready at once. When the router has heard it, and so places nothing here any more, `refuse` is called; what comes
  // until then is work like any other. Then waits until `idle` or `grace` is over.
  void Drain(const std::function<void()>& refuse, const std::function<bool()>& idle, absl::Duration grace);
  void Drain(EngineLoop* loop, absl::Duration grace);  // the same of a loop; null: there is none yet
  void Shutdown();
  bool drain_requested() const { return drain_requested_.load(); }  // the router asked for it

  const WorkerConfig& config() const { return config_; }
  const WorkerEnvironment& environment() const { return environment_; }
  const IncarnationId& incarnation() const { return incarnation_; }
  const std::string& address() const { return address_; }
  kvtransfer::Transport& transport() { return *transport_; }
  ChannelPool& channels() { return *channels_; }  // after StartServer
  WorkerMetrics& metrics() { return metrics_; }
  TraceLog& traces() { return *traces_; }

 private:
  bool DeviceMemoryIsDirect() const;
  void Decorate();
  void SetServing(bool serving);
  prometheus::Registry& registry() { return own_registry_ ? *own_registry_ : *environment_.registry; }
  void PublishMetrics();
  void OpenTraces();
  void FillStatus(v1::WorkerStatus& status);
  void CheckProgress(const v1::WorkerStatus& status);
  std::string AdvertisedAddress() const;

  const WorkerConfig config_;
  const WorkerEnvironment environment_;
  const IncarnationId incarnation_;
  std::unique_ptr<prometheus::Registry> own_registry_;
  WorkerMetrics metrics_;
  std::optional<TraceExporter> exporter_;  // where the configuration names a collector
  std::optional<TraceLog> traces_;
  std::optional<ChannelPool> channels_;
  std::string address_;
  std::optional<StartupWatch> startup_;  // until SetReady
  std::atomic<int64_t> load_done_{0}, load_total_{0};
  std::atomic<bool> ready_{false}, draining_{false}, drain_requested_{false};
  std::mutex hooks_mutex_;
  WorkerHooks hooks_;        // guarded by hooks_mutex_
  v1::PeerList last_peers_;  // guarded by hooks_mutex_: came before somebody could take them
  IncarnationId router_;     // join thread only
  // Watchdog; join thread only.
  uint64_t watched_steps_ = 0;
  uint32_t longest_step_us_ = 0;
  absl::Time last_progress_;

  std::unique_ptr<kvtransfer::Transport> transport_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<JoinClient> join_;
};

// Runs a worker until the signal or the router asks for its end: drains, stops, returns.
template <typename Worker>
absl::Status RunWorker(const WorkerConfig& config, WorkerEnvironment environment, const StopSignal& stop) {
  auto worker = Worker::Start(config, std::move(environment));
  if (!worker.ok()) return worker.status();
  while (!stop.WaitFor(absl::Milliseconds(100)) && !(*worker)->core().drain_requested()) {
  }
  (*worker)->Drain(Ms(config.cluster.timers().drain_grace_ms()));
  (*worker)->Stop();
  return absl::OkStatus();
}

}  // namespace millrace
