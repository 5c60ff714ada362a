// SPDX-License-Identifier: Apache-2.0
// Messages over UCX active messages; the contract is in ucx_transport.h and transport.h.
//
// A connection is made through a listener (UCX's client-server mode), then a hello and its answer exchange tokens. So
// both sides hold an endpoint, get its errors, can answer, and can close it by force, which is the fence: a rendezvous
// over TCP or RDMA may write to our memory until the endpoint is down, even after its request completed with an error.
// Therefore what ends in error is kept back until the forced close has completed, and only then told to the owner of
// the memory (Retire).
//
// Why not worker addresses: UCX 1.13 aborts the process if the other end of a connection dies during their handshake
// (ucp_request.c:684, "got REP message"). Through a listener the same death is an error of one endpoint.
//
// If both sides connect at the same moment, the connection begun by the smaller incarnation stays and the other is
// closed.
//
// Who may touch what: everything of UCX, and every member without a lock's name, only under the drive lock (driver.h),
// that is in tasks, in Progress and in UCX's callbacks. UCX's callbacks must neither progress nor close, so they leave
// requests, failures and hellos in lists that Progress works through.
#include "kvtransfer/ucx_transport.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <ucp/api/ucp.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kvtransfer/counters.h"
#include "kvtransfer/driver.h"
#include "kvtransfer/status.h"
#include "kvtransfer/ucx_wire.h"

namespace millrace::kvtransfer {
namespace {

using internal::Driver;
using internal::Hello;
using internal::MessageFrame;
using internal::MessageType;
using Task = absl::AnyInvocable<void()>;

constexpr unsigned kAmId = 1;
// Progress is bounded so that tasks and timers get their turn under a flood.
constexpr int kMaxProgressRounds = 64;
// A message occupies the wire with its header too; without this, endless empty messages would cost nothing.
constexpr size_t kMessageCost = 1024;
// UCX's own thread may still hand a connection to a listener that is being destroyed (a crash seen with 1.22). Whoever
// connects says its first word within a millisecond, so the listener is kept, refusing, a little longer than anything
// else.
constexpr absl::Duration kListenerDrain = absl::Milliseconds(10);
// Up to here a message goes at once and is copied on arrival instead of being announced first. UCX's own choice is 8
// KiB on TCP, where the announcement costs more than the copy: 64 KiB take 50 us this way and 67 that way, 256 KiB the
// same (1.13, loopback, transport_bench). UCX_RNDV_THRESH overrides it.
constexpr size_t kEagerBytes = 128u << 10;
// After a forced close UCX completes what was outstanding within milliseconds. If it does not, we say so and keep the
// memory: it is not safe to give it back.
constexpr absl::Duration kCloseWarning = absl::Seconds(5);

absl::Status ToStatus(ucs_status_t status, absl::string_view doing) {
  if (status == UCS_OK) return absl::OkStatus();
  const std::string text = absl::StrCat(doing, ": ", ucs_status_string(status));
  switch (status) {
    case UCS_ERR_CANCELED:
      return absl::CancelledError(text);
    case UCS_ERR_NO_MEMORY:
    case UCS_ERR_NO_RESOURCE:
      return absl::ResourceExhaustedError(text);
    case UCS_ERR_INVALID_PARAM:
    case UCS_ERR_UNSUPPORTED:
      return absl::FailedPreconditionError(text);
    default:
      return absl::UnavailableError(text);
  }
}

ucs_memory_type_t ToUcx(MemoryKind kind) {
  return kind == MemoryKind::kHost ? UCS_MEMORY_TYPE_HOST : UCS_MEMORY_TYPE_CUDA;
}

sockaddr_storage ToSockaddr(const internal::IpAddress& ip, uint16_t port) {
  sockaddr_storage storage{};
  if (ip.is_v6) {
    auto& v6 = reinterpret_cast<sockaddr_in6&>(storage);
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(port);
    std::memcpy(&v6.sin6_addr, ip.bytes.data(), 16);
  } else {
    auto& v4 = reinterpret_cast<sockaddr_in&>(storage);
    v4.sin_family = AF_INET;
    v4.sin_port = htons(port);
    std::memcpy(&v4.sin_addr, ip.bytes.data(), 4);
  }
  return storage;
}

socklen_t SockaddrBytes(const sockaddr_storage& address) {
  return address.ss_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
}

struct Peer;

struct Send {
  uint64_t id = 0;
  std::shared_ptr<Peer> peer;
  std::string head;  // frame and header, as UCX sends them
  ConstMemory payload;
  SendDone done;
  bool counted = true;  // a message of our user, not one of ours
  size_t cost() const { return payload.bytes + kMessageCost; }
};

struct Arrival {
  std::shared_ptr<Peer> peer;
  size_t bytes = 0;
  ArrivalDone done;
};

class UcxTransport;

// One UCX endpoint. A peer has one, or two while both sides connect at once, or when it is ourselves.
struct Link {
  ucp_ep_h ep = nullptr;
  std::shared_ptr<Peer> peer;  // null until the hello of an accepted link
  bool failed = false;         // UCX reported an error
  bool closing = false;
  bool closed = false;
};

struct Peer {
  enum class State { kConnecting, kReady, kClosing };

