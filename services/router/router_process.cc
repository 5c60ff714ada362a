// SPDX-License-Identifier: Apache-2.0
// Wiring: model texts, loop, registry, flow, the two fronts, three kinds of port; and their end in reverse.
#include "services/router/router_process.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/cache/cache_layout.h"
#include "engine/model/config.h"
#include "engine/numerics.h"
#include "engine/status.h"
#include "engine/text/chat_encoding.h"
#include "engine/text/tokenizer.h"
#include "services/common/metrics.h"
#include "services/common/rpc.h"
#include "services/common/startup_watch.h"
#include "services/common/trace_export.h"
#include "services/router/api_keys.h"
#include "services/router/cluster_service.h"
#include "services/router/cluster_status.h"
#include "services/router/http_server.h"
#include "services/router/http_tls.h"
#include "services/router/openai_api.h"
#include "services/router/request_flow.h"
#include "services/router/router_service.h"
#include "spdlog/spdlog.h"

namespace millrace::router {
namespace {

bool Off(const std::string& listen) { return listen == "off" || listen.empty(); }

absl::StatusOr<std::pair<std::string, uint16_t>> SplitListen(const std::string& field, const std::string& listen) {
  const size_t colon = listen.rfind(':');
  uint32_t port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(listen.substr(colon + 1), &port) || port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(field, ": found \"", listen, "\", expected host:port"));
  }
  std::string host = listen.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  return std::make_pair(host, static_cast<uint16_t>(port));
}

constexpr size_t kOperatorConnections = 64;

HttpLimits ConfiguredHttpLimits(const v1::RouterSection& section) {
  const v1::LimitSection& given = section.limits();
  HttpLimits limits;
  limits.max_connections = section.max_connections();
  limits.max_connections_per_address = given.max_connections_per_address();
  limits.max_header_bytes = given.max_header_bytes();
  limits.max_body_bytes = given.max_body_bytes();
  limits.max_body_bytes_total = given.max_body_bytes_total();
  limits.header_timeout = milliseconds(given.header_timeout_ms());
  limits.body_idle_timeout = milliseconds(given.body_idle_timeout_ms());
  limits.keep_alive_timeout = milliseconds(given.keep_alive_timeout_ms());
  limits.slow_reader_timeout = milliseconds(given.slow_reader_timeout_ms());
  limits.tcp_user_timeout = std::max(limits.tcp_user_timeout, 2 * limits.slow_reader_timeout);
  limits.soft_write_buffer_bytes = given.write_buffer_bytes();
  limits.hard_write_buffer_bytes = 4 * given.write_buffer_bytes();
  return limits;
}

ApiLimits ConfiguredApiLimits(const v1::RouterSection& section) {
  const v1::LimitSection& given = section.limits();
  ApiLimits limits;
  limits.max_requests = section.max_requests();
  limits.default_timeout = milliseconds(section.default_deadline_ms());
  limits.max_timeout = milliseconds(given.max_timeout_ms());
  limits.max_messages = given.max_messages();
  limits.max_tools = given.max_tools();
  limits.max_n = static_cast<int>(given.max_n());
  limits.max_stops = given.max_stops();
  return limits;
}

