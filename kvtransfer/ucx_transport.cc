// SPDX-License-Identifier: Apache-2.0
// Messages over UCX active messages; the contract is in ucx_transport.h and transport.h.
//
// A connection begins with a hello, which carries the sender's own address: the receiver makes an endpoint in return,
// and UCX joins the two into one connection. So both sides hold an endpoint, get its errors, can answer, and can close
// it by force, which is the fence: a rendezvous over TCP or RDMA may write to our memory until the endpoint is down,
// even after its request completed with an error. Therefore what ends in error is kept back until the forced close has
// completed, and only then told to the owner of the memory (Retire).
//
// Who may touch what: everything of UCX, and every member without a lock's name, only under the drive lock (driver.h),
// that is in tasks, in Progress and in UCX's callbacks. UCX's callbacks must neither progress nor close, so they leave
// failures and hellos in lists that Progress works through.
#include "kvtransfer/ucx_transport.h"

#include <ucp/api/ucp.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <utility>

#include "absl/cleanup/cleanup.h"
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
// UCX up to at least 1.13 asserts if a connection dies while its answer to a handshake is still queued. A handshake
// takes about a millisecond; our own closes wait for it, so that two healthy processes never do that to each other.
constexpr absl::Duration kHandshakePoll = absl::Milliseconds(2);
constexpr absl::Duration kHandshakeGrace = absl::Milliseconds(500);
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

struct Peer;

struct Send {
  uint64_t id = 0;
  std::shared_ptr<Peer> peer;
  std::string head;  // frame and header, as UCX sends them
  ConstMemory payload;
  std::string own_payload;  // of a hello
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

struct Peer {
  enum class State { kConnecting, kReady, kClosing };

  UcxTransport* owner = nullptr;

  PeerId id;
  uint64_t incarnation = 0;
  uint64_t token = 0;         // ours: in frames that come
  uint64_t remote_token = 0;  // theirs: in frames that go; 0 until known
  std::string address;        // framed
  State state = State::kConnecting;
  ucp_ep_h ep = nullptr;
  std::deque<std::unique_ptr<Send>> queue;
  size_t on_wire = 0, cost_on_wire = 0, arriving = 0;
  bool failing = false;  // in failing_, or beyond
  bool ep_closed = false;
  bool was_ready = false;
  bool by_our_close = false;
  absl::Status why;
  std::vector<std::pair<std::unique_ptr<Send>, absl::Status>> failed_sends;        // told in Retire
  std::vector<std::pair<std::unique_ptr<Arrival>, absl::Status>> failed_arrivals;  // told in Retire
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
  void Close() override;
  TransportStatistics statistics() const override { return counters_.snapshot(); }
  std::string Describe() const override;

 private:
  // Engine
  bool Progress() override;
  bool Arm() override { return ucp_worker_arm(worker_) == UCS_OK; }
  int fd() const override { return worker_fd_; }

  // Connections
  void Open(const std::shared_ptr<Peer>& peer);
  void SendHello(const std::shared_ptr<Peer>& peer, MessageType type);
  void OnHello(const Hello& hello, std::string address);
  void OnHelloAnswer(const std::shared_ptr<Peer>& peer, const Hello& hello);
  void BecomeReady(const std::shared_ptr<Peer>& peer, uint64_t remote_token);
  void MarkFailed(const std::shared_ptr<Peer>& peer, absl::Status why);
  void BeginClose(const std::shared_ptr<Peer>& peer);
  void DisconnectWhenSettled(const std::shared_ptr<Peer>& peer);
  void Retire(Peer& peer);
  std::string Lanes(const Peer& peer) const;

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
  std::shared_ptr<Peer> AddPeerLocked(const internal::ParsedAddress& parsed, absl::string_view address);

  const TransportOptions options_;
  internal::Counters counters_;

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int worker_fd_ = -1;
  bool has_cuda_ = false;
  uint16_t ucx_major_ = 0, ucx_minor_ = 0;
  uint64_t incarnation_ = 0;
  std::string address_;

  // Under the drive lock.
  MessageHandler* handlers_[kMaxChannels] = {};
  absl::flat_hash_map<uint64_t, std::shared_ptr<Peer>> by_token_;
  std::vector<std::shared_ptr<Peer>> failing_;         // to be closed
  std::vector<std::shared_ptr<Peer>> closing_;         // being closed
  std::vector<std::pair<Hello, std::string>> hellos_;  // to be answered
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
  std::atomic<int> connecting_{0};  // peers whose handshake runs

