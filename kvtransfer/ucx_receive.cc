// SPDX-License-Identifier: Apache-2.0
// Messages that come over UCX: frames checked, hellos left for Progress, payloads placed where the handler says.
#include "absl/strings/str_cat.h"
#include "kvtransfer/ucx_transport_impl.h"

namespace millrace::kvtransfer::ucx {

ucs_status_t UcxTransport::OnMessage(const void* header, size_t header_bytes, void* data, size_t bytes,
                                     const ucp_am_recv_param_t* param) {
  MessageFrame frame;
  if (header_bytes < sizeof(frame) || header_bytes > sizeof(frame) + kMaxHeaderBytes) {
    counters_.Dropped("bad_frame");
    return UCS_OK;
  }
  std::memcpy(&frame, header, sizeof(frame));
  if (frame.magic != MessageFrame::kMagic || frame.payload_bytes != bytes) {
    counters_.Dropped("bad_frame");
    return UCS_OK;
  }
  const absl::Span<const uint8_t> rest(static_cast<const uint8_t*>(header) + sizeof(frame),
                                       header_bytes - sizeof(frame));
  Hello hello;
  if (frame.type == MessageType::kHello || frame.type == MessageType::kHelloAnswer) {
    if (rest.size() != sizeof(hello) || bytes != 0) {
      counters_.Dropped("bad_hello");
      return UCS_OK;
    }
    std::memcpy(&hello, rest.data(), sizeof(hello));
  }
  if (frame.type == MessageType::kHello) {
    if ((param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0) hellos_.emplace_back(hello, param->reply_ep);
    return UCS_OK;
  }
  auto it = by_token_.find(frame.token);
  if (it == by_token_.end() || it->second->failing) {
    counters_.Dropped("unknown_connection");
    return UCS_OK;
  }
  const std::shared_ptr<Peer> peer = it->second;
  switch (frame.type) {
    case MessageType::kHelloAnswer:
      OnHelloAnswer(peer, hello);
      return UCS_OK;
    case MessageType::kGoodbye:
      MarkFailed(peer, absl::UnavailableError("the other end closed the connection"));
      return UCS_OK;
    case MessageType::kData:
      return OnData(peer, frame, rest, data, bytes, param->recv_attr);
    default:
      counters_.Dropped("bad_frame");
      return UCS_OK;
  }
}

ucs_status_t UcxTransport::OnData(const std::shared_ptr<Peer>& peer, const MessageFrame& frame,
                                  absl::Span<const uint8_t> header, void* data, size_t bytes, uint64_t flags) {
  const bool rendezvous = (flags & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  IncomingMessage message{peer->id, frame.channel, header, bytes, {}};
  if (!rendezvous) message.payload = {static_cast<const uint8_t*>(data), bytes};
  MessageHandler* handler = frame.channel < kMaxChannels ? handlers_[frame.channel] : nullptr;
  Placement placement = handler == nullptr ? Placement::Drop("no_handler") : handler->OnMessage(message);
  switch (placement.verdict) {
    case Placement::Verdict::kDrop:
      counters_.Dropped(placement.reason);
      return UCS_OK;
    case Placement::Verdict::kConsumed:
      counters_.Received(bytes, absl::OkStatus());
      return UCS_OK;
    case Placement::Verdict::kPlace:
      break;
  }
  auto arrival = std::make_unique<Arrival>();
  arrival->peer = peer;
  arrival->bytes = bytes;
  arrival->done = std::move(placement.done);
  counters_.ArrivalBegan();
  ++peer->arriving;
  Memory destination = placement.destination;
  if (destination.bytes < bytes) {
    counters_.Dropped("destination_too_small");
    ArrivalEnded(std::move(arrival), absl::InvalidArgumentError(absl::StrCat("destination has ", destination.bytes,
                                                                             " bytes, payload ", bytes)));
    return UCS_OK;
  }
  destination.bytes = bytes;
  if (rendezvous) return ReceiveInto(std::move(arrival), destination, data);
  ArrivalEnded(std::move(arrival), options_.memory.copy(destination, {data, bytes}));
  return UCS_OK;
}

ucs_status_t UcxTransport::ReceiveInto(std::unique_ptr<Arrival> arrival, Memory destination, void* data) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.memory_type = ToUcx(destination.kind);
  param.user_data = arrival.get();
  param.cb.recv_am = [](void* request, ucs_status_t status, size_t, void* user_data) {
    ucp_request_free(request);
    std::unique_ptr<Arrival> ended(static_cast<Arrival*>(user_data));
    UcxTransport* const self = ended->peer->owner;
    self->ArrivalEnded(std::move(ended), ToStatus(status, "receive failed"));
  };
  Arrival* const raw = arrival.release();  // UCX's until its callback
  const ucs_status_ptr_t request = ucp_am_recv_data_nbx(worker_, data, destination.data, destination.bytes, &param);
  if (request == nullptr || UCS_PTR_IS_ERR(request)) {
    ArrivalEnded(std::unique_ptr<Arrival>(raw),
                 request == nullptr ? absl::OkStatus() : ToStatus(UCS_PTR_STATUS(request), "receive failed"));
  }
  return UCS_INPROGRESS;
}

void UcxTransport::ArrivalEnded(std::unique_ptr<Arrival> arrival, const absl::Status& status) {
  const std::shared_ptr<Peer> peer = arrival->peer;
  --peer->arriving;
  if (!status.ok() && !absl::IsInvalidArgument(status)) {
    peer->failed_arrivals.push_back(std::move(arrival));
    return MarkFailed(peer, absl::UnavailableError(status.message()));
  }
  counters_.ArrivalEnded();
  counters_.Received(arrival->bytes, status);
  if (arrival->done) arrival->done(status);
}

}  // namespace millrace::kvtransfer::ucx