class RouterProcessImpl final : public RouterProcess {
 public:
  absl::Status Open(const v1::ClusterConfig& config) {
    config_ = config;
    RETURN_IF_ERROR(LoadModel());
    http_metrics_.emplace(registry_metrics_, model_.id);
    flow_metrics_.emplace(registry_metrics_);
    RETURN_IF_ERROR(OpenLocks(config.security()));
    SetBuildInfo(registry_metrics_);
    SetModelInfo(registry_metrics_, {.role = "router",
                                     .model = model_.id,
                                     .device = {},
                                     .numerics = config.model().numerics(),
                                     .kernel_set = {},
                                     .compat_hash = {}});
    const IncarnationId self = IncarnationId::Random();
    OpenTraces();
    const v1::TimerSection& timers = config.timers();
    registry_.emplace(RegistryOptions{.router = self,
                                      .heartbeat = milliseconds(timers.heartbeat_ms()),
                                      .dead_after = milliseconds(timers.dead_after_ms())});
    FlowOptions options;
    options.router = self;
    options.security = security_;
    options.end_ids = {model_config_.eos_token_id};
    options.max_requests = static_cast<int>(config.router().max_requests());
    options.queue_timeout = milliseconds(config.router().queue_timeout_ms());
    options.lease_ttl = milliseconds(timers.lease_ttl_ms());
    options.abort_timeout = milliseconds(timers.abort_timeout_ms());
    options.default_deadline = milliseconds(config.router().default_deadline_ms());
    options.max_deadline = milliseconds(config.router().limits().max_timeout_ms());
    flow_.emplace(loop_, *registry_, options, *flow_metrics_);
    cluster_service_.emplace(loop_, *registry_, security_);
    RETURN_IF_ERROR(OpenInternal());
    return OpenFronts();
  }

  ~RouterProcessImpl() override {
    // Fronts first, so that nobody starts what the flow would have to end; then workers' streams; then the loop.
    http_.reset();
    operator_.reset();
    if (public_grpc_ != nullptr) public_grpc_->Shutdown(absl::ZeroDuration());
    public_grpc_.reset();
    api_.reset();
    flow_.reset();
    if (registry_) loop_.Call([this](TimePoint) { registry_->CloseAll("the router is shutting down"); });
    if (internal_grpc_ != nullptr) internal_grpc_->Shutdown(absl::Milliseconds(500));
    internal_grpc_.reset();
    // What the streams' ends have posted refers to the registry, which goes before the loop does.
    loop_.Call([](TimePoint) {});
  }

  void WaitAndDrain(const StopSignal& stop) override {
    stop.Wait();
    const auto grace = milliseconds(config_.timers().drain_grace_ms());
    spdlog::info("draining: {} generations are running", flow_->open_generations());
    if (public_grpc_ != nullptr) public_grpc_->SetServing(false);
    if (api_ != nullptr) api_->BeginDrain();
    flow_->StopAccepting();
    if (http_ != nullptr) http_->BeginDrain();
    const TimePoint until = std::chrono::steady_clock::now() + grace;
    const auto busy = [this] { return flow_->open_generations() > 0 || (api_ != nullptr && api_->num_requests() > 0); };
    while (busy() && std::chrono::steady_clock::now() < until) std::this_thread::sleep_for(milliseconds(20));
    if (busy()) spdlog::warn("drain grace is over: ending {} generations", flow_->open_generations());
  }

  std::string http_address() const override { return http_address_; }
  std::string operator_address() const override { return operator_address_; }
  std::string grpc_address() const override { return public_grpc_ == nullptr ? "" : public_grpc_->address(); }
  std::string control_address() const override { return internal_grpc_->address(); }

 private:
  absl::Status LoadModel() {
    const v1::ModelSection& section = config_.model();
    StartupWatch watch("router", absl::Milliseconds(config_.timers().startup_timeout_ms()));
    watch.Waiting(absl::StrCat("config.json and tokenizer.json in ", section.path()));
    ASSIGN_OR_RETURN(model_config_, ModelConfig::Load(section.path()));
    ASSIGN_OR_RETURN(tokenizer_, text::Tokenizer::Load(section.path() + "/tokenizer.json",
                                                       static_cast<int>(model_config_.vocab_size)));
    const bool exact = section.numerics() == "exact" ||
                       (section.numerics().empty() && model_config_.weight_format == WeightFormat::kPlain);
    numerics_ = exact ? Numerics::kExact : Numerics::kRelease;
    cache_json_ = CacheJson(CacheLayout::Make(model_config_, numerics_, /*mtp=*/false));
    model_.id = section.id();
    model_.created_unix_s = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
    int64_t context = model_config_.max_position_embeddings;
    if (section.max_context_tokens() > 0) {
      context = std::min<int64_t>(context, static_cast<int64_t>(section.max_context_tokens()));
    }
    model_.context_length = static_cast<int32_t>(std::min<int64_t>(context, INT32_MAX));
    model_.vocab_size = static_cast<int32_t>(model_config_.vocab_size);
    model_.tokenizer = tokenizer_.get();
    model_.chat_defaults.release =
        model_config_.dspark ? text::EncoderRelease::kDspark : text::EncoderRelease::kPreview;
    model_.chat_defaults.thinking = config_.router().default_thinking();
    model_.max_tokens_limit = static_cast<int32_t>(config_.router().max_tokens_limit());
    model_.default_max_tokens = static_cast<int32_t>(config_.router().default_max_tokens());
    return absl::OkStatus();
  }

