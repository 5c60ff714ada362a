// SPDX-License-Identifier: Apache-2.0
// Stubs of one worker, and deadlines as gRPC wants them.
#include "services/router/worker_calls.h"

#include <algorithm>

#include "services/common/rpc.h"

namespace millrace::router {
WorkerPeer::WorkerPeer(const WorkerView& view, const PeerSecurity* security)
    : name(view.name),
      incarnation(view.incarnation),
      control_address(view.control_address),
      channel(MakeChannel(view.control_address, security, PeerRoleOf(view.role))),
      prefill(v1::Prefill::NewStub(channel)),
      handoff(v1::Handoff::NewStub(channel)),
      decode(v1::Decode::NewStub(channel)) {}

std::chrono::system_clock::time_point GrpcDeadline(Duration from_now) {
  // gRPC wants a wall-clock instant but measures it as a duration from now.
  const auto bounded = std::clamp<Duration>(from_now, milliseconds(1), std::chrono::hours(2));
  return std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::system_clock::duration>(bounded);
}

}  // namespace millrace::router
