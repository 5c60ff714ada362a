// SPDX-License-Identifier: Apache-2.0
// The hub and the endpoints of the loopback transport. Internal to kvtransfer; the contract is in loopback_transport.h.
//
// A message of up to kEagerBytes takes two tasks: deliver (receiver's thread), complete (sender's thread). A larger one
// does a rendezvous of four, as a network would: announce (receiver names the memory), grant (sender's thread), copy
// (receiver's thread), complete. So a sender that is frozen between announce and grant leaves an arrival pending, which
// is what a fence has to cope with.
//
// Who may touch what: everything of a peer is touched on the endpoint's own thread, or under `mu_` where callers need
// an answer at once. The one thing that two threads share is the source memory: Send::mu is held while it is read, and
// the sender takes it before it tells the owner that the memory is free.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kvtransfer/counters.h"
#include "kvtransfer/loopback_transport.h"
#include "kvtransfer/status.h"

namespace millrace::kvtransfer::loopback {

inline constexpr size_t kEagerBytes = 8192;
inline constexpr absl::string_view kAddressPrefix = "loopback:";

// One message, from SendMessage to its completion. Shared by both threads.
struct Send {
  uint64_t id = 0;
  uint16_t channel = 0;
  std::string header;
  SendDone done;
  size_t bytes = 0;

  std::mutex mu;
  ConstMemory payload;    // guarded by mu
  bool released = false;  // guarded by mu; the source must not be read any more
};

struct Arrival {
  Memory destination;
  ArrivalDone done;
};

class Endpoint;

struct Peer {
  PeerId id;
  std::shared_ptr<Endpoint> remote;
  PeerId id_there;
  std::deque<std::shared_ptr<Send>> queue;            // guarded by the endpoint's mu_
  std::map<uint64_t, std::shared_ptr<Send>> on_wire;  // own thread
  std::map<std::shared_ptr<Send>, Arrival> arrivals;  // own thread
  size_t bytes_on_wire = 0;                           // own thread
};

// Where the endpoints of one process find each other.
class Hub final : public LoopbackHub {
 public:
  bool Fail(absl::string_view address) override;
  bool Freeze(absl::string_view address) override { return SetFrozen(address, true); }
  bool Thaw(absl::string_view address) override { return SetFrozen(address, false); }

  std::string Add(std::shared_ptr<Endpoint> endpoint) {
    std::lock_guard lock(mu_);
    std::string address = absl::StrCat(kAddressPrefix, absl::Hex(++next_, absl::kZeroPad16));
    endpoints_[address] = std::move(endpoint);
    return address;
  }
  void Remove(const std::string& address) {
    std::lock_guard lock(mu_);
    endpoints_.erase(address);
  }
  std::shared_ptr<Endpoint> Find(absl::string_view address) {
    std::lock_guard lock(mu_);
    auto it = endpoints_.find(std::string(address));
    return it == endpoints_.end() ? nullptr : it->second;
  }

  std::mutex linking;  // one connection is made at a time, so that both sides agree on it

 private:
  bool SetFrozen(absl::string_view address, bool frozen);
  std::mutex mu_;
  uint64_t next_ = 0;
  std::map<std::string, std::shared_ptr<Endpoint>> endpoints_;
};

// One transport: its thread, its peers, what is under way.
class Endpoint : public std::enable_shared_from_this<Endpoint> {
 public:
  using Clock = std::chrono::steady_clock;
  using Task = absl::AnyInvocable<void()>;

  Endpoint(std::shared_ptr<Hub> hub, TransportOptions options) : hub_(std::move(hub)), options_(std::move(options)) {}

  void Start() {
    address_ = hub_->Add(shared_from_this());
    thread_ = std::thread([this] { Run(); });
  }

  const std::string& address() const { return address_; }
  const TransportOptions& options() const { return options_; }

  void SetHandler(uint16_t channel, MessageHandler* handler) {
    CHECK(channel < kMaxChannels, absl::StrCat("channel ", channel));
    std::lock_guard busy(handler_mu_);
    handlers_[channel] = handler;
  }

