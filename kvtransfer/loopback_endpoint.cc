// SPDX-License-Identifier: Apache-2.0
// Endpoints of the loopback transport: connections, messages, failure, the thread; see loopback_endpoint.h.
#include "kvtransfer/loopback_endpoint.h"

#include <algorithm>

#include "kvtransfer/sealed_transport.h"

namespace millrace::kvtransfer::loopback {

absl::StatusOr<PeerId> Endpoint::Connect(absl::string_view address) {
  if (IsSealedAddress(address))
    return absl::InvalidArgumentError("the peer seals what it sends and we do not (transfer.seal differs)");
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

}  // namespace millrace::kvtransfer::loopback
