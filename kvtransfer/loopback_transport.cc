// SPDX-License-Identifier: Apache-2.0
// Endpoints of one process that post tasks to each other; the contract is in loopback_transport.h.
//
// A message of up to kEagerBytes takes two tasks: deliver (receiver's thread), complete (sender's thread). A larger one
// does a rendezvous of four, as a network would: announce (receiver names the memory), grant (sender's thread), copy
// (receiver's thread), complete. So a sender that is frozen between announce and grant leaves an arrival pending, which
// is what a fence has to cope with.
//
// Who may touch what: everything of a peer is touched on the endpoint's own thread, or under `mu_` where callers need
// an answer at once. The one thing that two threads share is the source memory: Send::mu is held while it is read, and
// the sender takes it before it tells the owner that the memory is free.
#include "kvtransfer/loopback_transport.h"

#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvtransfer/counters.h"
#include "kvtransfer/status.h"

namespace millrace::kvtransfer {
namespace {

using Clock = std::chrono::steady_clock;
using Task = absl::AnyInvocable<void()>;

constexpr size_t kEagerBytes = 8192;
constexpr absl::string_view kAddressPrefix = "loopback:";

Clock::time_point After(absl::Duration delay) { return Clock::now() + absl::ToChronoNanoseconds(delay); }

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

class Endpoint : public std::enable_shared_from_this<Endpoint> {
 public:
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

bool Hub::Fail(absl::string_view address) {
  std::shared_ptr<Endpoint> endpoint = Find(address);
  if (endpoint == nullptr) return false;
  endpoint->FailNow();
  return true;
}

bool Hub::SetFrozen(absl::string_view address, bool frozen) {
  std::shared_ptr<Endpoint> endpoint = Find(address);
  if (endpoint == nullptr) return false;
  endpoint->SetFrozen(frozen);
  return true;
}

absl::StatusOr<PeerId> Endpoint::Connect(absl::string_view address) {
  if (address.size() != kAddressPrefix.size() + 16 || address.substr(0, kAddressPrefix.size()) != kAddressPrefix)
    return absl::InvalidArgumentError(absl::StrCat("not a loopback address: ", address.size(), " bytes"));
  std::shared_ptr<Endpoint> remote = hub_->Find(address);
  std::lock_guard linking(hub_->linking);
  auto here = std::make_shared<Peer>();
  {
    std::lock_guard lock(mu_);
    if (closing_) return absl::CancelledError("transport is closed");
    for (const auto& [id, peer] : peers_) {
      if (remote != nullptr && peer->remote == remote) return peer->id;
    }
    if (peers_.size() >= options_.max_peers)
      return absl::ResourceExhaustedError(absl::StrCat(peers_.size(), " peers, limit ", options_.max_peers));
    here->id = {++next_id_};
    here->remote = remote;
    peers_[here->id.value] = here;
  }
  counters_.PeerConnected();
  bool accepted = remote != nullptr;
  if (accepted) {
    std::lock_guard lock(remote->mu_);
    accepted = !remote->closing_ && remote->peers_.size() < remote->options_.max_peers;
    if (accepted && remote.get() != this) {
      auto there = std::make_shared<Peer>();
      there->id = {++remote->next_id_};
      there->remote = shared_from_this();
      there->id_there = here->id;
      remote->peers_[there->id.value] = there;
      here->id_there = there->id;
      remote->counters_.PeerConnected();
    } else if (accepted) {
      here->id_there = here->id;
    }
  }
  if (accepted) {
    counters_.Lane(absl::StrCat("peer ", here->id.value, ": loopback"));
  } else {
    RunAfter(absl::ZeroDuration(), [this, id = here->id] {
      FailPeer(id, absl::UnavailableError("no such endpoint, or it takes no more peers"));
    });
  }
  return here->id;
}

absl::StatusOr<SendId> Endpoint::SendMessage(PeerId peer_id, uint16_t channel, absl::Span<const uint8_t> header,
                                             ConstMemory payload, SendDone done) {
  if (header.size() > kMaxHeaderBytes)
    return absl::InvalidArgumentError(absl::StrCat("header has ", header.size(), " bytes, limit ", kMaxHeaderBytes));
  if (channel >= kMaxChannels) return absl::InvalidArgumentError(absl::StrCat("channel ", channel));
  auto send = std::make_shared<Send>();
  send->channel = channel;
  send->header.assign(reinterpret_cast<const char*>(header.data()), header.size());
  send->payload = payload;
  send->bytes = payload.bytes;
  send->done = std::move(done);
  {
    std::lock_guard lock(mu_);
    auto it = peers_.find(peer_id.value);
    if (it == peers_.end() || closing_)
      return absl::NotFoundError(absl::StrCat("peer ", peer_id.value, " is unknown or has failed"));
    if (it->second->queue.size() >= options_.max_queued_messages_per_peer) {
      return absl::ResourceExhaustedError(
          absl::StrCat("peer ", peer_id.value, ": ", it->second->queue.size(), " messages queued"));
    }
    send->id = ++next_id_;
    it->second->queue.push_back(send);
    counters_.Queued();
  }
  Post([this, peer_id] { Pump(peer_id); });
  return SendId{send->id};
}

// Gives queued sends to the wire while there is room.
void Endpoint::Pump(PeerId peer_id) {
  std::shared_ptr<Peer> peer = Find(peer_id);
  if (peer == nullptr || peer->remote == nullptr) return;
  while (true) {
    std::shared_ptr<Send> send;
    {
      std::lock_guard lock(mu_);
      if (peer->queue.empty()) return;
      const size_t bytes = peer->queue.front()->bytes;
      const bool room_for_peer =
          peer->on_wire.empty() || peer->bytes_on_wire + bytes <= options_.max_in_flight_bytes_per_peer;
      const bool room_in_all = bytes_on_wire_ == 0 || bytes_on_wire_ + bytes <= options_.max_in_flight_bytes;
      if (!room_for_peer || !room_in_all) return;
      send = std::move(peer->queue.front());
      peer->queue.pop_front();
    }
    peer->on_wire[send->id] = send;
    peer->bytes_on_wire += send->bytes;
    bytes_on_wire_ += send->bytes;
    counters_.Launched(send->bytes);
    peer->remote->Post([remote = peer->remote.get(), from = peer->id_there, send] { remote->Announce(from, send); });
  }
}

void Endpoint::Announce(PeerId from, std::shared_ptr<Send> send) {
  std::shared_ptr<Peer> peer = Find(from);
  if (peer == nullptr) return;  // the connection ended; so it does at the sender
  IncomingMessage message;
  message.from = from;
  message.channel = send->channel;
  message.header = {reinterpret_cast<const uint8_t*>(send->header.data()), send->header.size()};
  message.payload_bytes = send->bytes;
  const bool eager = send->bytes <= kEagerBytes;
  auto complete = [&] {
    peer->remote->Post([remote = peer->remote.get(), to = peer->id_there, send] { remote->Complete(to, send); });
  };

  Placement placement;
  {
    std::unique_lock source(send->mu, std::defer_lock);
    if (eager) {
      source.lock();
      if (send->released) return;
      if (send->payload.kind == MemoryKind::kHost)
        message.payload = {static_cast<const uint8_t*>(send->payload.data), send->bytes};
    }
    std::lock_guard busy(handler_mu_);
    MessageHandler* handler = handlers_[send->channel];
    placement = handler == nullptr ? Placement::Drop("no_handler") : handler->OnMessage(message);
  }
  switch (placement.verdict) {
    case Placement::Verdict::kDrop:
      counters_.Dropped(placement.reason);
      return complete();
    case Placement::Verdict::kConsumed:
      counters_.Received(send->bytes, absl::OkStatus());
      return complete();
    case Placement::Verdict::kPlace:
      break;
  }
  counters_.ArrivalBegan();
  if (placement.destination.bytes < send->bytes) {
    counters_.Dropped("destination_too_small");
    EndArrival(send->bytes, placement.done,
               absl::InvalidArgumentError(
                   absl::StrCat("destination has ", placement.destination.bytes, " bytes, payload ", send->bytes)));
    return complete();
  }
  placement.destination.bytes = send->bytes;
  if (eager) {
    const absl::Status copied = CopyFrom(*send, placement.destination);
    EndArrival(send->bytes, placement.done, copied);
    return complete();
  }
  peer->arrivals[send] = {placement.destination, std::move(placement.done)};
  peer->remote->Post([remote = peer->remote.get(), to = peer->id_there, send] { remote->Grant(to, send); });
}

void Endpoint::Grant(PeerId to, std::shared_ptr<Send> send) {
  std::shared_ptr<Peer> peer = Find(to);
  if (peer == nullptr) return;
  peer->remote->Post([remote = peer->remote.get(), from = peer->id_there, send] { remote->Copy(from, send); });
}

void Endpoint::Copy(PeerId from, const std::shared_ptr<Send>& send) {
  std::shared_ptr<Peer> peer = Find(from);
  if (peer == nullptr) return;  // fenced: its arrivals have been answered
  auto it = peer->arrivals.find(send);
  if (it == peer->arrivals.end()) return;
  Arrival arrival = std::move(it->second);
  peer->arrivals.erase(it);
  EndArrival(send->bytes, arrival.done, CopyFrom(*send, arrival.destination));
  peer->remote->Post([remote = peer->remote.get(), to = peer->id_there, send] { remote->Complete(to, send); });
}

void Endpoint::Complete(PeerId to, const std::shared_ptr<Send>& send) {
  std::shared_ptr<Peer> peer = Find(to);
  if (peer == nullptr || peer->on_wire.erase(send->id) == 0) return;
  peer->bytes_on_wire -= send->bytes;
  bytes_on_wire_ -= send->bytes;
  counters_.Landed(send->bytes);
  Finish(*send, absl::OkStatus());
  std::vector<PeerId> all;  // room in the total budget may be what another peer waits for
  {
    std::lock_guard lock(mu_);
    for (const auto& [id, other] : peers_) {
      if (!other->queue.empty()) all.push_back(other->id);
    }
  }
  for (PeerId id : all) Pump(id);
}

void Endpoint::FailPeer(PeerId peer_id, const absl::Status& why) {
  std::shared_ptr<Peer> peer;
  std::deque<std::shared_ptr<Send>> queue;
  std::vector<PeerFailed> observers;
  {
    std::lock_guard lock(mu_);
    auto it = peers_.find(peer_id.value);
    if (it == peers_.end()) return;
    peer = std::move(it->second);
    peers_.erase(it);
    queue.swap(peer->queue);
    if (!closing_) observers = on_peer_failed_;
  }
  counters_.PeerGone(true);
  for (auto& [id, send] : peer->on_wire) {
    bytes_on_wire_ -= send->bytes;
    counters_.Landed(send->bytes);
    Finish(*send, why);
  }
  for (auto& send : queue) {
    counters_.Unqueued();
    Finish(*send, why);
  }
  for (auto& [send, arrival] : peer->arrivals) EndArrival(send->bytes, arrival.done, why);
  if (peer->remote != nullptr && peer->remote.get() != this) {
    peer->remote->Post([remote = peer->remote.get(), id = peer->id_there] {
      remote->FailPeer(id, absl::UnavailableError("the other end closed the connection"));
    });
  }
  for (const PeerFailed& observer : observers) observer(peer_id, why);
}

void Endpoint::EndArrival(size_t bytes, ArrivalDone& done, const absl::Status& status) {
  counters_.ArrivalEnded();
  counters_.Received(bytes, status);
  if (done) done(status);
}

void Endpoint::Finish(Send& send, const absl::Status& status) {
  {
    std::lock_guard lock(send.mu);
    send.released = true;
  }
  counters_.Sent(send.bytes, status);
  if (send.done) send.done(status);
}

absl::Status Endpoint::CopyFrom(Send& send, Memory destination) {
  std::lock_guard lock(send.mu);
  if (send.released) return absl::UnavailableError("the sender took its memory back");
  return options_.memory.copy(destination, send.payload);
}

void Endpoint::Run() {
  std::unique_lock lock(mu_);
  while (true) {
    if (frozen_ && !closing_) {
      wake_.wait(lock);
      continue;
    }
    Task task;
    if (!tasks_.empty()) {
      task = std::move(tasks_.front());
      tasks_.pop_front();
    } else if (closing_) {
      return;
    } else if (!timers_.empty() && timers_.begin()->first <= Clock::now()) {
      task = std::move(timers_.begin()->second);
      timers_.erase(timers_.begin());
    } else if (timers_.empty()) {
      wake_.wait(lock);
      continue;
    } else {
      const auto until = timers_.begin()->first;
      wake_.wait_until(lock, until);
      continue;
    }
    lock.unlock();
    task();
    task = nullptr;
    lock.lock();
    idle_.notify_all();
  }
}

bool Endpoint::WaitFor(absl::FunctionRef<bool()> done, absl::Duration timeout) {
  const auto deadline = timeout == absl::InfiniteDuration() ? Clock::time_point::max() : After(timeout);
  // `done` may become true on a thread that does not know us, hence the short slices.
  constexpr auto kSlice = std::chrono::milliseconds(1);
  std::unique_lock lock(mu_);
  while (!done()) {
    const auto now = Clock::now();
    if (now >= deadline) return false;
    idle_.wait_until(lock, std::min<Clock::time_point>(deadline, now + kSlice));
  }
  return true;
}

// What a death looks like: the peers are told, and what was under way is completed.
void Endpoint::FailNow() {
  hub_->Remove(address_);
  SetFrozen(false);
  Post([this] {
    std::vector<PeerId> all;
    {
      std::lock_guard lock(mu_);
      for (const auto& [id, peer] : peers_) all.push_back(peer->id);
    }
    for (PeerId id : all) FailPeer(id, absl::UnavailableError("this endpoint was made to fail"));
  });
}

void Endpoint::Close() {
  hub_->Remove(address_);
  std::vector<PeerId> all;
  {
    // Under `linking` no connection is half made, so the list is complete.
    std::lock_guard linking(hub_->linking);
    std::lock_guard lock(mu_);
    if (closing_) return;
    closing_ = true;
    timers_.clear();
    for (const auto& [id, peer] : peers_) all.push_back(peer->id);
    tasks_.push_back([this, all] {
      for (PeerId id : all) FailPeer(id, absl::CancelledError("transport closed"));
    });
    wake_.notify_all();
  }
  thread_.join();
  std::deque<Task> rest;
  {
    std::lock_guard lock(mu_);
    closed_ = true;
    rest.swap(tasks_);
  }
  // Tasks hold connections to peers, and those to us: run what came last (fences), so that nothing is left unanswered.
  for (Task& task : rest) task();
}

class LoopbackTransport final : public Transport {
 public:
  LoopbackTransport(std::shared_ptr<LoopbackHub> hub, TransportOptions options)
      : endpoint_(std::make_shared<Endpoint>(std::static_pointer_cast<Hub>(std::move(hub)), std::move(options))) {
    endpoint_->Start();
  }
  ~LoopbackTransport() override { endpoint_->Close(); }

