// SPDX-License-Identifier: Apache-2.0
// The public API over gRPC (inference.proto): the HTTP front's twin without JSON.
//
// Requests become the same ApiRequest through the same validation as over HTTP, generations the same text through the
// same pipeline, so that the two fronts cannot disagree. Registered on the public port only; internal services never
// are.
//
// Thread: gRPC's; generations' calls come from the router's loop. Nothing blocks but tokenising a long prompt.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "millrace/v1/inference.grpc.pb.h"
#include "services/router/generation.h"
#include "services/router/openai_request.h"

namespace millrace::router {

struct RouterServiceOptions {
  ServedModel model;
  std::string numerics;  // for ListModels
  ApiLimits limits;
  GenerationService* generations = nullptr;  // must outlive the server
  TraceLog* traces = nullptr;                // where calls' time is recorded; must outlive the server; may be null
};

class RouterService final : public v1::Inference::CallbackService {
 public:
  explicit RouterService(RouterServiceOptions options);
  ~RouterService() override;

  grpc::ServerWriteReactor<v1::GenerateEvent>* Generate(grpc::CallbackServerContext* context,
                                                        const v1::GenerateRequest* request) override;
  grpc::ServerWriteReactor<v1::ChatEvent>* Chat(grpc::CallbackServerContext* context,
                                                const v1::ChatRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context, const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                  v1::AbortResponse* response) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context, const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;

  // Calls that are running, by request id, so that Abort finds them.
  class Running;

 private:
  absl::Status CheckModel(const std::string& model) const;

  const RouterServiceOptions options_;
  const std::shared_ptr<Running> running_;
};

}  // namespace millrace::router
