// SPDX-License-Identifier: Apache-2.0
// What the UCX transport keeps about a connection and about a message under way, and how our words become UCX's.
// Internal to kvtransfer.
//
// Plain values, no behaviour: who touches what, and when, is said in ucx_transport_impl.h.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <ucp/api/ucp.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kvtransfer/local_addresses.h"
#include "kvtransfer/transport.h"

namespace millrace::kvtransfer::ucx {

using internal::IpAddress;

inline absl::Status ToStatus(ucs_status_t status, absl::string_view doing) {
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

inline ucs_memory_type_t ToUcx(MemoryKind kind) {
  return kind == MemoryKind::kHost ? UCS_MEMORY_TYPE_HOST : UCS_MEMORY_TYPE_CUDA;
}

inline sockaddr_storage ToSockaddr(const IpAddress& ip, uint16_t port) {
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

inline socklen_t SockaddrBytes(const sockaddr_storage& address) {
  return address.ss_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
}

// A message occupies the wire with its header too; without this, endless empty messages would cost nothing.
inline constexpr size_t kMessageCost = 1024;

struct Peer;
class UcxTransport;

// A message of ours, from SendMessage to its completion.
struct Send {
  uint64_t id = 0;
  std::shared_ptr<Peer> peer;
  std::string head;  // frame and header, as UCX sends them
  ConstMemory payload;
  SendDone done;
  bool counted = true;  // a message of our user, not one of ours
  size_t cost() const { return payload.bytes + kMessageCost; }
};

// A message of theirs whose destination is being written.
struct Arrival {
  std::shared_ptr<Peer> peer;
  size_t bytes = 0;
  ArrivalDone done;
};

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
  std::vector<absl::AnyInvocable<void()>> fenced;

  std::atomic<size_t> accepted{0};  // sends not yet on the wire
  std::atomic<bool> gone{false};
};

}  // namespace millrace::kvtransfer::ucx
