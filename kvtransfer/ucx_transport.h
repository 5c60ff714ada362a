// SPDX-License-Identifier: Apache-2.0
// The transport between processes: UCX active messages whose payload the receiver places.
//
// One UCP context and worker, progressed by one transport thread, or by a thread inside WaitFor. Peer error handling is
// always on, keepalive is 1 s, so a dead peer completes everything that waits for it with Unavailable. Shared-memory
// lanes exclude that mode, so host memory between processes of one machine goes over TCP, and between machines over
// RDMA or TCP; which lanes were really chosen is printed once per connection and is in the statistics.
//
// Configuration is UCX's own: UCX_TLS, UCX_NET_DEVICES and the rest are read from the environment, and what they set
// wins over what is set here. Only the ucx_ files include UCX's headers (ucx_transport_impl.h lists them). Without UCX
// in the build UcxAvailable() is false and CreateUcxTransport answers Unimplemented.
//
// An address says where the transport listens and is ours, framed with magic, lengths and digest: one that does not
// check out is InvalidArgument, and nothing of it is ever parsed by UCX. Junk sent to the ports themselves is UCX's to
// survive, and one built with assertions, as Debian's 1.13 is, does not: its listener ends the process when a message
// is longer than its first eight bytes say (tcp_sockcm_ep.c:825). No setting avoids it. Release builds (PyPI's 1.22 was
// tried) drop it. Keep the ports among peers (TransportOptions::listen_port, UCX_TCP_PORT_RANGE).
//
// A link that goes dead without a reset while data is unacknowledged is TCP's to notice, after net.ipv4.tcp_retries2.
// Who cannot wait for that disconnects: Disconnect, and so Receiver::Fence and ~Sender, are bounded whatever the peer
// does.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvtransfer/transport.h"

namespace millrace::kvtransfer {

bool UcxAvailable();
std::string UcxVersion();  // of the library that runs, not of the headers; "" without UCX

// FailedPrecondition: UCX cannot start here (no usable transport or device). Messages say what UCX said.
absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(TransportOptions options = {});

}  // namespace millrace::kvtransfer
