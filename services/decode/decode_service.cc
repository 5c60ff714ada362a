// SPDX-License-Identifier: Apache-2.0
// See decode_service.h.
#include "services/decode/decode_service.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/event_writer.h"
#include "services/common/grpc_status.h"

namespace millrace::decode {
namespace {

// A reader that has this much to catch up on holds its own sequence back.
constexpr size_t kCongestedBytes = 256 << 10;
constexpr size_t kMaxManifestBytes = 32 << 20;

// Ends a unary call with what the loop answers. The reactor lives until gRPC has sent it.
template <typename Response>
auto Answer(grpc::ServerUnaryReactor* reactor, Response* response) {
  return [reactor, response](absl::StatusOr<Response> answer) {
    if (answer.ok()) *response = *std::move(answer);
    reactor->Finish(ToGrpcStatus(answer.status()));
  };
}

grpc::ServerUnaryReactor* Refuse(grpc::ServerUnaryReactor* reactor, const absl::Status& status) {
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

absl::Status Loading() { return absl::UnavailableError("the decode worker is loading"); }

}  // namespace

absl::Status CheckReserve(const v1::ReserveRequest& request, const RequestLimits& limits) {
  RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  RETURN_IF_ERROR(CheckAttempt(request.attempt()));
  if (!request.has_spec()) return absl::InvalidArgumentError("spec: found nothing, allowed a generation spec");
  RETURN_IF_ERROR(CheckSpec(request.spec(), limits));
  RETURN_IF_ERROR(CheckPromptLength(request.prompt_tokens(), request.spec(), limits));
  RETURN_IF_ERROR(CheckIncarnation("prefill", request.prefill()));
  RETURN_IF_ERROR(CheckIncarnation("router", request.router()));
  RETURN_IF_ERROR(CheckDeadline(request.deadline_ms()).status());
  const float repetition = request.spec().sampling().repetition_penalty();
  const bool wants_ids = (repetition != 0 && repetition != 1) || request.spec().prior_tokens() != 0;
  if (request.prompt_ids_size() == 0 && !wants_ids) return absl::OkStatus();
  if (request.prompt_ids_size() != static_cast<int64_t>(request.prompt_tokens())) {
    return absl::InvalidArgumentError(absl::StrCat("length_mismatch: prompt_ids: found ", request.prompt_ids_size(),
                                                   " ids, prompt_tokens says ", request.prompt_tokens()));
  }
  const absl::Span<const int32_t> ids(request.prompt_ids().data(), request.prompt_ids_size());
  RETURN_IF_ERROR(CheckPrompt(ids, request.spec(), limits));
  if (TokenHash(ids) != request.token_hash()) {
    return absl::InvalidArgumentError("token_hash: is not the hash of prompt_ids");
  }
  return absl::OkStatus();
}

namespace {

// The stream of one sequence's tokens.
class TokenStream final : public EventWriter<v1::DecodeEvent>, public TokenSink {
 public:
  TokenStream(DecodeLoop* loop, uint64_t lease_id) : loop_(loop), lease_id_(lease_id) {}

  void OnTokens(v1::DecodeTokens tokens) override {
    v1::DecodeEvent event;
    *event.mutable_tokens() = std::move(tokens);
    Send(std::move(event));
  }
  void OnEnd(v1::FinishReason reason, uint64_t total_tokens) override {
    v1::DecodeEvent event;
    event.mutable_end()->set_reason(reason);
    event.mutable_end()->set_tokens(total_tokens);
    Send(std::move(event));
    Close(absl::OkStatus());
  }
  void OnError(absl::Status status) override { Close(std::move(status)); }
  bool Congested() const override {
    const bool congested = queued_bytes() > kCongestedBytes;
    if (congested) was_congested_.store(true);
    return congested;
  }

 private:
  void OnCancelled() override {
    if (loop_ != nullptr) loop_->Detach(lease_id_, this);
  }
  void OnDrained() override {
    if (loop_ != nullptr && was_congested_.exchange(false)) loop_->Wake();
  }

