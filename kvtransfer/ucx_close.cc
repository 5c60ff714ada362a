// SPDX-License-Identifier: Apache-2.0
// Connections of the UCX transport that end: links that fail, the forced close that is the fence, and the order in
// which the owners of memory are told.
#include "absl/strings/str_cat.h"
#include "kvtransfer/ucx_transport_impl.h"

namespace millrace::kvtransfer::ucx {

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

}  // namespace millrace::kvtransfer::ucx