  Driver driver_;  // last: its thread uses all of the above
};

// UCX reads its configuration from the environment; what an operator set there wins over our defaults.
void ApplyDefault(ucp_config_t* config, const char* name, const char* value) {
  if (std::getenv(absl::StrCat("UCX_", name).c_str()) == nullptr) (void)ucp_config_modify(config, name, value);
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
  attributes.field_mask = UCP_WORKER_ATTR_FIELD_ADDRESS | UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER;
  RETURN_IF_ERROR(ToStatus(ucp_worker_query(worker_, &attributes), "getting the worker's address"));
  const absl::Cleanup release_address = [&] { ucp_worker_release_address(worker_, attributes.address); };
  if (attributes.max_am_header < sizeof(MessageFrame) + kMaxHeaderBytes) {
    return absl::FailedPreconditionError(absl::StrCat("UCX carries headers of ", attributes.max_am_header,
                                                      " bytes, need ", sizeof(MessageFrame) + kMaxHeaderBytes));
  }
  internal::AddressFrame frame;
  frame.ucx_major = ucx_major_, frame.ucx_minor = ucx_minor_;
  frame.incarnation = incarnation_ = random_();
  address_ =
      internal::FrameAddress(frame, {reinterpret_cast<const char*>(attributes.address), attributes.address_length});
  if (address_.size() > internal::kMaxAddressBytes) {
    return absl::FailedPreconditionError(absl::StrCat("UCX address has ", address_.size(), " bytes, limit ",
                                                      internal::kMaxAddressBytes, ": name fewer in UCX_NET_DEVICES"));
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
  driver_.Start();
  return absl::OkStatus();
}

// ---- connections ----

absl::StatusOr<PeerId> UcxTransport::Connect(absl::string_view address) {
  ASSIGN_OR_RETURN(const internal::ParsedAddress parsed, internal::ParseAddress(address, ucx_major_, ucx_minor_));
  std::shared_ptr<Peer> peer;
  {
    std::lock_guard lock(mu_);
    if (closed_) return absl::CancelledError("transport is closed");
    if (auto it = by_incarnation_.find(parsed.frame.incarnation); it != by_incarnation_.end()) return it->second->id;
    if (peers_.size() >= options_.max_peers)
      return absl::ResourceExhaustedError(absl::StrCat(peers_.size(), " peers, limit ", options_.max_peers));
    peer = AddPeerLocked(parsed, address);
  }
  driver_.Post([this, peer] { Open(peer); });
  return peer->id;
}

std::shared_ptr<Peer> UcxTransport::AddPeerLocked(const internal::ParsedAddress& parsed, absl::string_view address) {
  auto peer = std::make_shared<Peer>();
  peer->owner = this;
  peer->id = {++next_id_};
  peer->incarnation = parsed.frame.incarnation;
  do {
    peer->token = random_();
  } while (peer->token == 0);
  peer->address = std::string(address);
  ++connecting_;
  peers_[peer->id.value] = peer;
  by_incarnation_[peer->incarnation] = peer;
  return peer;
}

// Makes the endpoint and introduces us. Sends wait until the answer names the peer's token.
void UcxTransport::Open(const std::shared_ptr<Peer>& peer) {
  if (peer->failing) return;
  by_token_[peer->token] = peer;
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER | UCP_EP_PARAM_FIELD_USER_DATA;
  params.address = reinterpret_cast<const ucp_address_t*>(peer->address.data() + sizeof(internal::AddressFrame));
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = [](void* self, ucp_ep_h ep, ucs_status_t status) {
    auto* transport = static_cast<UcxTransport*>(self);
    for (const auto& [token, candidate] : transport->by_token_) {
      if (candidate->ep != ep) continue;
      transport->MarkFailed(candidate,
                            absl::UnavailableError(absl::StrCat("connection lost: ", ucs_status_string(status))));
      return;
    }
  };
  params.err_handler.arg = this;
  params.user_data = this;
  if (const ucs_status_t status = ucp_ep_create(worker_, &params, &peer->ep); status != UCS_OK) {
    peer->ep = nullptr;
    MarkFailed(peer, absl::UnavailableError(absl::StrCat("cannot connect: ", ucs_status_string(status))));
    return;
  }
  if (peer->remote_token == 0) SendHello(peer, MessageType::kHello);
  driver_.RunAfter(options_.connect_timeout, [this, weak = std::weak_ptr<Peer>(peer)] {
    const std::shared_ptr<Peer> late = weak.lock();
    if (late == nullptr || late->state != Peer::State::kConnecting) return;
    MarkFailed(late, absl::UnavailableError(
                         absl::StrCat("no answer within ", absl::FormatDuration(options_.connect_timeout))));
  });
}

void UcxTransport::SendHello(const std::shared_ptr<Peer>& peer, MessageType type) {
  auto send = std::make_unique<Send>();
  send->peer = peer;
  send->counted = false;
  if (type == MessageType::kHello) send->own_payload = address_;
  send->payload = {send->own_payload.data(), send->own_payload.size()};
  MessageFrame frame;
  frame.type = type;
  frame.token = peer->remote_token;
  frame.payload_bytes = send->payload.bytes;
  const Hello hello{peer->token, incarnation_, peer->incarnation};
  send->head.append(reinterpret_cast<const char*>(&frame), sizeof(frame));
  send->head.append(reinterpret_cast<const char*>(&hello), sizeof(hello));
  Launch(std::move(send), UCP_AM_SEND_FLAG_EAGER);
}

// Somebody connects. If we were connecting to it as well, both have become one connection; if we hold an older one, the
// other side has given that up.
void UcxTransport::OnHello(const Hello& hello, std::string address) {
  const auto parsed = internal::ParseAddress(address, ucx_major_, ucx_minor_);
  if (hello.target_incarnation != incarnation_ || !parsed.ok() || parsed->frame.incarnation != hello.incarnation) {
    counters_.Dropped("bad_hello");
    return;
  }
  std::shared_ptr<Peer> peer, superseded;
  bool is_new = false;
  {
    std::lock_guard lock(mu_);
    if (closed_) return;
    if (auto it = by_incarnation_.find(hello.incarnation); it != by_incarnation_.end()) peer = it->second;
    if (peer != nullptr && (peer->failing || (peer->remote_token != 0 && peer->remote_token != hello.token)))
      superseded = std::exchange(peer, nullptr);
    if (peer == nullptr) {
      if (peers_.size() >= options_.max_peers) {
        counters_.Dropped("too_many_peers");
        return;
      }
      peer = AddPeerLocked(*parsed, address);
      is_new = true;
    }
  }
  if (superseded != nullptr) MarkFailed(superseded, absl::UnavailableError("superseded by a newer connection"));
  if (is_new) {
    peer->remote_token = hello.token;  // no hello of our own is needed
    Open(peer);
    if (peer->failing) return;
  }
  SendHello(peer, MessageType::kHelloAnswer), BecomeReady(peer, hello.token);
}

void UcxTransport::OnHelloAnswer(const std::shared_ptr<Peer>& peer, const Hello& hello) {
  if (hello.incarnation != peer->incarnation) {
    counters_.Dropped("bad_hello");
    return;
  }
  BecomeReady(peer, hello.token);
}

void UcxTransport::BecomeReady(const std::shared_ptr<Peer>& peer, uint64_t remote_token) {
  peer->remote_token = remote_token;
  if (peer->state != Peer::State::kConnecting) return;
  peer->state = Peer::State::kReady;
  --connecting_;
  peer->was_ready = true;
  pump_ = true;
  counters_.PeerConnected();
  std::string line = absl::StrCat("peer ", peer->id.value, " lanes ", Lanes(*peer));
  Log(line);
  counters_.Lane(std::move(line));
}

// UCX prints an endpoint as text; the lines of its lanes look like "lane[0]: 1:tcp/eth0.0 md[1] -> ... am am_bw#0".
std::string UcxTransport::Lanes(const Peer& peer) const {
  char* text = nullptr;
  size_t bytes = 0;
  FILE* stream = open_memstream(&text, &bytes);
  if (stream == nullptr) return "unknown";
  ucp_ep_print_info(peer.ep, stream);
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
  return lanes.empty() ? "unknown" : absl::StrJoin(lanes, ", ");
}

// From anywhere, UCX's callbacks included: the close itself is Progress's.
void UcxTransport::MarkFailed(const std::shared_ptr<Peer>& peer, absl::Status why) {
  if (std::exchange(peer->failing, true)) return;
  peer->why = std::move(why);
  failing_.push_back(peer);
}

void UcxTransport::BeginClose(const std::shared_ptr<Peer>& peer) {
  if (peer->state == Peer::State::kConnecting) --connecting_;
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
  if (peer->ep == nullptr) {
    peer->ep_closed = true;
    return;
  }
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  param.user_data = peer.get();  // closing_ holds it until the callback has run
  param.cb.send = [](void* request, ucs_status_t, void* user_data) {
    static_cast<Peer*>(user_data)->ep_closed = true;
    ucp_request_free(request);
  };
  const ucs_status_ptr_t request = ucp_ep_close_nbx(peer->ep, &param);
  if (request == nullptr || UCS_PTR_IS_ERR(request)) peer->ep_closed = true;
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
  for (auto& [send, status] : peer.failed_sends) FinishSend(*send, peer.why);
  std::vector<PeerFailed> observers;
  {
    std::lock_guard lock(mu_);
    if (!peer.by_our_close) observers = on_peer_failed_;
  }
  for (auto& [arrival, status] : peer.failed_arrivals) {
    counters_.ArrivalEnded();
    counters_.Received(arrival->bytes, peer.why);
    if (arrival->done) arrival->done(peer.why);
  }
  for (const PeerFailed& observer : observers) observer(peer.id, peer.why);
  for (Task& fenced : peer.fenced) {
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
    DisconnectWhenSettled(peer);
  });
}

// The connect timeout fails a peer that does not settle.
void UcxTransport::DisconnectWhenSettled(const std::shared_ptr<Peer>& peer) {
  if (peer->state == Peer::State::kConnecting && !peer->failing)
    return driver_.RunAfter(kHandshakePoll, [this, peer] { DisconnectWhenSettled(peer); });
  MarkFailed(peer, absl::CancelledError("disconnected by us"));
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
      Launch(std::move(send), 0);
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
  const ucs_status_ptr_t request = ucp_am_send_nbx(peer.ep, kAmId, raw->head.data(), raw->head.size(),
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
  const absl::Status why = absl::UnavailableError(absl::StrCat("send failed: ", ucs_status_string(status)));
  peer->failed_sends.emplace_back(std::move(send), why);
  MarkFailed(peer, why);
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
  const bool is_here = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  Hello hello;
  if (frame.type == MessageType::kHello || frame.type == MessageType::kHelloAnswer) {
    if (rest.size() != sizeof(hello) || !is_here || bytes > internal::kMaxAddressBytes) {
      counters_.Dropped("bad_hello");
      return UCS_OK;
    }
    std::memcpy(&hello, rest.data(), sizeof(hello));
  }
  if (frame.type == MessageType::kHello) {
    hellos_.emplace_back(hello, std::string(static_cast<const char*>(data), bytes));
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
    peer->failed_arrivals.emplace_back(std::move(arrival), status);
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
  if (!hellos_.empty()) {
    busy = true;
    for (auto& [hello, address] : std::exchange(hellos_, {})) OnHello(hello, std::move(address));
  }
  while (!failing_.empty()) {
    busy = true;
    for (const auto& peer : std::exchange(failing_, {})) BeginClose(peer);
  }
  for (size_t i = 0; i < closing_.size();) {
    const std::shared_ptr<Peer> peer = closing_[i];
    if (!peer->ep_closed || peer->on_wire != 0 || peer->arriving != 0) {
      ++i;
      continue;
    }
    busy = true;
    closing_.erase(closing_.begin() + static_cast<ptrdiff_t>(i));
    Retire(*peer);
  }
  if (closing_all_ && closing_.empty() && by_token_.empty()) all_closed_ = true;
  if (pump_) Pump(), busy = true;
  return busy;
}

void UcxTransport::Close() {
  {
    std::lock_guard lock(mu_);
    if (std::exchange(closed_, true)) return;
  }
  if (worker_fd_ >= 0) {
    (void)driver_.WaitFor([this] { return connecting_ == 0; }, kHandshakeGrace);
    driver_.Post([this] {
      std::vector<std::shared_ptr<Peer>> all;
      {
        std::lock_guard lock(mu_);
        for (const auto& [id, peer] : peers_) all.push_back(peer);
      }
      for (const auto& peer : all) {
        peer->by_our_close = true;
        if (peer->state == Peer::State::kReady && !peer->failing) {
          auto send = std::make_unique<Send>();
          send->peer = peer;
          send->counted = false;
          MessageFrame frame;
          frame.type = MessageType::kGoodbye;
          send->head.append(reinterpret_cast<const char*>(&frame), sizeof(frame));
          Launch(std::move(send), UCP_AM_SEND_FLAG_EAGER);
        }
        MarkFailed(peer, absl::CancelledError("transport closed"));
      }
      closing_all_ = true;
    });
    // Bounded by UCX's forced close. If that hangs, the worker's destruction below ends what it carried.
    if (!driver_.WaitFor([this] { return all_closed_.load(); }, 2 * kCloseWarning))
      Log("closing took too long; destroying the worker with connections open");
  }
  for (Task& task : driver_.Stop()) task();  // sends and disconnects that came last: they find their peers gone
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  for (const auto& peer : std::exchange(closing_, {})) Retire(*peer);
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
