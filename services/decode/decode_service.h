// SPDX-License-Identifier: Apache-2.0
// The gRPC end of a decode worker: Handoff and Decode. Checks every field, posts to the loop, returns.
//
// Thread: gRPC's. Nothing here blocks; answers come from the engine thread through the loop's callbacks.
#pragma once

#include "millrace/v1/decode.grpc.pb.h"
#include "millrace/v1/handoff.grpc.pb.h"
#include "services/decode/decode_loop.h"

namespace millrace::decode {

// InvalidArgument or DeadlineExceeded names the field. What passes is within what the loop and the engine rely on.
absl::Status CheckReserve(const v1::ReserveRequest& request, const RequestLimits& limits);

class HandoffService final : public v1::Handoff::CallbackService {
 public:
  // Answers Unavailable until then. The loop must outlive the server that this service is registered with.
  void Serve(DecodeLoop* loop, RequestLimits limits, IncarnationId self) {
    limits_ = limits;
    self_ = self;
    loop_.store(loop);
  }

  grpc::ServerUnaryReactor* Reserve(grpc::CallbackServerContext* context, const v1::ReserveRequest* request,
                                    v1::ReserveResponse* response) override;
  grpc::ServerUnaryReactor* Renew(grpc::CallbackServerContext* context, const v1::RenewRequest* request,
                                  v1::RenewResponse* response) override;
  grpc::ServerUnaryReactor* Commit(grpc::CallbackServerContext* context, const v1::CommitRequest* request,
                                   v1::CommitResponse* response) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortLeaseRequest* request,
                                  v1::AbortLeaseResponse* response) override;
  grpc::ServerUnaryReactor* Release(grpc::CallbackServerContext* context, const v1::ReleaseRequest* request,
                                    v1::ReleaseResponse* response) override;

 private:
  // OK if serving and the lease is one of ours.
  absl::Status Check(const v1::LeaseRef& lease) const;

  RequestLimits limits_;  // set before loop_, as self_
  IncarnationId self_;
  std::atomic<DecodeLoop*> loop_{nullptr};
};

class DecodeService final : public v1::Decode::CallbackService {
 public:
  void Serve(DecodeLoop* loop, IncarnationId self) {
    self_ = self;
    loop_.store(loop);
  }
  grpc::ServerWriteReactor<v1::DecodeEvent>* Decode(grpc::CallbackServerContext* context,
                                                    const v1::DecodeRequest* request) override;

 private:
  IncarnationId self_;  // set before loop_
  std::atomic<DecodeLoop*> loop_{nullptr};
};

}  // namespace millrace::decode
