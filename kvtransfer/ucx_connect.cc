// SPDX-License-Identifier: Apache-2.0
// Connections of the UCX transport, made and accepted: the listener, the attempts on a peer's addresses, the hellos in
// which both sides introduce themselves, and what UCX chose to carry it.
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kvtransfer/ucx_transport_impl.h"

namespace millrace::kvtransfer::ucx {

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
  std::erase_if(local.addresses, [&](const IpAddress& ip) { return ip.is_v6 != v6; });
  const bool bind_to_one = local.chosen && local.addresses.size() == 1;
  local.addresses.resize(std::min(local.addresses.size(), internal::kMaxAddresses - 1));
  if (!bind_to_one) local.addresses.push_back(v6 ? internal::kLoopbackV6 : internal::kLoopbackV4);
  address.addresses = local.addresses;

  const IpAddress any{v6, {}};
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
  for (const IpAddress& ip : decoded.addresses) {
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

}  // namespace millrace::kvtransfer::ucx