  const std::string& address() const override { return endpoint_->address(); }
  bool Supports(MemoryKind) const override { return true; }  // whatever MemoryFunctions can copy
  void SetHandler(uint16_t channel, MessageHandler* handler) override { endpoint_->SetHandler(channel, handler); }
  void OnPeerFailed(PeerFailed callback) override { endpoint_->OnPeerFailed(std::move(callback)); }
  absl::StatusOr<PeerId> Connect(absl::string_view address) override { return endpoint_->Connect(address); }
  absl::StatusOr<SendId> SendMessage(PeerId peer, uint16_t channel, absl::Span<const uint8_t> header,
                                     ConstMemory payload, SendDone done) override {
    return endpoint_->SendMessage(peer, channel, header, payload, std::move(done));
  }
  void Cancel(SendId send) override { endpoint_->Cancel(send); }
  void Disconnect(PeerId peer, Task fenced) override { endpoint_->Disconnect(peer, std::move(fenced)); }
  void RunAfter(absl::Duration delay, Task callback) override { endpoint_->RunAfter(delay, std::move(callback)); }
  bool WaitFor(absl::FunctionRef<bool()> done, absl::Duration timeout) override {
    return endpoint_->WaitFor(done, timeout);
  }
  void Close() override { endpoint_->Close(); }
  TransportStatistics statistics() const override { return endpoint_->statistics(); }
  std::string Describe() const override { return "loopback within one process"; }

 private:
  // Shared because tasks in other endpoints' queues name it until they have run.
  std::shared_ptr<Endpoint> endpoint_;
};

}  // namespace

std::shared_ptr<LoopbackHub> LoopbackHub::Create() { return std::make_shared<Hub>(); }

std::unique_ptr<Transport> CreateLoopbackTransport(std::shared_ptr<LoopbackHub> hub, TransportOptions options) {
  return std::make_unique<LoopbackTransport>(std::move(hub), std::move(options));
}

}  // namespace millrace::kvtransfer