  DecodeLoop* const loop_;
  const uint64_t lease_id_;
  mutable std::atomic<bool> was_congested_{false};  // the loop was told so and waits to hear otherwise
};

}  // namespace

absl::Status HandoffService::Check(const v1::LeaseRef& lease) const {
  if (loop_.load() == nullptr) return Loading();
  return CheckLease(lease, self_);
}

grpc::ServerUnaryReactor* HandoffService::Reserve(grpc::CallbackServerContext* context,
                                                  const v1::ReserveRequest* request, v1::ReserveResponse* response) {
  auto* reactor = context->DefaultReactor();
  const absl::Status bad = loop_.load() == nullptr ? Loading() : CheckReserve(*request, limits_);
  if (!bad.ok()) return Refuse(reactor, bad);
  loop_.load()->Reserve(*request, Answer(reactor, response));
  return reactor;
}

grpc::ServerUnaryReactor* HandoffService::Renew(grpc::CallbackServerContext* context, const v1::RenewRequest* request,
                                                v1::RenewResponse* response) {
  auto* reactor = context->DefaultReactor();
  if (const absl::Status bad = Check(request->lease()); !bad.ok()) return Refuse(reactor, bad);
  loop_.load()->Renew(*request, Answer(reactor, response));
  return reactor;
}

grpc::ServerUnaryReactor* HandoffService::Commit(grpc::CallbackServerContext* context, const v1::CommitRequest* request,
                                                 v1::CommitResponse* response) {
  auto* reactor = context->DefaultReactor();
  if (const absl::Status bad = Check(request->lease()); !bad.ok()) return Refuse(reactor, bad);
  if (request->manifest().empty() || request->manifest().size() > kMaxManifestBytes) {
    return Refuse(reactor, absl::InvalidArgumentError(absl::StrCat("manifest: found ", request->manifest().size(),
                                                                   " bytes, allowed 1 to ", kMaxManifestBytes)));
  }
  loop_.load()->Commit(*request, Answer(reactor, response));
  return reactor;
}

grpc::ServerUnaryReactor* HandoffService::Abort(grpc::CallbackServerContext* context,
                                                const v1::AbortLeaseRequest* request,
                                                v1::AbortLeaseResponse* response) {
  auto* reactor = context->DefaultReactor();
  if (const absl::Status bad = Check(request->lease()); !bad.ok()) return Refuse(reactor, bad);
  v1::AbortLeaseRequest bounded = *request;
  if (bounded.reason().size() > 256) bounded.mutable_reason()->resize(256);
  loop_.load()->Abort(std::move(bounded), Answer(reactor, response));
  return reactor;
}

grpc::ServerUnaryReactor* HandoffService::Release(grpc::CallbackServerContext* context,
                                                  const v1::ReleaseRequest* request, v1::ReleaseResponse*) {
  auto* reactor = context->DefaultReactor();
  if (const absl::Status bad = Check(request->lease()); !bad.ok()) return Refuse(reactor, bad);
  loop_.load()->Release(request->lease(), [reactor](absl::Status status) { reactor->Finish(ToGrpcStatus(status)); });
  return reactor;
}

grpc::ServerWriteReactor<v1::DecodeEvent>* DecodeService::Decode(grpc::CallbackServerContext*,
                                                                 const v1::DecodeRequest* request) {
  DecodeLoop* const loop = loop_.load();
  auto stream = std::make_shared<TokenStream>(loop, request->lease().id());
  stream->KeepUntilDone();
  const absl::Status bad = loop == nullptr ? Loading() : CheckLease(request->lease(), self_);
  if (!bad.ok()) {
    stream->Close(bad);
  } else {
    loop->Attach(request->lease(), stream, request->traceparent());
  }
  return stream.get();
}

}  // namespace millrace::decode