  void OnPeerFailed(PeerFailed callback) {
    std::lock_guard lock(mu_);
    on_peer_failed_.push_back(std::move(callback));
  }

  absl::StatusOr<PeerId> Connect(absl::string_view address);
  absl::StatusOr<SendId> SendMessage(PeerId peer_id, uint16_t channel, absl::Span<const uint8_t> header,
                                     ConstMemory payload, SendDone done);

  void Cancel(SendId send) {
    Post([this, send] {
      std::shared_ptr<Send> found;
      {
        std::lock_guard lock(mu_);
        for (auto& [id, peer] : peers_) {
          auto& queue = peer->queue;
          for (auto it = queue.begin(); it != queue.end() && !found; ++it) {
            if ((*it)->id != send.value) continue;
            found = *it;
            queue.erase(it);
            break;
          }
        }
      }
      if (found == nullptr) return;
      counters_.Unqueued();
      Finish(*found, absl::CancelledError("send cancelled before it left"));
    });
  }

  void Disconnect(PeerId peer, Task fenced) {
    auto shared = std::make_shared<Task>(std::move(fenced));
    const bool posted = Post([this, peer, shared] {
      FailPeer(peer, absl::CancelledError("disconnected by us"));
      if (*shared) (*shared)();
    });
    if (!posted && *shared) (*shared)();  // closed: everything is fenced
  }

  bool Post(Task task) {
    std::lock_guard lock(mu_);
    if (closed_) return false;
    tasks_.push_back(std::move(task));
    wake_.notify_all();
    return true;
  }

  void RunAfter(absl::Duration delay, Task callback) {
    if (delay <= absl::ZeroDuration()) {
      Post(std::move(callback));
      return;
    }
    std::lock_guard lock(mu_);
    if (closing_) return;
    timers_.emplace(After(delay), std::move(callback));
    wake_.notify_all();
  }

  bool WaitFor(absl::FunctionRef<bool()> done, absl::Duration timeout);
  void Close();
  void FailNow();

  void SetFrozen(bool frozen) {
    std::lock_guard lock(mu_);
    frozen_ = frozen;
    wake_.notify_all();
  }

  TransportStatistics statistics() const { return counters_.snapshot(); }

 private:
  static Clock::time_point After(absl::Duration delay) { return Clock::now() + absl::ToChronoNanoseconds(delay); }
  void Run();
  void Pump(PeerId peer_id);
  void Announce(PeerId from, std::shared_ptr<Send> send);       // receiver's thread
  void Grant(PeerId to, std::shared_ptr<Send> send);            // sender's thread
  void Copy(PeerId from, const std::shared_ptr<Send>& send);    // receiver's thread
  void Complete(PeerId to, const std::shared_ptr<Send>& send);  // sender's thread
  void FailPeer(PeerId peer_id, const absl::Status& why);
  void EndArrival(size_t bytes, ArrivalDone& done, const absl::Status& status);
  void Finish(Send& send, const absl::Status& status);
  absl::Status CopyFrom(Send& send, Memory destination);

  std::shared_ptr<Peer> Find(PeerId id) {
    std::lock_guard lock(mu_);
    auto it = peers_.find(id.value);
    return it == peers_.end() ? nullptr : it->second;
  }

  const std::shared_ptr<Hub> hub_;
  const TransportOptions options_;
  std::string address_;
  internal::Counters counters_;

  std::mutex handler_mu_;  // held around every handler call
  MessageHandler* handlers_[kMaxChannels] = {};

  mutable std::mutex mu_;
  std::condition_variable wake_;  // the thread waits here for tasks
  std::condition_variable idle_;  // WaitFor waits here for a task to have run
  std::deque<Task> tasks_;
  std::multimap<Clock::time_point, Task> timers_;
  std::map<uint64_t, std::shared_ptr<Peer>> peers_;
  std::vector<PeerFailed> on_peer_failed_;
  uint64_t next_id_ = 0;
  bool frozen_ = false, closing_ = false, closed_ = false;

  size_t bytes_on_wire_ = 0;  // own thread
  std::thread thread_;
  friend class Hub;
};

}  // namespace millrace::kvtransfer::loopback