  UcxTransport* owner = nullptr;
  PeerId id;
  uint64_t incarnation = 0;
  uint64_t token = 0;                        // ours: in frames that come
  uint64_t remote_token = 0;                 // theirs: in frames that go; 0 until known
  std::vector<sockaddr_storage> candidates;  // where it may be reached, best first
  size_t attempts = 0;                       // candidates tried
  State state = State::kConnecting;
  std::shared_ptr<Link> link;                // what sends go over
  std::vector<std::shared_ptr<Link>> links;  // all that it ever had and that are not closed
  std::deque<std::unique_ptr<Send>> queue;
  size_t on_wire = 0, cost_on_wire = 0, arriving = 0;
  bool failing = false;  // in failing_, or beyond
  bool was_ready = false;
  bool by_our_close = false;
  absl::Status why;
  std::vector<std::unique_ptr<Send>> failed_sends;        // told in Retire
  std::vector<std::unique_ptr<Arrival>> failed_arrivals;  // told in Retire
  std::vector<Task> fenced;

  std::atomic<size_t> accepted{0};  // sends not yet on the wire
  std::atomic<bool> gone{false};
};

class UcxTransport final : public Transport, private Driver::Engine {
 public:
  explicit UcxTransport(TransportOptions options)
      : options_(std::move(options)), driver_(*this, options_.spin, options_.linger) {}
  ~UcxTransport() override { Close(); }

  absl::Status Start();

  const std::string& address() const override { return address_; }
  bool Supports(MemoryKind kind) const override { return kind == MemoryKind::kHost || has_cuda_; }
  void SetHandler(uint16_t channel, MessageHandler* handler) override {
    CHECK(channel < kMaxChannels, absl::StrCat("channel ", channel));
    driver_.Exclusively([&] { handlers_[channel] = handler; });
  }
  void OnPeerFailed(PeerFailed callback) override {
    std::lock_guard lock(mu_);
    on_peer_failed_.push_back(std::move(callback));
  }
  absl::StatusOr<PeerId> Connect(absl::string_view address) override;
  absl::StatusOr<SendId> SendMessage(PeerId peer_id, uint16_t channel, absl::Span<const uint8_t> header,
                                     ConstMemory payload, SendDone done) override;
  void Cancel(SendId send) override {
    driver_.Post([this, send] { CancelQueued(send); });
  }
  void Disconnect(PeerId peer, Task fenced) override;
  void RunAfter(absl::Duration delay, Task callback) override { driver_.RunAfter(delay, std::move(callback)); }
  bool WaitFor(absl::FunctionRef<bool()> done, absl::Duration timeout) override {
    return driver_.WaitFor(done, timeout);
  }
  void SendAtOnce(absl::FunctionRef<void()> post) override { driver_.PostAtOnce(post); }
  void Close() override;
  TransportStatistics statistics() const override { return counters_.snapshot(); }
  std::string Describe() const override;

 private:
  // Engine
  bool Progress() override;
  bool Bury();
  bool Arm() override { return ucp_worker_arm(worker_) == UCS_OK; }
  int fd() const override { return worker_fd_; }

  // Connections
  absl::Status Listen();
  void Attempt(const std::shared_ptr<Peer>& peer);
  void AttemptFailed(const std::shared_ptr<Peer>& peer, const std::string& why);
  std::shared_ptr<Link> Accept(ucp_conn_request_h request);
  std::shared_ptr<Link> MakeLink(ucp_ep_params_t params, ucs_status_t& status);
  void OnLinkError(ucp_ep_h ep, ucs_status_t status);
  void CloseLink(const std::shared_ptr<Link>& link);
  void SendControl(const std::shared_ptr<Peer>& peer, MessageType type);
  void OnHello(const Hello& hello, ucp_ep_h ep);
  void OnHelloAnswer(const std::shared_ptr<Peer>& peer, const Hello& hello);
  void BecomeReady(const std::shared_ptr<Peer>& peer, uint64_t remote_token);
  void MarkFailed(const std::shared_ptr<Peer>& peer, absl::Status why);
  void BeginClose(const std::shared_ptr<Peer>& peer);
  void Retire(Peer& peer);
  void ReportLanes(const Peer& peer);

  // Messages
  void Pump();
  void Launch(std::unique_ptr<Send> send, uint32_t flags);
  void SendEnded(std::unique_ptr<Send> send, ucs_status_t status);
  void FinishSend(Send& send, const absl::Status& status);
  void CancelQueued(SendId id);
  ucs_status_t OnMessage(const void* header, size_t header_bytes, void* data, size_t bytes,
                         const ucp_am_recv_param_t* param);
  ucs_status_t OnData(const std::shared_ptr<Peer>& peer, const MessageFrame& frame, absl::Span<const uint8_t> header,
                      void* data, size_t bytes, uint64_t flags);
  ucs_status_t ReceiveInto(std::unique_ptr<Arrival> arrival, Memory destination, void* data);
  void ArrivalEnded(std::unique_ptr<Arrival> arrival, const absl::Status& status);

  void Log(const std::string& line) const {
    if (options_.log)
      options_.log(line);
    else
      std::fprintf(stderr, "%s ucx: %s\n", options_.name.c_str(), line.c_str());
  }
  std::shared_ptr<Peer> Find(PeerId id) const {
    std::lock_guard lock(mu_);
    auto it = peers_.find(id.value);
    return it == peers_.end() ? nullptr : it->second;
  }
  std::shared_ptr<Peer> AddPeerLocked(uint64_t incarnation);

  const TransportOptions options_;
  internal::Counters counters_;

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_listener_h listener_ = nullptr;
  std::optional<internal::IpAddress> confined_to_;  // listen_address, if it names one
  int worker_fd_ = -1;
  bool has_cuda_ = false;
  size_t eager_bytes_ = kEagerBytes;
  uint16_t ucx_major_ = 0, ucx_minor_ = 0;
  uint64_t incarnation_ = 0, host_id_ = 0;
  std::string address_;

