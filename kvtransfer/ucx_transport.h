// SPDX-License-Identifier: Apache-2.0
// The transport between processes: UCX active messages whose payload the receiver places.
//
// One UCP context and worker, progressed by one transport thread, or by a thread inside WaitFor. Peer error handling is
// always on, keepalive is 1 s, so a dead peer completes everything that waits for it with Unavailable. Shared-memory
// lanes exclude that mode, so host memory between processes of one machine goes over TCP, and between machines over
// RDMA or TCP; which lanes were really chosen is printed once per connection and is in the statistics.
//
// Configuration is UCX's own: UCX_TLS, UCX_NET_DEVICES and the rest are read from the environment, and what they set
// wins over what is set here. ucx_transport.cc is the only file that includes UCX's headers. Without UCX in the build
// UcxAvailable() is false and CreateUcxTransport answers Unimplemented.
//
// Addresses from peers are framed with magic, version, length and digest, because UCX's own parser takes no length: one
// that does not check out is InvalidArgument and never reaches UCX. Junk sent to UCX's TCP port is UCX's to survive:
// keep that port among peers.
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
