// SPDX-License-Identifier: Apache-2.0
// The way to one member of the pool: over the transport or over a gRPC stream, with the same message bytes.
//
// Thread: Send from the engine thread; the receiver is called on the path's own thread.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kvtransfer/transport.h"
#include "services/common/rpc.h"
#include "services/expert/expert_wire.h"

namespace millrace::expert {

class ExpertLink {
 public:
  virtual ~ExpertLink() = default;
  // Sends one message; `payload` is kept alive until it has left. Unavailable: the member is gone.
  virtual absl::Status Send(const ExpertHeader& header, std::shared_ptr<const std::vector<uint8_t>> payload) = 0;
  // Which transport peer replies come from; 0 for a stream, which names its member itself.
  virtual kvtransfer::PeerId peer() const { return {}; }
};

std::shared_ptr<ExpertLink> MakeTransportLink(kvtransfer::Transport& transport, kvtransfer::PeerId peer);

// Opens the Exchange stream. `on_message` gets each reply's frame, `on_broken` the end of the stream, once; neither is
// called after the link was destroyed.
std::shared_ptr<ExpertLink> MakeStreamLink(std::shared_ptr<grpc::Channel> channel,
                                           std::function<void(absl::string_view frame)> on_message,
                                           std::function<void(absl::Status)> on_broken);

}  // namespace millrace::expert
