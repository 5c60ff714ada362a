// SPDX-License-Identifier: Apache-2.0
// The gRPC end of a prefill worker: checks every field, posts to the loop, returns.
//
// Thread: gRPC's. Nothing here blocks; events come from the engine thread through the stream's queue.
#pragma once

#include "millrace/v1/prefill.grpc.pb.h"
#include "services/common/generation_spec.h"
#include "services/prefill/prefill_loop.h"

namespace millrace::prefill {

class PrefillService final : public v1::Prefill::CallbackService {
 public:
  // Answers Unavailable until then. The loop must outlive the server that this service is registered with.
  void Serve(PrefillLoop* loop, RequestLimits limits) {
    limits_ = limits;
    loop_.store(loop);
  }

  grpc::ServerWriteReactor<v1::PrefillEvent>* Prefill(grpc::CallbackServerContext* context,
                                                      const v1::PrefillRequest* request) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortPrefillRequest* request,
                                  v1::AbortPrefillResponse* response) override;

 private:
  RequestLimits limits_;  // set before loop_
  std::atomic<PrefillLoop*> loop_{nullptr};
};

// InvalidArgument with the field's name, or what is left of the request's time.
absl::StatusOr<absl::Duration> CheckPrefillRequest(const v1::PrefillRequest& request, const RequestLimits& limits);

}  // namespace millrace::prefill
