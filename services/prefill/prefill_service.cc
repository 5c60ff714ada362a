// SPDX-License-Identifier: Apache-2.0
// See prefill_service.h.
#include "services/prefill/prefill_service.h"

#include <utility>

#include "engine/status.h"
#include "services/common/event_writer.h"
#include "services/common/grpc_status.h"

namespace millrace::prefill {
namespace {

constexpr size_t kMaxTransferAddressBytes = 8 << 10;

class PrefillStream final : public EventWriter<v1::PrefillEvent>, public PrefillSink {
 public:
  explicit PrefillStream(PrefillLoop* loop) : loop_(loop) {}
  void OnEvent(v1::PrefillEvent event) override { Send(std::move(event)); }
  void OnClose(absl::Status status) override { Close(std::move(status)); }

 private:
  void OnCancelled() override {
    if (loop_ != nullptr) loop_->Cancel(this);
  }
  PrefillLoop* const loop_;
};

}  // namespace

absl::StatusOr<absl::Duration> CheckPrefillRequest(const v1::PrefillRequest& request, const RequestLimits& limits) {
  RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  RETURN_IF_ERROR(CheckAttempt(request.attempt()));
  if (!request.has_spec()) return absl::InvalidArgumentError("spec: found nothing, allowed a generation spec");
  RETURN_IF_ERROR(CheckSpec(request.spec(), limits));
  RETURN_IF_ERROR(
      CheckPrompt(absl::MakeConstSpan(request.prompt_ids().data(), request.prompt_ids_size()), request.spec(), limits));
  if (!request.has_target()) return absl::InvalidArgumentError("target: found nothing, allowed a hand-off target");
  const v1::HandoffTarget& target = request.target();
  if (const absl::Status bad = CheckLease(target.lease(), IncarnationId()); !bad.ok()) {
    return absl::Status(bad.code(), absl::StrCat("target.", bad.message()));
  }
  if (target.transfer_address().empty() || target.transfer_address().size() > kMaxTransferAddressBytes) {
    return absl::InvalidArgumentError(absl::StrCat("target.transfer_address: found ", target.transfer_address().size(),
                                                   " bytes, allowed 1 to ", kMaxTransferAddressBytes));
  }
  if (target.control_address().empty() || target.control_address().size() > 256) {
    return absl::InvalidArgumentError("target.control_address: found nothing useful, allowed \"host:port\"");
  }
  return CheckDeadline(request.deadline_ms());
}

grpc::ServerWriteReactor<v1::PrefillEvent>* PrefillService::Prefill(grpc::CallbackServerContext*,
                                                                    const v1::PrefillRequest* request) {
  PrefillLoop* const loop = loop_.load();
  auto stream = std::make_shared<PrefillStream>(loop);
  stream->KeepUntilDone();
  if (loop == nullptr) {
    stream->Close(absl::UnavailableError("the prefill worker is loading"));
    return stream.get();
  }
  const auto time_left = CheckPrefillRequest(*request, limits_);
  if (!time_left.ok()) {
    stream->Close(time_left.status());
  } else {
    loop->Submit(*request, *time_left, stream);
  }
  return stream.get();
}

grpc::ServerUnaryReactor* PrefillService::Abort(grpc::CallbackServerContext* context,
                                                const v1::AbortPrefillRequest* request,
                                                v1::AbortPrefillResponse* response) {
  auto* reactor = context->DefaultReactor();
  PrefillLoop* const loop = loop_.load();
  const absl::Status bad =
      loop == nullptr ? absl::UnavailableError("the prefill worker is loading") : CheckRequestId(request->request_id());
  if (!bad.ok()) {
    reactor->Finish(ToGrpcStatus(bad));
    return reactor;
  }
  loop->Abort(*request, [reactor, response](bool was_live) {
    response->set_was_live(was_live);
    reactor->Finish(grpc::Status::OK);
  });
  return reactor;
}

}  // namespace millrace::prefill
