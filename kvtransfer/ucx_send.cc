// SPDX-License-Identifier: Apache-2.0
// Messages that go over UCX: queued by their callers, launched while there is room, completed.
#include "absl/strings/str_cat.h"
#include "kvtransfer/ucx_transport_impl.h"

namespace millrace::kvtransfer::ucx {

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
      // Of a card's memory everything is announced: an eager message would pass through the host on both sides.
      const bool device = send->payload.kind == MemoryKind::kDevice && send->payload.bytes != 0;
      const bool eager = !device && send->payload.bytes <= eager_bytes_;
      Launch(std::move(send), device ? uint32_t{UCP_AM_SEND_FLAG_RNDV} : eager ? uint32_t{UCP_AM_SEND_FLAG_EAGER} : 0u);
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

}  // namespace millrace::kvtransfer::ucx
