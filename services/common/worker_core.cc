// SPDX-License-Identifier: Apache-2.0
// See worker_core.h.
#include "services/common/worker_core.h"

#include <unistd.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/device/device_copy.h"
#include "engine/status.h"
#include "kvtransfer/sealed_transport.h"
#include "kvtransfer/staged_transport.h"
#include "kvtransfer/ucx_transport.h"
#include "services/common/cache_extents.h"
#include "services/common/clock.h"
#include "services/common/failpoints.h"
#include "services/common/generation_spec.h"
#include "services/common/metrics.h"
#include "services/common/model_notice.h"
#include "services/common/role.h"
#include "spdlog/spdlog.h"

namespace millrace {
namespace {

constexpr absl::Duration kShutdownGrace = absl::Milliseconds(500);
// A router that is there answers in milliseconds; one that is stuck must not keep us from ending.
constexpr absl::Duration kDrainHeard = absl::Seconds(2);
constexpr int kExitStuck = 70;
constexpr int kFirstPassFactor = 10;

}  // namespace

WorkerCore::WorkerCore(WorkerConfig config, WorkerEnvironment environment)
    : config_(std::move(config)),
      environment_(std::move(environment)),
      incarnation_(IncarnationId::Random()),
      own_registry_(environment_.registry == nullptr ? std::make_unique<prometheus::Registry>() : nullptr),
      metrics_(environment_.registry == nullptr ? *own_registry_ : *environment_.registry, config_.role,
               config_.worker().name()),
      last_progress_(MonotonicNow()) {
  SetBuildInfo(registry());
  OpenTraces();
}

WorkerCore::~WorkerCore() { Shutdown(); }

// Whether a request is recorded was decided where it came in; nobody asks a worker for what has ended.
void WorkerCore::OpenTraces() {
  TraceLogOptions options;
  options.max_closed = 0;
  if (const v1::TracingSection& section = config_.cluster.tracing(); !section.otlp_endpoint().empty()) {
    TraceExporterOptions exporter;
    exporter.endpoint = section.otlp_endpoint();
    exporter.max_queued_spans = section.max_queued_spans();
    exporter.role = RoleWord(config_.role);
    exporter.instance = config_.worker().name();
    exporter.version = kVersion;
    exporter_.emplace(std::move(exporter), &registry());
    options.on_sampled = [this](const TraceView& view) { exporter_->Export(view); };
  }
  traces_.emplace(std::move(options));
}

absl::Status WorkerCore::StartServer(const std::vector<grpc::Service*>& services,
                                     std::vector<std::string> service_names) {
  if (environment_.watchdog) {
    startup_.emplace(absl::StrCat(RoleWord(config_.role), " ", config_.worker().name()),
                     Ms(config_.cluster.timers().startup_timeout_ms()));
  }
  const v1::SecuritySection& locks = config_.cluster.security();
  std::shared_ptr<const PeerSecurity> security;
  if (locks.has_tls()) {
    ASSIGN_OR_RETURN(security, PeerSecurity::Create(locks.tls(), PeerRoleOf(config_.role)));
  }
  channels_.emplace(security);
  RpcServerOptions server_options;
  if (security != nullptr) server_options.credentials = security->MakeServerCredentials();
  server_options.listen = config_.worker().listen();
  server_options.service_names = std::move(service_names);
  ASSIGN_OR_RETURN(server_, RpcServer::Start(server_options, services));
  address_ = AdvertisedAddress();
  JoinOptions options;
  options.router_address = config_.cluster.router().control_address();
  options.security = std::move(security);
  options.heartbeat = Ms(config_.cluster.timers().heartbeat_ms());
  options.dead_after = Ms(config_.cluster.timers().dead_after_ms());
  options.hello.set_role(config_.role);
  options.hello.set_name(config_.worker().name());
  incarnation_.To(options.hello.mutable_incarnation());
  options.hello.set_wire_version(kWireVersion);
  options.hello.set_control_address(address_);
  options.hello.set_software(absl::StrCat("millrace ", kVersion));
  JoinCallbacks callbacks;
  callbacks.fill_status = [this](v1::WorkerStatus& status) { FillStatus(status); };
  callbacks.on_router = [this](const IncarnationId& router) {
    const bool changed = !router_.empty() && router != router_;
    router_ = router;
    std::lock_guard<std::mutex> lock(hooks_mutex_);
    if (changed && hooks_.on_new_router) hooks_.on_new_router(router);
  };
  callbacks.on_router_lost = [this](const std::string& why) {
    spdlog::warn("{} {}: {}: ending its work", RoleWord(config_.role), config_.worker().name(), why);
    std::lock_guard<std::mutex> lock(hooks_mutex_);
    if (hooks_.on_router_lost) hooks_.on_router_lost(why);
  };
  callbacks.on_peers = [this](const v1::PeerList& peers) {
    std::lock_guard<std::mutex> lock(hooks_mutex_);
    last_peers_ = peers;
    if (hooks_.on_peers) hooks_.on_peers(peers);
  };
  callbacks.on_drain = [this](const v1::Drain& drain) {
    spdlog::info("{} {}: the router asks for a drain: {}", RoleWord(config_.role), config_.worker().name(),
                 drain.reason());
    drain_requested_.store(true);
  };
  join_ = std::make_unique<JoinClient>(std::move(options), std::move(callbacks));
  spdlog::info("{} {} listening on {} incarnation {}", RoleWord(config_.role), config_.worker().name(), address_,
               incarnation_.ToString());
  return absl::OkStatus();
}

// A wildcard address cannot be dialled; the host's name can, in a cluster whose names resolve.
std::string WorkerCore::AdvertisedAddress() const {
  if (const std::string& given = config_.worker().advertise(); !given.empty()) {
    return absl::EndsWith(given, ":0") ? absl::StrCat(given.substr(0, given.size() - 1), server_->port()) : given;
  }
  const std::string& bound = server_->address();
  if (!absl::StartsWith(bound, "0.0.0.0:") && !absl::StartsWith(bound, "[::]:")) return bound;
  char host[256] = "localhost";
  gethostname(host, sizeof(host) - 1);
  return absl::StrCat(host, ":", server_->port());
}

bool WorkerCore::DeviceMemoryIsDirect() const {
  return config_.role != v1::ROLE_EXPERT && config_.device() == "cuda" &&
         config_.cluster.transfer().device_memory() == "direct";
}

// Sealed where that is asked for. Cache of a card goes through host buffers unless the document says that UCX is to
// move it: Debian's knows no CUDA.
void WorkerCore::Decorate() {
  if (config_.cluster.transfer().seal()) {
    transport_ = kvtransfer::SealTransport(std::move(transport_), kvtransfer::HostMemoryFunctions());
  }
  if (config_.cluster.model().device() != "cuda" || DeviceMemoryIsDirect()) return;
  transport_ = kvtransfer::StageDeviceMemory(std::move(transport_), CacheMemoryFunctions());
}

absl::Status WorkerCore::MakeTransport() {
  if (environment_.make_transport) {
    ASSIGN_OR_RETURN(transport_, environment_.make_transport());
    Decorate();
    return absl::OkStatus();
  }
  Waiting("the transport's devices");
  kvtransfer::TransportOptions options;
  options.name = config_.worker().name();
  options.listen_address = config_.cluster.transfer().listen_address();
  options.listen_port = static_cast<uint16_t>(config_.cluster.transfer().listen_port());
  if (DeviceMemoryIsDirect()) {
    options.memory = CacheMemoryFunctions();
    RETURN_IF_ERROR(options.memory.attach());  // UCX looks for a card when it starts
  }
  ASSIGN_OR_RETURN(transport_, kvtransfer::CreateUcxTransport(options));
  if (DeviceMemoryIsDirect() && !transport_->Supports(kvtransfer::MemoryKind::kDevice)) {
    return absl::FailedPreconditionError(
        absl::StrCat("transfer.device_memory: found direct, UCX ", kvtransfer::UcxVersion(),
                     " carries no device memory here (built without CUDA, or UCX_TLS leaves it out); use staged"));
  }
  Decorate();
  spdlog::info("{} {} transport: {}", RoleWord(config_.role), config_.worker().name(), transport_->Describe());
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const Checkpoint>> WorkerCore::OpenCheckpoint() {
  if (environment_.checkpoint != nullptr) return environment_.checkpoint;
  const std::string& path = config_.cluster.model().path();
  Waiting(absl::StrCat("the checkpoint in ", path));
  CheckpointOptions options;
  options.progress = [this](int64_t done, int64_t total) {
    if (startup_) startup_->Moved(done, total);
  };
  ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(path, std::move(options)));
  if (const std::string notice = IgnoredKeysNotice(checkpoint->config().ignored_keys); !notice.empty()) {
    spdlog::warn("{} {}: {}", RoleWord(config_.role), config_.worker().name(), notice);
  }
  Waiting(absl::StrCat("the weights in ", path));
  RETURN_IF_ERROR(failpoints::Hit("w.load"));
  return std::shared_ptr<const Checkpoint>(std::move(checkpoint));
}

absl::StatusOr<Numerics> WorkerCore::ChooseNumerics(const Checkpoint& checkpoint) const {
  const bool quantised = checkpoint.config().weight_format == WeightFormat::kFp8;
  const std::string& asked = config_.cluster.model().numerics();
  if (asked == "exact" || (asked.empty() && !quantised)) return Numerics::kExact;
  if (!quantised) {
    return absl::InvalidArgumentError("model.numerics: release needs a quantised checkpoint, this one is not");
  }
  return Numerics::kRelease;
}

void WorkerCore::Waiting(std::string for_what) {
  if (startup_) startup_->Waiting(std::move(for_what));
}

void WorkerCore::ReportProgress(int64_t done, int64_t total) {
  if (startup_) startup_->Moved(done, total);
  load_done_.store(done);
  load_total_.store(total);
  metrics_.SetLoad(done, total);
  if (environment_.progress) environment_.progress(done, total);
}

void WorkerCore::SetReady(WorkerHooks hooks, v1::WorkerReady ready) {
  startup_.reset();
  ready.set_model_id(config_.cluster.model().id());
  SetModelInfo(registry(), {.role = RoleWord(config_.role),
                            .model = ready.model_id(),
                            .device = config_.device(),
                            .numerics = ready.numerics(),
                            .kernel_set = ready.kernel_set(),
                            .compat_hash = ready.compat_hash()});
  if (transport_ != nullptr) ready.set_transfer_address(transport_->address());
  {
    std::lock_guard<std::mutex> lock(hooks_mutex_);
    hooks_ = std::move(hooks);
    if (hooks_.on_peers && last_peers_.version() > 0) hooks_.on_peers(last_peers_);
  }
  ready_.store(true);
  SetServing(true);
  join_->SetReady(std::move(ready));
}

void WorkerCore::SetServing(bool serving) {
  if (server_ != nullptr) server_->SetServing(serving);
  if (environment_.on_serving) environment_.on_serving(serving);
}

void WorkerCore::Nudge() {
  if (join_ != nullptr) join_->Nudge();
}

void WorkerCore::FillStatus(v1::WorkerStatus& status) {
  WorkerHooks hooks;
  {
    std::lock_guard<std::mutex> lock(hooks_mutex_);
    hooks = hooks_;
  }
  status.set_load_bytes_done(static_cast<uint64_t>(load_done_.load()));
  status.set_load_bytes_total(static_cast<uint64_t>(load_total_.load()));
  if (hooks.fill_status) hooks.fill_status(status);
  if (draining_.load()) {
    status.set_state(v1::WORKER_STATE_DRAINING);
  } else if (!ready_.load()) {
    status.set_state(v1::WORKER_STATE_LOADING);
  } else {
    const absl::Status waiting = hooks.ready ? hooks.ready() : absl::OkStatus();
    status.set_state(waiting.ok() ? v1::WORKER_STATE_READY : v1::WORKER_STATE_WAITING);
    status.set_detail(std::string(waiting.message()));
  }
  CheckProgress(status);
  PublishMetrics();
}

// What others count is copied to /metrics at each heartbeat.
void WorkerCore::PublishMetrics() {
  if (!ready_.load()) return;  // the transport may not be there yet
  if (transport_ != nullptr) metrics_.SetTransport(transport_->statistics());
  if (config_.device() != "cuda") return;
  if (const auto memory = DeviceMemory(); memory.has_value()) metrics_.SetDeviceMemory(memory->free, memory->total);
}

void WorkerCore::CheckProgress(const v1::WorkerStatus& status) {
  const absl::Time now = MonotonicNow();
  longest_step_us_ = std::max(longest_step_us_, status.last_step_us());
  if (!status.work_pending() || status.steps() != watched_steps_) {
    watched_steps_ = status.steps();
    last_progress_ = now;
    return;
  }
  // A pass may be slow; it may not take much longer than the slowest one seen. The first has nothing to compare with.
  const absl::Duration base = Ms(config_.cluster.timers().watchdog_ms());
  const absl::Duration limit =
      longest_step_us_ == 0 ? kFirstPassFactor * base : base + 4 * absl::Microseconds(longest_step_us_);
  if (!environment_.watchdog || now - last_progress_ <= limit) return;
  spdlog::critical("{} {}: work is pending and no pass has ended for {}: exiting", RoleWord(config_.role),
                   config_.worker().name(), absl::FormatDuration(now - last_progress_));
  _exit(kExitStuck);
}

void WorkerCore::Drain(const std::function<void()>& refuse, const std::function<bool()>& idle, absl::Duration grace) {
  const absl::Time end = MonotonicNow() + grace;
  draining_.store(true);
  SetServing(false);
  if (join_ != nullptr) join_->AwaitHeard(std::min(grace, kDrainHeard));
  refuse();
  while (!idle() && MonotonicNow() < end) std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

void WorkerCore::Drain(EngineLoop* loop, absl::Duration grace) {
  Drain(
      [loop] {
        if (loop != nullptr) loop->Drain();
      },
      [loop] { return loop == nullptr || loop->Idle(); }, grace);
}

void WorkerCore::Shutdown() {
  if (server_ != nullptr) server_->Shutdown(kShutdownGrace);
  if (join_ != nullptr) join_->Stop();
  if (transport_ != nullptr) transport_->Close();
}

}  // namespace millrace
