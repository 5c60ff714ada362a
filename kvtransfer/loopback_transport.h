// SPDX-License-Identifier: Apache-2.0
// A transport between parts of one process: for tests, and for roles that share a process.
//
// Endpoints meet in a hub. Each has a thread of its own on which its handlers and callbacks run, so that code written
// for UCX meets the same races. A message is copied once, from the sender's memory into the receiver's, by the
// receiver's thread. Fail lets a test kill an endpoint without a process.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kvtransfer/transport.h"

namespace millrace::kvtransfer {

// Where endpoints find each other. Thread-safe. Kept alive by its endpoints.
class LoopbackHub {
 public:
  static std::shared_ptr<LoopbackHub> Create();
  virtual ~LoopbackHub() = default;

  // As if the process behind this endpoint had died: peers see Unavailable, its own callbacks no longer run except to
  // complete what it had. False: no such address.
  virtual bool Fail(absl::string_view address) = 0;

  // Holds back every arrival of the endpoint until Thaw, as if its process were stopped. For tests of fences.
  virtual bool Freeze(absl::string_view address) = 0;
  virtual bool Thaw(absl::string_view address) = 0;
};

std::unique_ptr<Transport> CreateLoopbackTransport(std::shared_ptr<LoopbackHub> hub, TransportOptions options = {});

}  // namespace millrace::kvtransfer
