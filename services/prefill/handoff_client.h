// SPDX-License-Identifier: Apache-2.0
// What the prefill loop says to decode workers: commit and abort, without knowing how it travels.
//
// Thread: methods from the engine thread; callbacks once each, from any thread, also after the loop has ended (they
// must hold what they need). Calls are bounded by their timeout.
#pragma once

#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "millrace/v1/handoff.pb.h"
#include "services/common/rpc.h"

namespace millrace::prefill {

class HandoffClient {
 public:
  virtual ~HandoffClient() = default;
  virtual void Commit(const std::string& address, v1::CommitRequest request, absl::Duration timeout,
                      absl::AnyInvocable<void(absl::StatusOr<v1::CommitResponse>)> done) = 0;
  virtual void Abort(const std::string& address, v1::AbortLeaseRequest request, absl::Duration timeout,
                     absl::AnyInvocable<void(absl::StatusOr<v1::AbortLeaseResponse>)> done) = 0;
};

// Over gRPC. `channels` must outlive it and every call.
std::unique_ptr<HandoffClient> MakeGrpcHandoffClient(ChannelPool& channels);

}  // namespace millrace::prefill
