// SPDX-License-Identifier: Apache-2.0
// The gRPC end of membership: one reactor per Join stream, between the worker and the registry's loop.
//
// It carries messages and notices the end of streams; what they mean is worker_registry. Thread: gRPC's for callbacks,
// which post to the loop and return.
#pragma once

#include <memory>
#include <utility>

#include "millrace/v1/cluster.grpc.pb.h"
#include "services/common/peer_security.h"
#include "services/router/event_loop.h"
#include "services/router/worker_registry.h"

namespace millrace::router {

class ClusterService final : public v1::Cluster::CallbackService {
 public:
  // Both must outlive the server that this service is registered with. With `security` a worker may join as the role of
  // its certificate only.
  ClusterService(EventLoop& loop, WorkerRegistry& registry, std::shared_ptr<const PeerSecurity> security = nullptr)
      : loop_(loop), registry_(registry), security_(std::move(security)) {}

  grpc::ServerBidiReactor<v1::WorkerMessage, v1::RouterMessage>* Join(grpc::CallbackServerContext* context) override;

 private:
  EventLoop& loop_;
  WorkerRegistry& registry_;
  const std::shared_ptr<const PeerSecurity> security_;
};

}  // namespace millrace::router
