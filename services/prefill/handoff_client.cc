// SPDX-License-Identifier: Apache-2.0
// See handoff_client.h.
#include "services/prefill/handoff_client.h"

#include <grpcpp/client_context.h>

#include <chrono>
#include <utility>

#include "millrace/v1/handoff.grpc.pb.h"
#include "services/common/grpc_status.h"

namespace millrace::prefill {
namespace {

// Everything one unary call needs, alive until its callback has run.
template <typename Request, typename Response>
struct Call {
  std::unique_ptr<v1::Handoff::Stub> stub;
  grpc::ClientContext context;
  Request request;
  Response response;
  absl::AnyInvocable<void(absl::StatusOr<Response>)> done;

  void Finish(const grpc::Status& status) {
    if (status.ok()) {
      done(std::move(response));
    } else {
      done(FromGrpcStatus(status));
    }
  }
};

template <typename Request, typename Response>
std::shared_ptr<Call<Request, Response>> MakeCall(ChannelPool& channels, const std::string& address, Request request,
                                                  absl::Duration timeout,
                                                  absl::AnyInvocable<void(absl::StatusOr<Response>)> done) {
  auto call = std::make_shared<Call<Request, Response>>();
  call->stub = v1::Handoff::NewStub(channels.Get(address, PeerRole::kDecode));
  call->context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMicroseconds(timeout));
  call->request = std::move(request);
  call->done = std::move(done);
  return call;
}

class GrpcHandoffClient final : public HandoffClient {
 public:
  explicit GrpcHandoffClient(ChannelPool& channels) : channels_(channels) {}

  void Commit(const std::string& address, v1::CommitRequest request, absl::Duration timeout,
              absl::AnyInvocable<void(absl::StatusOr<v1::CommitResponse>)> done) override {
    auto call = MakeCall<v1::CommitRequest, v1::CommitResponse>(channels_, address, std::move(request), timeout,
                                                                std::move(done));
    call->stub->async()->Commit(&call->context, &call->request, &call->response,
                                [call](grpc::Status status) { call->Finish(status); });
  }

  void Abort(const std::string& address, v1::AbortLeaseRequest request, absl::Duration timeout,
             absl::AnyInvocable<void(absl::StatusOr<v1::AbortLeaseResponse>)> done) override {
    auto call = MakeCall<v1::AbortLeaseRequest, v1::AbortLeaseResponse>(channels_, address, std::move(request), timeout,
                                                                        std::move(done));
    call->stub->async()->Abort(&call->context, &call->request, &call->response,
                               [call](grpc::Status status) { call->Finish(status); });
  }

 private:
  ChannelPool& channels_;
};

}  // namespace

std::unique_ptr<HandoffClient> MakeGrpcHandoffClient(ChannelPool& channels) {
  return std::make_unique<GrpcHandoffClient>(channels);
}

}  // namespace millrace::prefill
