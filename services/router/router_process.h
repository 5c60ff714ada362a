// SPDX-License-Identifier: Apache-2.0
// The router as a process: everything in this folder wired together, from configuration to a clean end.
//
// Three ports that never share one: internal gRPC for workers (Join), public HTTP and gRPC, and the operator's HTTP.
// Thread: Start and the destructor from one thread; WaitAndDrain blocks it.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "millrace/v1/config.pb.h"
#include "services/common/drain.h"

namespace millrace::router {

class RouterProcess {
 public:
  // Loads config.json and tokenizer.json of the model (no weights) and opens the ports. Errors: as those files',
  // Unavailable when a port cannot be bound.
  static absl::StatusOr<std::unique_ptr<RouterProcess>> Start(const v1::ClusterConfig& config);
  virtual ~RouterProcess() = default;

  // Serves until `stop` is raised, then drains: not ready at once, running requests get the grace of the
  // configuration, what is left ends with an error that says so.
  virtual void WaitAndDrain(const StopSignal& stop) = 0;

  // Addresses as bound; empty where "off".
  virtual std::string http_address() const = 0;
  virtual std::string operator_address() const = 0;
  virtual std::string grpc_address() const = 0;
  virtual std::string control_address() const = 0;
};

}  // namespace millrace::router