  absl::Status OpenLocks(const v1::SecuritySection& section) {
    if (section.has_tls()) {
      ASSIGN_OR_RETURN(security_, PeerSecurity::Create(section.tls(), PeerRole::kRouter));
    }
    if (section.has_public_tls()) {
      ASSIGN_OR_RETURN(public_credentials_, MakePublicServerCredentials(section.public_tls()));
      ASSIGN_OR_RETURN(public_tls_, HttpTls::Open(section.public_tls().certificate(), section.public_tls().key()));
    }
    if (!section.api_keys_file().empty()) {
      ASSIGN_OR_RETURN(keys_, ApiKeys::Open(section.api_keys_file()));
    }
    return absl::OkStatus();
  }

  // Records are kept for whoever asks; they leave this process only where a collector is named.
  void OpenTraces() {
    TraceLogOptions options;
    if (const v1::TracingSection& section = config_.tracing(); !section.otlp_endpoint().empty()) {
      TraceExporterOptions exporter;
      exporter.endpoint = section.otlp_endpoint();
      exporter.max_queued_spans = section.max_queued_spans();
      exporter.role = "router";
      exporter.instance = "router";
      exporter.version = kVersion;
      exporter.model = model_.id;
      exporter_.emplace(std::move(exporter), &registry_metrics_);
      options.sample_ratio = section.sample_ratio();
      options.on_sampled = [this](const TraceView& view) { exporter_->Export(view); };
    }
    traces_.emplace(std::move(options));
  }

  absl::Status OpenInternal() {
    RpcServerOptions options;
    options.listen = config_.router().control_listen();
    if (security_ != nullptr) options.credentials = security_->MakeServerCredentials();
    options.service_names = {v1::Cluster::service_full_name()};
    ASSIGN_OR_RETURN(internal_grpc_, RpcServer::Start(options, {&*cluster_service_}));
    internal_grpc_->SetServing(true);
    return absl::OkStatus();
  }

  absl::Status OpenFronts() {
    const v1::RouterSection& section = config_.router();
    const ApiLimits limits = ConfiguredApiLimits(section);
    OpenAiApiOptions api;
    api.model = model_;
    api.limits = limits;
    api.version = absl::StrCat("millrace ", kVersion);
    api.generations = &*flow_;
    api.registry = &registry_metrics_;
    api.metrics = &*http_metrics_;
    api.keys = keys_.get();
    api.operator_hosts.assign(section.operator_hosts().begin(), section.operator_hosts().end());
    api.traces = &*traces_;
    api.metric_names.assign(config_.metrics().compatibility().begin(), config_.metrics().compatibility().end());
    api.status = [this] { return ClusterJson(); };
    api.drain_worker = [this](const std::string& name) {
      absl::Status status;
      loop_.Call([&](TimePoint) { status = registry_->Drain(name, "the operator asked"); });
      return status;
    };
    api_ = std::make_unique<OpenAiApi>(std::move(api));
    if (!Off(section.http_listen())) {
      HttpServerOptions options;
      options.limits = ConfiguredHttpLimits(section);
      options.gate = api_->PublicGate();
      options.tls = public_tls_;
      ASSIGN_OR_RETURN(http_, OpenHttp("router.http_listen", section.http_listen(), std::move(options),
                                       api_->PublicHandler(), http_address_));
    }
    if (!Off(section.operator_listen())) {
      HttpServerOptions options;
      options.limits.max_connections = kOperatorConnections;
      ASSIGN_OR_RETURN(operator_, OpenHttp("router.operator_listen", section.operator_listen(), std::move(options),
                                           api_->OperatorHandler(), operator_address_));
    }
    if (!Off(section.grpc_listen())) {
      RouterServiceOptions service;
      service.model = model_;
      service.limits = limits;
      service.generations = &*flow_;
      service.keys = keys_.get();
      service.traces = &*traces_;
      service.numerics = NumericsName(numerics_);
      inference_ = std::make_unique<RouterService>(std::move(service));
      RpcServerOptions options;
      options.listen = section.grpc_listen();
      options.max_receive_bytes = kMaxPublicMessageBytes;
      options.credentials = public_credentials_;
      options.service_names = {v1::Inference::service_full_name()};
      ASSIGN_OR_RETURN(public_grpc_, RpcServer::Start(options, {inference_.get()}));
      public_grpc_->SetServing(true);
    }
    return absl::OkStatus();
  }

