// SPDX-License-Identifier: Apache-2.0
// The UCX transport as a class: what its five files share. Internal to kvtransfer; the contract is in ucx_transport.h.
//
//   ucx_transport.cc  start, configuration, driving, the end
//   ucx_connect.cc    the listener, connections made and accepted, hellos
//   ucx_close.cc      connections that end, and the fence
//   ucx_send.cc       messages that go
//   ucx_receive.cc    messages that come
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
#pragma once

#include <ucp/api/ucp.h>

#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "kvtransfer/counters.h"
#include "kvtransfer/driver.h"
#include "kvtransfer/status.h"
#include "kvtransfer/ucx_peer.h"
#include "kvtransfer/ucx_wire.h"

namespace millrace::kvtransfer::ucx {

using internal::Driver;
using internal::Hello;
using internal::MessageFrame;
using internal::MessageType;

inline constexpr unsigned kAmId = 1;
// After a forced close UCX completes what was outstanding within milliseconds. If it does not, we say so and keep the
// memory: it is not safe to give it back.
inline constexpr absl::Duration kCloseWarning = absl::Seconds(5);

class UcxTransport final : public Transport, private Driver::Engine {
 public:
  using Task = absl::AnyInvocable<void()>;

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
  void EnterThread() override;

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
  std::optional<IpAddress> confined_to_;  // listen_address, if it names one
  int worker_fd_ = -1;
  bool has_cuda_ = false;
  size_t eager_bytes_ = 0;
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

}  // namespace millrace::kvtransfer::ucx
