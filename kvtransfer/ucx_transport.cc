// SPDX-License-Identifier: Apache-2.0
// Start, configuration, driving and the end of the UCX transport; the contract is in ucx_transport.h and transport.h,
// and what happens in between is in the files that ucx_transport_impl.h names.
#include "kvtransfer/ucx_transport.h"

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "kvtransfer/ucx_transport_impl.h"

namespace millrace::kvtransfer {
namespace ucx {
namespace {

// Progress is bounded so that tasks and timers get their turn under a flood.
constexpr int kMaxProgressRounds = 64;
// UCX's own thread may still hand a connection to a listener that is being destroyed (a crash seen with 1.22). Whoever
// connects says its first word within a millisecond, so the listener is kept, refusing, a little longer than anything
// else.
constexpr absl::Duration kListenerDrain = absl::Milliseconds(10);
// Up to here a message goes at once and is copied on arrival instead of being announced first. UCX's own choice is 8
// KiB on TCP, where the announcement costs more than the copy: 64 KiB take 50 us this way and 67 that way, 256 KiB the
// same (1.13, loopback, transport_bench). UCX_RNDV_THRESH overrides it.
constexpr size_t kEagerBytes = 128u << 10;

// UCX reads its configuration from the environment; what an operator set there wins over our defaults.
void ApplyDefault(ucp_config_t* config, const char* name, const char* value) {
  if (std::getenv(absl::StrCat("UCX_", name).c_str()) == nullptr) (void)ucp_config_modify(config, name, value);
}

bool ConfinedTo(const std::string& listen_address) {
  return !listen_address.empty() && listen_address != "0.0.0.0" && listen_address != "::";
}

}  // namespace

absl::Status UcxTransport::Start() {
  unsigned major = 0, minor = 0, release = 0;
  ucp_get_version(&major, &minor, &release);
  ucx_major_ = static_cast<uint16_t>(major), ucx_minor_ = static_cast<uint16_t>(minor);

  ucp_config_t* config = nullptr;
  RETURN_IF_ERROR(ToStatus(ucp_config_read(nullptr, nullptr, &config), "reading UCX's configuration"));
  ApplyDefault(config, "KEEPALIVE_INTERVAL", "1s");
  ApplyDefault(config, "KEEPIDLE", "2s");
  ApplyDefault(config, "KEEPINTVL", "1s");
  eager_bytes_ = std::getenv("UCX_RNDV_THRESH") != nullptr ? 0 : kEagerBytes;
  if (ConfinedTo(options_.listen_address)) {
    auto here = internal::FindLocalAddress(options_.listen_address);
    if (!here.ok()) {
      ucp_config_release(config);
      return absl::FailedPreconditionError(here.status().message());
    }
    ApplyDefault(config, "NET_DEVICES", here->interface.c_str());  // lanes listen too
    confined_to_ = here->address;
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.name = options_.name.c_str();
  const ucs_status_t started = ucp_init(&params, config, &context_);
  ucp_config_release(config);
  if (started != UCS_OK) {
    return absl::FailedPreconditionError(
        absl::StrCat("UCX cannot start: ", ucs_status_string(started), " (look at UCX_TLS and UCX_NET_DEVICES)"));
  }
  ucp_context_attr_t context_attributes{};
  context_attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  if (ucp_context_query(context_, &context_attributes) == UCS_OK)
    has_cuda_ = (context_attributes.memory_types & UCS_BIT(UCS_MEMORY_TYPE_CUDA)) != 0;

  ucp_worker_params_t worker_params{};
  worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  if (const ucs_status_t status = ucp_worker_create(context_, &worker_params, &worker_); status != UCS_OK) {
    return absl::FailedPreconditionError(absl::StrCat("UCX finds no usable transport: ", ucs_status_string(status),
                                                      " (look at UCX_TLS and UCX_NET_DEVICES)"));
  }
  RETURN_IF_ERROR(ToStatus(ucp_worker_get_efd(worker_, &worker_fd_), "getting the worker's descriptor"));

  ucp_worker_attr_t attributes{};
  attributes.field_mask = UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER;
  RETURN_IF_ERROR(ToStatus(ucp_worker_query(worker_, &attributes), "asking for the longest header"));
  if (attributes.max_am_header < sizeof(MessageFrame) + kMaxHeaderBytes) {
    return absl::FailedPreconditionError(absl::StrCat("UCX carries headers of ", attributes.max_am_header,
                                                      " bytes, need ", sizeof(MessageFrame) + kMaxHeaderBytes));
  }
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kAmId;
  handler.arg = this;
  handler.cb = [](void* self, const void* header, size_t header_bytes, void* data, size_t bytes,
                  const ucp_am_recv_param_t* param) {
    return static_cast<UcxTransport*>(self)->OnMessage(header, header_bytes, data, bytes, param);
  };
  RETURN_IF_ERROR(ToStatus(ucp_worker_set_am_recv_handler(worker_, &handler), "setting the message handler"));
  RETURN_IF_ERROR(Listen());
  driver_.Start();
  return absl::OkStatus();
}

// UCX moves a card's memory with the context that it finds on the thread.
void UcxTransport::EnterThread() {
  if (!has_cuda_ || !options_.memory.attach) return;
  if (const absl::Status attached = options_.memory.attach(); !attached.ok()) {
    Log(absl::StrCat("device memory cannot be moved on this thread: ", attached.ToString()));
  }
}

bool UcxTransport::Progress() {
  if (pump_) Pump();
  bool busy = false;
  for (int round = 0; round < kMaxProgressRounds && ucp_worker_progress(worker_) != 0; ++round) busy = true;
  // What the callbacks left. Most rounds have nothing of it.
  if (!requests_.empty() || !hellos_.empty() || !failed_links_.empty() || !failing_.empty() ||
      !new_connections_.empty()) {
    busy = true;
    for (ucp_conn_request_h request : std::exchange(requests_, {})) Accept(request);
    for (const auto& [hello, ep] : std::exchange(hellos_, {})) OnHello(hello, ep);
    for (const auto& peer : std::exchange(new_connections_, {})) ReportLanes(*peer);
    for (const auto& link : std::exchange(failed_links_, {})) {
      const std::shared_ptr<Peer> peer = link->peer;
      if (peer != nullptr && peer->link == link && peer->state == Peer::State::kConnecting)
        AttemptFailed(peer, "connection refused or lost");
      else
        CloseLink(link);
    }
    for (const auto& peer : std::exchange(failing_, {})) BeginClose(peer);
  }
  if (!closing_.empty() || !closing_links_.empty()) busy |= Bury();
  if (closing_all_ && closing_.empty() && failing_.empty() && links_.empty() && closing_links_.empty())
    all_closed_ = true;
  if (pump_) Pump(), busy = true;
  return busy;
}

void UcxTransport::Close() {
  {
    std::lock_guard lock(mu_);
    if (std::exchange(closed_, true)) return;
  }
  if (listener_ != nullptr) {
    driver_.Post([this] {
      std::vector<std::shared_ptr<Peer>> all;
      {
        std::lock_guard lock(mu_);
        for (const auto& [id, peer] : peers_) all.push_back(peer);
      }
      for (const auto& peer : all) {
        peer->by_our_close = true;
        if (peer->state == Peer::State::kReady && !peer->failing) SendControl(peer, MessageType::kGoodbye);
        MarkFailed(peer, absl::CancelledError("transport closed"));
      }
      for (const auto& [ep, link] : std::exchange(links_, {})) {
        if (link->peer == nullptr)
          CloseLink(link);  // nobody's yet
        else
          links_[ep] = link;
      }
      closing_all_ = true;
    });
    // Bounded by UCX's forced close. If that hangs, the worker's destruction below ends what it carried.
    if (!driver_.WaitFor([this] { return all_closed_.load(); }, 2 * kCloseWarning))
      Log("closing took too long; destroying the worker with connections open");
    (void)driver_.WaitFor([] { return false; }, kListenerDrain);
  }
  for (Task& task : driver_.Stop()) task();  // sends and disconnects that came last: they find their peers gone
  if (listener_ != nullptr) {
    for (ucp_conn_request_h request : std::exchange(requests_, {})) (void)ucp_listener_reject(listener_, request);
    ucp_listener_destroy(std::exchange(listener_, nullptr));
  }
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  for (const auto& peer : std::exchange(closing_, {})) Retire(*peer);
  links_.clear();
  closing_links_.clear();
  if (context_ != nullptr) ucp_cleanup(context_);
  worker_ = nullptr;
  context_ = nullptr;
  all_closed_ = true;
}

std::string UcxTransport::Describe() const {
  auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return absl::StrCat(name, "=", value == nullptr ? "(unset)" : value);
  };
  return absl::StrCat("UCX ", UcxVersion(), ", device memory ", has_cuda_ ? "supported" : "not supported", ", ",
                      variable("UCX_TLS"), " ", variable("UCX_NET_DEVICES"), ", address ", address_.size(),
                      " bytes, in flight at most ", options_.max_in_flight_bytes_per_peer >> 20, " MiB a peer and ",
                      options_.max_in_flight_bytes >> 20, " MiB in all");
}

}  // namespace ucx

bool UcxAvailable() { return true; }

std::string UcxVersion() {
  unsigned major = 0, minor = 0, release = 0;
  ucp_get_version(&major, &minor, &release);
  return absl::StrCat(major, ".", minor, ".", release);
}

absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(TransportOptions options) {
  auto transport = std::make_unique<ucx::UcxTransport>(std::move(options));
  RETURN_IF_ERROR(transport->Start());
  return std::unique_ptr<Transport>(std::move(transport));
}

}  // namespace millrace::kvtransfer