  // Under the drive lock.
  MessageHandler* handlers_[kMaxChannels] = {};
  absl::flat_hash_map<uint64_t, std::shared_ptr<Peer>> by_token_;
  absl::flat_hash_map<ucp_ep_h, std::shared_ptr<Link>> links_;  // open ones; UCX may use a closed one's handle again
  std::vector<std::shared_ptr<Link>> closing_links_;
  std::vector<ucp_conn_request_h> requests_;            // to be accepted
  std::vector<std::pair<Hello, ucp_ep_h>> hellos_;      // to be answered
  std::vector<std::shared_ptr<Peer>> new_connections_;  // whose lanes are to be reported
  std::vector<std::shared_ptr<Link>> failed_links_;     // to be dealt with
  std::vector<std::shared_ptr<Peer>> failing_;          // to be closed
  std::vector<std::shared_ptr<Peer>> closing_;          // being closed
  size_t cost_on_wire_ = 0;
  bool pump_ = false;
  bool closing_all_ = false;

  mutable std::mutex mu_;
  std::map<uint64_t, std::shared_ptr<Peer>> peers_;                      // guarded by mu_; live ones
  absl::flat_hash_map<uint64_t, std::shared_ptr<Peer>> by_incarnation_;  // guarded by mu_; live ones
  std::vector<PeerFailed> on_peer_failed_;                               // guarded by mu_
  std::mt19937_64 random_{std::random_device{}()};                       // guarded by mu_
  uint64_t next_id_ = 0;                                                 // guarded by mu_
  bool closed_ = false;                                                  // guarded by mu_
  std::atomic<bool> all_closed_{false};