  Json ClusterJson() const {
    const absl::Status ready = flow_->Ready();
    return Json{{"ready", ready.ok()},
                {"reason", std::string(ready.message())},
                {"open_generations", flow_->open_generations()},
                {"queued_generations", flow_metrics_->queued()},
                {"open_attempts", flow_->open_attempts()},
                {"tokens_forwarded", static_cast<int64_t>(flow_metrics_->tokens.Value())},
                {"cache", cache_json_},
                {"workers", WorkersJson(*flow_->snapshot(), std::chrono::steady_clock::now())}};
  }

  absl::StatusOr<std::unique_ptr<HttpServer>> OpenHttp(const std::string& field, const std::string& listen,
                                                       HttpServerOptions options, HttpHandler handler,
                                                       std::string& bound) {
    ASSIGN_OR_RETURN(const auto address, SplitListen(field, listen));
    options.address = address.first;
    options.port = address.second;
    options.metrics = &*http_metrics_;
    absl::StatusOr<std::unique_ptr<HttpServer>> server = HttpServer::Start(std::move(options), std::move(handler));
    if (!server.ok()) {
      return absl::Status(server.status().code(), absl::StrCat(field, " ", listen, ": ", server.status().message()));
    }
    bound = absl::StrCat(listen.substr(0, listen.rfind(':')), ":", (*server)->port());
    return server;
  }

  v1::ClusterConfig config_;
  ModelConfig model_config_;
  std::unique_ptr<text::Tokenizer> tokenizer_;
  Numerics numerics_ = Numerics::kRelease;
  Json cache_json_;
  ServedModel model_;
  prometheus::Registry registry_metrics_;
  std::optional<HttpMetrics> http_metrics_;
  std::optional<FlowMetrics> flow_metrics_;
  std::shared_ptr<const PeerSecurity> security_;                 // null: no security.tls
  std::shared_ptr<grpc::ServerCredentials> public_credentials_;  // null, as the next: no security.public_tls
  std::shared_ptr<HttpTls> public_tls_;
  std::unique_ptr<ApiKeys> keys_;  // null: no security.api_keys_file
  std::optional<TraceExporter> exporter_;
  std::optional<TraceLog> traces_;
  EventLoop loop_{"router-loop"};
  std::optional<WorkerRegistry> registry_;
  std::optional<RequestFlow> flow_;
  std::optional<ClusterService> cluster_service_;
  std::unique_ptr<RpcServer> internal_grpc_;
  std::unique_ptr<OpenAiApi> api_;
  std::unique_ptr<RouterService> inference_;
  std::unique_ptr<RpcServer> public_grpc_;
  std::unique_ptr<HttpServer> http_, operator_;
  std::string http_address_, operator_address_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RouterProcess>> RouterProcess::Start(const v1::ClusterConfig& config) {
  auto process = std::make_unique<RouterProcessImpl>();
  RETURN_IF_ERROR(process->Open(config));
  return process;
}

}  // namespace millrace::router
