// SPDX-License-Identifier: Apache-2.0
// See expert_service.h.
#include "services/expert/expert_service.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/generation_spec.h"
#include "services/common/grpc_status.h"

namespace millrace::expert {
namespace {

// One caller's stream. Replies come from the engine thread and are written one at a time; a caller that does not read
// them is bounded by its own open batch, and by the queue of the loop.
class ExchangeStream final : public grpc::ServerBidiReactor<v1::ExchangeFrame, v1::ExchangeFrame>,
                             public std::enable_shared_from_this<ExchangeStream> {
 public:
  explicit ExchangeStream(ExpertLoop* loop) : loop_(loop) {}

  void Begin() {
    self_ = shared_from_this();
    if (loop_ == nullptr) return Close(absl::UnavailableError("the expert worker is loading"));
    StartRead(&incoming_);
  }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return Close(absl::OkStatus());
    const std::string& message = incoming_.message();
    const absl::Span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(message.data()), message.size());
    const auto header = DecodeHeader(bytes);
    if (!header.ok()) return Close(header.status());
    if (bytes.size() - sizeof(ExpertHeader) != header->payload_bytes) {
      return Close(absl::InvalidArgumentError("frame: its length differs from what its header says"));
    }
    auto payload = std::make_shared<std::vector<uint8_t>>(bytes.begin() + sizeof(ExpertHeader), bytes.end());
    loop_->Submit(*header, std::move(payload),
                  [stream = shared_from_this()](const ExpertHeader& reply, const Payload& rows) {
                    v1::ExchangeFrame frame;
                    frame.set_message(MakeFrame(reply, *rows));
                    stream->Write(std::move(frame));
                  });
    StartRead(&incoming_);
  }

  void Write(v1::ExchangeFrame frame) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (finished_) return;
    outbox_.push_back(std::move(frame));
    WriteNext();
  }
  void WriteNext() {  // mutex_ held
    if (writing_ || finished_ || outbox_.empty()) return;
    writing_ = true;
    outgoing_ = std::move(outbox_.front());
    outbox_.pop_front();
    StartWrite(&outgoing_);
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return Close(absl::CancelledError("stream broken"));
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    WriteNext();
  }
  void Close(const absl::Status& status) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::exchange(finished_, true)) return;
    outbox_.clear();
    Finish(ToGrpcStatus(status));
  }
  void OnCancel() override { Close(absl::CancelledError("cancelled by the caller")); }
  void OnDone() override { const auto self = std::move(self_); }

  ExpertLoop* const loop_;
  v1::ExchangeFrame incoming_;
  std::mutex mutex_;
  v1::ExchangeFrame outgoing_;
  std::deque<v1::ExchangeFrame> outbox_;
  bool writing_ = false, finished_ = false;
  std::shared_ptr<ExchangeStream> self_;  // gRPC keeps a plain pointer until OnDone
};

}  // namespace

void ExpertService::Serve(ExpertLoop* loop, v1::DescribeExpertsResponse description) {
  description_ = std::move(description);
  loop_.store(loop);
}

grpc::ServerUnaryReactor* ExpertService::Describe(grpc::CallbackServerContext* context,
                                                  const v1::DescribeExpertsRequest*,
                                                  v1::DescribeExpertsResponse* response) {
  auto* reactor = context->DefaultReactor();
  if (loop_.load() == nullptr) {
    reactor->Finish(ToGrpcStatus(absl::UnavailableError("the expert worker is loading")));
  } else {
    *response = description_;
    reactor->Finish(grpc::Status::OK);
  }
  return reactor;
}

grpc::ServerUnaryReactor* ExpertService::Attach(grpc::CallbackServerContext* context, const v1::AttachRequest* request,
                                                v1::AttachResponse* response) {
  auto* reactor = context->DefaultReactor();
  const absl::Status status = [&]() -> absl::Status {
    ExpertLoop* const loop = loop_.load();
    if (loop == nullptr) return absl::UnavailableError("the expert worker is loading");
    RETURN_IF_ERROR(CheckIncarnation("caller", request->caller()));
    if (request->expert_compat_hash() != description_.expert_compat_hash()) {
      return absl::FailedPreconditionError(absl::StrCat("incompatible_peer: expert_compat_hash is ",
                                                        request->expert_compat_hash(), ", this member's is ",
                                                        description_.expert_compat_hash()));
    }
    loop->Attach(IncarnationId::From(request->caller()));
    *response->mutable_member() = description_.incarnation();
    return absl::OkStatus();
  }();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

grpc::ServerUnaryReactor* ExpertService::Detach(grpc::CallbackServerContext* context, const v1::DetachRequest* request,
                                                v1::DetachResponse*) {
  auto* reactor = context->DefaultReactor();
  const absl::Status status = [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckIncarnation("caller", request->caller()));
    if (ExpertLoop* const loop = loop_.load()) loop->Detach(IncarnationId::From(request->caller()));
    return absl::OkStatus();
  }();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

grpc::ServerBidiReactor<v1::ExchangeFrame, v1::ExchangeFrame>* ExpertService::Exchange(grpc::CallbackServerContext*) {
  auto stream = std::make_shared<ExchangeStream>(loop_.load());
  stream->Begin();
  return stream.get();
}

}  // namespace millrace::expert