  Driver driver_;  // last: its thread uses all of the above
};

// UCX reads its configuration from the environment; what an operator set there wins over our defaults.
void ApplyDefault(ucp_config_t* config, const char* name, const char* value) {
  if (std::getenv(absl::StrCat("UCX_", name).c_str()) == nullptr) (void)ucp_config_modify(config, name, value);
}

bool ConfinedTo(const std::string& listen_address) {
  return !listen_address.empty() && listen_address != "0.0.0.0" && listen_address != "::";
}

absl::Status UcxTransport::Start() {
  unsigned major = 0, minor = 0, release = 0;
  ucp_get_version(&major, &minor, &release);
  ucx_major_ = static_cast<uint16_t>(major), ucx_minor_ = static_cast<uint16_t>(minor);

  ucp_config_t* config = nullptr;
  RETURN_IF_ERROR(ToStatus(ucp_config_read(nullptr, nullptr, &config), "reading UCX's configuration"));
  ApplyDefault(config, "KEEPALIVE_INTERVAL", "1s");
  ApplyDefault(config, "KEEPIDLE", "2s");
  ApplyDefault(config, "KEEPINTVL", "1s");
  if (std::getenv("UCX_RNDV_THRESH") != nullptr) eager_bytes_ = 0;
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

// ---- connections ----

absl::Status UcxTransport::Listen() {
  const char* devices = std::getenv("UCX_NET_DEVICES");
  internal::UcxAddress address;
  address.ucx_major = ucx_major_, address.ucx_minor = ucx_minor_;
  address.incarnation = incarnation_ = random_();
  address.host_id = host_id_ = internal::HostId();
  internal::LocalAddresses local = internal::FindLocalAddresses(devices == nullptr ? "" : devices);
  if (confined_to_) local = {{*confined_to_}, true};
  // One listener: IPv4, unless this host has only IPv6. On the address of the named device if that is one, else on all.
  const bool v6 = !local.addresses.empty() && local.addresses.front().is_v6;
  std::erase_if(local.addresses, [&](const internal::IpAddress& ip) { return ip.is_v6 != v6; });
  const bool bind_to_one = local.chosen && local.addresses.size() == 1;
  local.addresses.resize(std::min(local.addresses.size(), internal::kMaxAddresses - 1));
  if (!bind_to_one) local.addresses.push_back(v6 ? internal::kLoopbackV6 : internal::kLoopbackV4);
  address.addresses = local.addresses;

  const internal::IpAddress any{v6, {}};
  const sockaddr_storage here = ToSockaddr(bind_to_one ? local.addresses.front() : any, options_.listen_port);
  ucp_listener_params_t params{};
  params.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
  params.sockaddr = {reinterpret_cast<const sockaddr*>(&here), SockaddrBytes(here)};
  params.conn_handler.arg = this;
  params.conn_handler.cb = [](ucp_conn_request_h request, void* self) {
    static_cast<UcxTransport*>(self)->requests_.push_back(request);
  };
  if (const ucs_status_t status = ucp_listener_create(worker_, &params, &listener_); status != UCS_OK) {
    listener_ = nullptr;
    return absl::FailedPreconditionError(absl::StrCat("UCX cannot listen on ",
                                                      internal::ToString(bind_to_one ? local.addresses.front() : any),
                                                      " port ", options_.listen_port, ": ", ucs_status_string(status)));
  }
  ucp_listener_attr_t attributes{};
  attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
  RETURN_IF_ERROR(ToStatus(ucp_listener_query(listener_, &attributes), "asking for the listener's port"));
  const auto* bound =
      reinterpret_cast<const sockaddr_in*>(&attributes.sockaddr);  // IPv6 has its port at the same place
  address.port = ntohs(bound->sin_port);
  address_ = internal::EncodeAddress(address);
  return absl::OkStatus();
}

absl::StatusOr<PeerId> UcxTransport::Connect(absl::string_view address) {
  ASSIGN_OR_RETURN(const internal::UcxAddress decoded, internal::DecodeAddress(address, ucx_major_, ucx_minor_));
  std::shared_ptr<Peer> peer;
  {
    std::lock_guard lock(mu_);
    if (closed_) return absl::CancelledError("transport is closed");
    if (auto it = by_incarnation_.find(decoded.incarnation); it != by_incarnation_.end()) return it->second->id;
    if (peers_.size() >= options_.max_peers)
      return absl::ResourceExhaustedError(absl::StrCat(peers_.size(), " peers, limit ", options_.max_peers));
    peer = AddPeerLocked(decoded.incarnation);
  }
  for (const internal::IpAddress& ip : decoded.addresses) {
    const bool loopback = ip == internal::kLoopbackV4 || ip == internal::kLoopbackV6;
    if (!loopback) peer->candidates.push_back(ToSockaddr(ip, decoded.port));
    // On our own host the loopback address is the surest way; elsewhere it would be somebody else.
    if (loopback && decoded.host_id == host_id_)
      peer->candidates.insert(peer->candidates.begin(), ToSockaddr(ip, decoded.port));
  }
  driver_.Post([this, peer] {
    if (!peer->failing && peer->link == nullptr) Attempt(peer);
  });
  return peer->id;
}

std::shared_ptr<Peer> UcxTransport::AddPeerLocked(uint64_t incarnation) {
  auto peer = std::make_shared<Peer>();
  peer->owner = this;
  peer->id = {++next_id_};
  peer->incarnation = incarnation;
  do {
    peer->token = random_();
  } while (peer->token == 0);
  peers_[peer->id.value] = peer;
  by_incarnation_[incarnation] = peer;
  return peer;
}

// Tries the next place where the peer may be, and introduces us. Sends wait until the answer names the peer's token.
void UcxTransport::Attempt(const std::shared_ptr<Peer>& peer) {
  by_token_[peer->token] = peer;
  if (peer->attempts == peer->candidates.size()) return AttemptFailed(peer, "no network address");
  const sockaddr_storage& candidate = peer->candidates[peer->attempts++];
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR;
  params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
  params.sockaddr = {reinterpret_cast<const sockaddr*>(&candidate), SockaddrBytes(candidate)};
  ucs_status_t status = UCS_OK;
  peer->link = MakeLink(params, status);
  if (peer->link == nullptr) return AttemptFailed(peer, ucs_status_string(status));
  peer->link->peer = peer;
  peer->links.push_back(peer->link);
  SendControl(peer, MessageType::kHello);
  const absl::Duration patience = options_.connect_timeout / static_cast<int64_t>(peer->candidates.size());
  driver_.RunAfter(patience, [this, weak = std::weak_ptr<Peer>(peer), attempt = peer->attempts, patience] {
    const std::shared_ptr<Peer> late = weak.lock();
    if (late == nullptr || late->attempts != attempt) return;
    AttemptFailed(late, absl::StrCat("no answer within ", absl::FormatDuration(patience)));
  });
}

void UcxTransport::AttemptFailed(const std::shared_ptr<Peer>& peer, const std::string& why) {
  if (peer->failing || peer->state != Peer::State::kConnecting) return;
  if (peer->link != nullptr) CloseLink(peer->link);
  peer->link = nullptr;
  if (peer->attempts < peer->candidates.size()) return Attempt(peer);
  MarkFailed(peer, absl::UnavailableError(absl::StrCat("cannot connect: ", why)));
}

std::shared_ptr<Link> UcxTransport::MakeLink(ucp_ep_params_t params, ucs_status_t& status) {
  params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.arg = this;
  params.err_handler.cb = [](void* self, ucp_ep_h ep, ucs_status_t error) {
    static_cast<UcxTransport*>(self)->OnLinkError(ep, error);
  };
  auto link = std::make_shared<Link>();
  status = ucp_ep_create(worker_, &params, &link->ep);
  if (status != UCS_OK) return nullptr;
  links_[link->ep] = link;
  return link;
}

// Somebody's connection; who it is its hello will say.
std::shared_ptr<Link> UcxTransport::Accept(ucp_conn_request_h request) {
  if (closing_all_ || links_.size() + closing_links_.size() >= 2 * options_.max_peers) {
    counters_.Dropped("too_many_peers");
    (void)ucp_listener_reject(listener_, request);
    return nullptr;
  }
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST;
  params.conn_request = request;
  ucs_status_t status = UCS_OK;
  std::shared_ptr<Link> link = MakeLink(params, status);
  if (link == nullptr) {
    counters_.Dropped("accept_failed");
    return nullptr;
  }
  driver_.RunAfter(options_.connect_timeout, [this, weak = std::weak_ptr<Link>(link)] {
    const std::shared_ptr<Link> silent = weak.lock();
    if (silent != nullptr && silent->peer == nullptr) CloseLink(silent);
  });
  return link;
}

void UcxTransport::OnLinkError(ucp_ep_h ep, ucs_status_t status) {
  auto it = links_.find(ep);
  if (it == links_.end() || it->second->closing || std::exchange(it->second->failed, true)) return;
  const std::shared_ptr<Link> link = it->second;
  failed_links_.push_back(link);
  if (link->peer == nullptr || link->peer->link != link || link->peer->state != Peer::State::kReady) return;
  MarkFailed(link->peer, absl::UnavailableError(absl::StrCat("connection lost: ", ucs_status_string(status))));
}

// By force: nothing moves over this endpoint once it is closed.
void UcxTransport::CloseLink(const std::shared_ptr<Link>& link) {
  if (std::exchange(link->closing, true)) return;
  links_.erase(link->ep);
  closing_links_.push_back(link);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  param.user_data = link.get();  // closing_links_ holds it until Bury has seen it closed
  param.cb.send = [](void* request, ucs_status_t, void* user_data) {
    static_cast<Link*>(user_data)->closed = true;
    ucp_request_free(request);
  };
  const ucs_status_ptr_t request = ucp_ep_close_nbx(link->ep, &param);
  if (request == nullptr || UCS_PTR_IS_ERR(request)) link->closed = true;
}

void UcxTransport::SendControl(const std::shared_ptr<Peer>& peer, MessageType type) {
  auto send = std::make_unique<Send>();
  send->peer = peer;
  send->counted = false;
  MessageFrame frame;
  frame.type = type;
  send->head.append(reinterpret_cast<const char*>(&frame), sizeof(frame));
  const Hello hello{peer->token, incarnation_, peer->incarnation};
  if (type != MessageType::kGoodbye) send->head.append(reinterpret_cast<const char*>(&hello), sizeof(hello));
  Launch(std::move(send),
         UCP_AM_SEND_FLAG_EAGER | (type == MessageType::kHello ? uint32_t{UCP_AM_SEND_FLAG_REPLY} : 0u));
}

// An accepted link says whose it is.
void UcxTransport::OnHello(const Hello& hello, ucp_ep_h ep) {
  auto it = links_.find(ep);
  if (it == links_.end() || it->second->closing || it->second->failed) return;
  const std::shared_ptr<Link> link = it->second;
  if (hello.target_incarnation != incarnation_ || hello.token == 0 || link->peer != nullptr) {
    counters_.Dropped("bad_hello");  // another listener on a port that was meant for somebody else
    if (link->peer == nullptr) CloseLink(link);
    return;
  }
  std::shared_ptr<Peer> peer, superseded;
  {
    std::lock_guard lock(mu_);
    if (auto found = by_incarnation_.find(hello.incarnation); found != by_incarnation_.end()) peer = found->second;
    if (peer != nullptr && (peer->failing || peer->state != Peer::State::kConnecting))
      superseded = std::exchange(peer, nullptr);  // the other side has given that connection up
    if (peer == nullptr && !closed_ && peers_.size() < options_.max_peers) peer = AddPeerLocked(hello.incarnation);
  }
  if (superseded != nullptr) MarkFailed(superseded, absl::UnavailableError("superseded by a newer connection"));
  if (peer == nullptr) {
    counters_.Dropped("too_many_peers");
    return CloseLink(link);
  }
  const bool is_self = hello.incarnation == incarnation_;
  if (peer->link != nullptr && !is_self && incarnation_ < hello.incarnation) {
    // Both connect; ours stays, and the other side closes this one.
    return;
  }
  if (peer->link != nullptr && !is_self) CloseLink(peer->link);
  if (peer->link == nullptr || !is_self) peer->link = link;
  link->peer = peer;
  peer->links.push_back(link);
  by_token_[peer->token] = peer;
  peer->remote_token = hello.token;
  SendControl(peer, MessageType::kHelloAnswer);
  BecomeReady(peer, hello.token);
}

void UcxTransport::OnHelloAnswer(const std::shared_ptr<Peer>& peer, const Hello& hello) {
  if (hello.incarnation != peer->incarnation) {
    counters_.Dropped("bad_hello");
    return;
  }
  BecomeReady(peer, hello.token);
}

void UcxTransport::BecomeReady(const std::shared_ptr<Peer>& peer, uint64_t remote_token) {
  if (peer->state != Peer::State::kConnecting) return;
  peer->remote_token = remote_token;
  peer->state = Peer::State::kReady;
  peer->was_ready = true;
  pump_ = true;
  counters_.PeerConnected();
  new_connections_.push_back(peer);
}

// UCX prints an endpoint as text; the lines of its lanes look like "lane[0]: 1:tcp/eth0.0 md[1] -> ... am am_bw#0".
void UcxTransport::ReportLanes(const Peer& peer) {
  if (peer.link == nullptr || peer.link->closing) return;
  char* text = nullptr;
  size_t bytes = 0;
  FILE* stream = open_memstream(&text, &bytes);
  if (stream == nullptr) return;
  ucp_ep_print_info(peer.link->ep, stream);
  std::fclose(stream);
  std::vector<std::string> lanes;
  for (absl::string_view line : absl::StrSplit(absl::string_view(text, bytes), '\n')) {
    const size_t lane = line.find("lane[");
    const size_t name = lane == absl::string_view::npos ? lane : line.find(':', line.find("]:", lane) + 2);
    if (name == absl::string_view::npos) continue;
    const size_t end = line.find(' ', name);
    std::string words(line.substr(name + 1, end == absl::string_view::npos ? end : end - name - 1));
    const size_t arrow = line.find("->");
    const size_t roles = arrow == absl::string_view::npos ? arrow : line.find(' ', arrow + 3);
    if (roles != absl::string_view::npos)
      absl::StrAppend(&words, " (", absl::StripAsciiWhitespace(line.substr(roles)), ")");
    lanes.push_back(std::move(words));
  }
  std::free(text);
  std::string report =
      absl::StrCat("peer ", peer.id.value, " lanes ", lanes.empty() ? "unknown" : absl::StrJoin(lanes, ", "));
  Log(report);
  counters_.Lane(std::move(report));
}

// From anywhere, UCX's callbacks included: the close itself is Progress's.
void UcxTransport::MarkFailed(const std::shared_ptr<Peer>& peer, absl::Status why) {
  if (std::exchange(peer->failing, true)) return;
  peer->why = std::move(why);
  failing_.push_back(peer);
}

void UcxTransport::BeginClose(const std::shared_ptr<Peer>& peer) {
  peer->state = Peer::State::kClosing;
  peer->gone = true;
  by_token_.erase(peer->token);
  {
    std::lock_guard lock(mu_);
    peers_.erase(peer->id.value);
    if (auto it = by_incarnation_.find(peer->incarnation); it != by_incarnation_.end() && it->second == peer)
      by_incarnation_.erase(it);
  }
  while (!peer->queue.empty()) {
    const std::unique_ptr<Send> send = std::move(peer->queue.front());
    peer->queue.pop_front();
    --peer->accepted;
    counters_.Unqueued();
    FinishSend(*send, peer->why);
  }
  closing_.push_back(peer);
  for (const auto& link : peer->links) CloseLink(link);
  driver_.RunAfter(kCloseWarning, [this, weak = std::weak_ptr<Peer>(peer)] {
    if (const std::shared_ptr<Peer> stuck = weak.lock()) {
      Log(absl::StrCat("peer ", stuck->id.value, " was closed by force ", absl::FormatDuration(kCloseWarning),
                       " ago and ", stuck->on_wire, " sends and ", stuck->arriving,
                       " arrivals have not ended: their memory stays quarantined"));
    }
  });
}

// The endpoint is down and everything it carried has ended: no byte moves any more, so the owners may know.
void UcxTransport::Retire(Peer& peer) {
  if (peer.was_ready || !peer.by_our_close) counters_.PeerGone(peer.was_ready);
  // What is kept names the peer in turn; taking it out ends that circle.
  for (const auto& send : std::exchange(peer.failed_sends, {})) FinishSend(*send, peer.why);
  std::vector<PeerFailed> observers;
  {
    std::lock_guard lock(mu_);
    if (!peer.by_our_close) observers = on_peer_failed_;
  }
  for (const auto& arrival : std::exchange(peer.failed_arrivals, {})) {
    counters_.ArrivalEnded();
    counters_.Received(arrival->bytes, peer.why);
    if (arrival->done) arrival->done(peer.why);
  }
  for (const PeerFailed& observer : observers) observer(peer.id, peer.why);
  for (Task& fenced : std::exchange(peer.fenced, {})) {
    if (fenced) fenced();
  }
}

void UcxTransport::Disconnect(PeerId peer_id, Task fenced) {
  {
    std::unique_lock lock(mu_);
    if (closed_) {  // Close fences everything; whoever asks during it waits for the same end
      lock.unlock();
      if (all_closed_) {
        if (fenced) fenced();
        return;
      }
    }
  }
  driver_.Post([this, peer_id, fenced = std::move(fenced)]() mutable {
    std::shared_ptr<Peer> peer = Find(peer_id);
    for (const auto& candidate : closing_) {
      if (candidate->id == peer_id) peer = candidate;
    }
    if (peer == nullptr) {
      if (fenced) fenced();
      return;
    }
    peer->fenced.push_back(std::move(fenced));
    MarkFailed(peer, absl::CancelledError("disconnected by us"));
  });
}

// ---- messages that go ----

absl::StatusOr<SendId> UcxTransport::SendMessage(PeerId peer_id, uint16_t channel, absl::Span<const uint8_t> header,
                                                 ConstMemory payload, SendDone done) {
  if (header.size() > kMaxHeaderBytes)
    return absl::InvalidArgumentError(absl::StrCat("header has ", header.size(), " bytes, limit ", kMaxHeaderBytes));
  if (channel >= kMaxChannels) return absl::InvalidArgumentError(absl::StrCat("channel ", channel));
  if (!Supports(payload.kind)) return absl::InvalidArgumentError("this UCX cannot carry device memory");
  auto send = std::make_unique<Send>();
  SendId id;
  {
    std::lock_guard lock(mu_);
    auto it = peers_.find(peer_id.value);
    if (it == peers_.end() || closed_)
      return absl::NotFoundError(absl::StrCat("peer ", peer_id.value, " is unknown or has failed"));
    if (it->second->accepted >= options_.max_queued_messages_per_peer) {
      return absl::ResourceExhaustedError(
          absl::StrCat("peer ", peer_id.value, ": ", it->second->accepted.load(), " messages queued"));
    }
    ++it->second->accepted;
    send->peer = it->second;
    id.value = send->id = ++next_id_;
  }
  counters_.Queued();
  MessageFrame frame;  // the token is filled in at launch, when it is known
  frame.channel = channel;
  frame.payload_bytes = payload.bytes;
  send->head.reserve(sizeof(frame) + header.size());
  send->head.append(reinterpret_cast<const char*>(&frame), sizeof(frame));
  send->head.append(reinterpret_cast<const char*>(header.data()), header.size());
  send->payload = payload;
  send->done = std::move(done);
  driver_.Post([this, send = std::move(send)]() mutable {
    Peer& peer = *send->peer;
    if (peer.gone) {
      --peer.accepted;
      counters_.Unqueued();
      FinishSend(*send, peer.why);
      return;
    }
    peer.queue.push_back(std::move(send));
    pump_ = true;
  });
  return id;
}

// Launches queued sends while there is room, a message a peer in turn, so that a large hand-off does not starve others.
void UcxTransport::Pump() {
  pump_ = false;
  std::vector<std::shared_ptr<Peer>> waiting;
  for (const auto& [token, peer] : by_token_) {
    if (peer->state == Peer::State::kReady && !peer->failing && !peer->queue.empty()) waiting.push_back(peer);
  }
  while (!waiting.empty()) {
    size_t kept = 0;
    for (size_t i = 0; i < waiting.size(); ++i) {
      const std::shared_ptr<Peer>& peer = waiting[i];
      const size_t cost = peer->queue.front()->cost();
      const bool room_for_peer =
          peer->on_wire == 0 || peer->cost_on_wire + cost <= options_.max_in_flight_bytes_per_peer;
      const bool room_in_all = cost_on_wire_ == 0 || cost_on_wire_ + cost <= options_.max_in_flight_bytes;
      if (!room_for_peer || !room_in_all) continue;
      std::unique_ptr<Send> send = std::move(peer->queue.front());
      peer->queue.pop_front();
      --peer->accepted;
      counters_.Launched(send->payload.bytes);
      const bool eager = send->payload.kind == MemoryKind::kHost && send->payload.bytes <= eager_bytes_;
      Launch(std::move(send), eager ? uint32_t{UCP_AM_SEND_FLAG_EAGER} : 0u);
      if (!peer->queue.empty() && !peer->failing) waiting[kept++] = peer;
    }
    waiting.resize(kept);
  }
}

void UcxTransport::Launch(std::unique_ptr<Send> send, uint32_t flags) {
  Peer& peer = *send->peer;
  std::memcpy(send->head.data() + offsetof(MessageFrame, token), &peer.remote_token, sizeof(peer.remote_token));
  ++peer.on_wire;
  peer.cost_on_wire += send->cost();
  cost_on_wire_ += send->cost();
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS |
                       UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.flags = flags;
  param.memory_type = ToUcx(send->payload.kind);
  param.user_data = send.get();
  param.cb.send = [](void* request, ucs_status_t status, void* user_data) {
    ucp_request_free(request);
    std::unique_ptr<Send> ended(static_cast<Send*>(user_data));
    UcxTransport* const self = ended->peer->owner;
    self->SendEnded(std::move(ended), status);
  };
  Send* const raw = send.release();  // UCX's until its callback
  const ucs_status_ptr_t request = ucp_am_send_nbx(peer.link->ep, kAmId, raw->head.data(), raw->head.size(),
                                                   raw->payload.data, raw->payload.bytes, &param);
  if (request != nullptr && !UCS_PTR_IS_ERR(request)) return;
  SendEnded(std::unique_ptr<Send>(raw), request == nullptr ? UCS_OK : UCS_PTR_STATUS(request));
}

void UcxTransport::SendEnded(std::unique_ptr<Send> send, ucs_status_t status) {
  const std::shared_ptr<Peer> peer = send->peer;
  --peer->on_wire;
  peer->cost_on_wire -= send->cost();
  cost_on_wire_ -= send->cost();
  pump_ = true;
  if (send->counted) counters_.Landed(send->payload.bytes);
  if (status == UCS_OK) return FinishSend(*send, absl::OkStatus());
  if (!send->counted) return;  // a hello on a link that failed; the link's error says so
  peer->failed_sends.push_back(std::move(send));
  MarkFailed(peer, absl::UnavailableError(absl::StrCat("send failed: ", ucs_status_string(status))));
}

void UcxTransport::FinishSend(Send& send, const absl::Status& status) {
  if (!send.counted) return;
  counters_.Sent(send.payload.bytes, status);
  if (send.done) send.done(status);
}

void UcxTransport::CancelQueued(SendId id) {
  for (const auto& [token, peer] : by_token_) {
    for (auto it = peer->queue.begin(); it != peer->queue.end(); ++it) {
      if ((*it)->id != id.value) continue;
      const std::unique_ptr<Send> send = std::move(*it);
      peer->queue.erase(it);
      --peer->accepted;
      counters_.Unqueued();
      return FinishSend(*send, absl::CancelledError("send cancelled before it left"));
    }
  }
}

// ---- messages that come ----

ucs_status_t UcxTransport::OnMessage(const void* header, size_t header_bytes, void* data, size_t bytes,
                                     const ucp_am_recv_param_t* param) {
  MessageFrame frame;
  if (header_bytes < sizeof(frame) || header_bytes > sizeof(frame) + kMaxHeaderBytes) {
    counters_.Dropped("bad_frame");
    return UCS_OK;
  }
  std::memcpy(&frame, header, sizeof(frame));
  if (frame.magic != MessageFrame::kMagic || frame.payload_bytes != bytes) {
    counters_.Dropped("bad_frame");
    return UCS_OK;
  }
  const absl::Span<const uint8_t> rest(static_cast<const uint8_t*>(header) + sizeof(frame),
                                       header_bytes - sizeof(frame));
  Hello hello;
  if (frame.type == MessageType::kHello || frame.type == MessageType::kHelloAnswer) {
    if (rest.size() != sizeof(hello) || bytes != 0) {
      counters_.Dropped("bad_hello");
      return UCS_OK;
    }
    std::memcpy(&hello, rest.data(), sizeof(hello));
  }
  if (frame.type == MessageType::kHello) {
    if ((param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0) hellos_.emplace_back(hello, param->reply_ep);
    return UCS_OK;
  }
  auto it = by_token_.find(frame.token);
  if (it == by_token_.end() || it->second->failing) {
    counters_.Dropped("unknown_connection");
    return UCS_OK;
  }
  const std::shared_ptr<Peer> peer = it->second;
  switch (frame.type) {
    case MessageType::kHelloAnswer:
      OnHelloAnswer(peer, hello);
      return UCS_OK;
    case MessageType::kGoodbye:
      MarkFailed(peer, absl::UnavailableError("the other end closed the connection"));
      return UCS_OK;
    case MessageType::kData:
      return OnData(peer, frame, rest, data, bytes, param->recv_attr);
    default:
      counters_.Dropped("bad_frame");
      return UCS_OK;
  }
}

ucs_status_t UcxTransport::OnData(const std::shared_ptr<Peer>& peer, const MessageFrame& frame,
                                  absl::Span<const uint8_t> header, void* data, size_t bytes, uint64_t flags) {
  const bool rendezvous = (flags & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  IncomingMessage message{peer->id, frame.channel, header, bytes, {}};
  if (!rendezvous) message.payload = {static_cast<const uint8_t*>(data), bytes};
  MessageHandler* handler = frame.channel < kMaxChannels ? handlers_[frame.channel] : nullptr;
  Placement placement = handler == nullptr ? Placement::Drop("no_handler") : handler->OnMessage(message);
  switch (placement.verdict) {
    case Placement::Verdict::kDrop:
      counters_.Dropped(placement.reason);
      return UCS_OK;
    case Placement::Verdict::kConsumed:
      counters_.Received(bytes, absl::OkStatus());
      return UCS_OK;
    case Placement::Verdict::kPlace:
      break;
  }
  auto arrival = std::make_unique<Arrival>();
  arrival->peer = peer;
  arrival->bytes = bytes;
  arrival->done = std::move(placement.done);
  counters_.ArrivalBegan();
  ++peer->arriving;
  Memory destination = placement.destination;
  if (destination.bytes < bytes) {
    counters_.Dropped("destination_too_small");
    ArrivalEnded(std::move(arrival), absl::InvalidArgumentError(absl::StrCat("destination has ", destination.bytes,
                                                                             " bytes, payload ", bytes)));
    return UCS_OK;
  }
  destination.bytes = bytes;
  if (rendezvous) return ReceiveInto(std::move(arrival), destination, data);
  ArrivalEnded(std::move(arrival), options_.memory.copy(destination, {data, bytes}));
  return UCS_OK;
}

ucs_status_t UcxTransport::ReceiveInto(std::unique_ptr<Arrival> arrival, Memory destination, void* data) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.memory_type = ToUcx(destination.kind);
  param.user_data = arrival.get();
  param.cb.recv_am = [](void* request, ucs_status_t status, size_t, void* user_data) {
    ucp_request_free(request);
    std::unique_ptr<Arrival> ended(static_cast<Arrival*>(user_data));
    UcxTransport* const self = ended->peer->owner;
    self->ArrivalEnded(std::move(ended), ToStatus(status, "receive failed"));
  };
  Arrival* const raw = arrival.release();  // UCX's until its callback
  const ucs_status_ptr_t request = ucp_am_recv_data_nbx(worker_, data, destination.data, destination.bytes, &param);
  if (request == nullptr || UCS_PTR_IS_ERR(request)) {
    ArrivalEnded(std::unique_ptr<Arrival>(raw),
                 request == nullptr ? absl::OkStatus() : ToStatus(UCS_PTR_STATUS(request), "receive failed"));
  }
  return UCS_INPROGRESS;
}

void UcxTransport::ArrivalEnded(std::unique_ptr<Arrival> arrival, const absl::Status& status) {
  const std::shared_ptr<Peer> peer = arrival->peer;
  --peer->arriving;
  if (!status.ok() && !absl::IsInvalidArgument(status)) {
    peer->failed_arrivals.push_back(std::move(arrival));
    return MarkFailed(peer, absl::UnavailableError(status.message()));
  }
  counters_.ArrivalEnded();
  counters_.Received(arrival->bytes, status);
  if (arrival->done) arrival->done(status);
}

// ---- driving ----

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

// Forgets links that are closed and retires peers of whom nothing is left.
bool UcxTransport::Bury() {
  bool any = false;
  for (size_t i = 0; i < closing_links_.size();) {
    const std::shared_ptr<Link> link = closing_links_[i];
    if (!link->closed) {
      ++i;
      continue;
    }
    any = true;
    closing_links_.erase(closing_links_.begin() + static_cast<ptrdiff_t>(i));
    if (link->peer != nullptr) std::erase(link->peer->links, link);
    link->peer = nullptr;
  }
  for (size_t i = 0; i < closing_.size();) {
    const std::shared_ptr<Peer> peer = closing_[i];
    if (!peer->links.empty() || peer->on_wire != 0 || peer->arriving != 0) {
      ++i;
      continue;
    }
    any = true;
    closing_.erase(closing_.begin() + static_cast<ptrdiff_t>(i));
    Retire(*peer);
    peer->link = nullptr;
  }
  return any;
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

}  // namespace

bool UcxAvailable() { return true; }

std::string UcxVersion() {
  unsigned major = 0, minor = 0, release = 0;
  ucp_get_version(&major, &minor, &release);
  return absl::StrCat(major, ".", minor, ".", release);
}

absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(TransportOptions options) {
  auto transport = std::make_unique<UcxTransport>(std::move(options));
  RETURN_IF_ERROR(transport->Start());
  return std::unique_ptr<Transport>(std::move(transport));
}

}  // namespace millrace::kvtransfer
