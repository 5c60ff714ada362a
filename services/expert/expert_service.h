// SPDX-License-Identifier: Apache-2.0
// The gRPC end of an expert worker: who it is, who may call it, and the stream that can carry the data.
//
// Thread: gRPC's; nothing here blocks.
#pragma once

#include <atomic>
#include <functional>

#include "millrace/v1/expert.grpc.pb.h"
#include "services/expert/expert_loop.h"

namespace millrace::expert {

class ExpertService final : public v1::Expert::CallbackService {
 public:
  // Answers Unavailable until Serve. `description` is what Describe says.
  void Serve(ExpertLoop* loop, v1::DescribeExpertsResponse description);
  void Stop() { loop_.store(nullptr); }

  grpc::ServerUnaryReactor* Describe(grpc::CallbackServerContext* context, const v1::DescribeExpertsRequest* request,
                                     v1::DescribeExpertsResponse* response) override;
  grpc::ServerUnaryReactor* Attach(grpc::CallbackServerContext* context, const v1::AttachRequest* request,
                                   v1::AttachResponse* response) override;
  grpc::ServerUnaryReactor* Detach(grpc::CallbackServerContext* context, const v1::DetachRequest* request,
                                   v1::DetachResponse* response) override;
  grpc::ServerBidiReactor<v1::ExchangeFrame, v1::ExchangeFrame>* Exchange(
      grpc::CallbackServerContext* context) override;

 private:
  v1::DescribeExpertsResponse description_;  // set before loop_
  std::atomic<ExpertLoop*> loop_{nullptr};
};

}  // namespace millrace::expert
