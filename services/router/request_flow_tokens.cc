// SPDX-License-Identifier: Apache-2.0
// A request on its pair: Prefill, token 0, the hand-off, Decode, and every token's way to the client.
//
// How it came to the pair is request_flow.cc.
#include <utility>

#include "engine/status.h"
#include "services/common/clock.h"
#include "services/router/generation_wire.h"
#include "services/router/request_flow.h"
#include "spdlog/spdlog.h"

namespace millrace::router {
namespace {

// A worker counts its time from when it heard of it, in whole milliseconds: its word may come a little before our own.
constexpr milliseconds kDeadlineSlack{50};

}  // namespace

void RequestFlow::StartPrefill(Flow& flow, Attempt& attempt, v1::PrefillRequest request, TimePoint now) {
  request.set_request_id(flow.wire_id);
  request.set_attempt(attempt.number);
  *request.mutable_spec() = flow.spec;
  request.mutable_prompt_ids()->Assign(flow.request.prompt_ids.begin(), flow.request.prompt_ids.end());
  request.set_deadline_ms(LeftMs(flow.deadline, now));
  attempt.prefill_span = BeginPhase(flow, Phase::kPrefill, now, attempt.prefill->name);
  request.set_traceparent(Traceparent(attempt, attempt.prefill_span));

  auto shared = std::make_shared<v1::PrefillRequest>(std::move(request));
  auto peer = attempt.prefill;
  attempt.prefill_leg = Leg::kOpen;
  attempt.prefill_stream = std::make_shared<StreamCall<v1::PrefillEvent>>(
      loop_, calls_,
      [this, id = attempt.id](const v1::PrefillEvent& event, TimePoint at) { OnPrefillEvent(id, event, at); },
      // Holds what the call uses until it is over.
      [this, id = attempt.id, peer, shared](const absl::Status& status, TimePoint at) {
        OnPrefillDone(id, status, at);
      });
  attempt.prefill_stream->Start(flow.deadline - now + kCallSlack, [&](grpc::ClientContext* context, auto* reactor) {
    peer->prefill->async()->Prefill(context, shared.get(), reactor);
  });
}

void RequestFlow::OnPrefillEvent(AttemptId id, const v1::PrefillEvent& event, TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr) return;
  Flow* flow = attempt->closing ? nullptr : FindFlow(attempt->flow);
  switch (event.event_case()) {
    case v1::PrefillEvent::kAccepted:
      if (flow != nullptr && !flow->admitted) {
        flow->admitted = true;
        flow->sink->OnAdmitted({});
      }
      return;
    case v1::PrefillEvent::kFirstToken:
      if (flow != nullptr) OnFirstToken(*flow, *attempt, event.first_token(), now);
      return;
    case v1::PrefillEvent::kCommitted: {
      attempt->committed = true;
      const v1::HandoffCommitted& committed = event.committed();
      metrics_.CountHandoff(static_cast<int64_t>(committed.bytes()), committed.resent(),
                            static_cast<double>(committed.transfer_us()) / 1e6);
      if (attempt->trace != nullptr) {
        attempt->trace->End(attempt->handoff_span, FromSteady(now), absl::StatusCode::kOk,
                            {{"bytes", static_cast<int64_t>(committed.bytes())},
                             {"extents", committed.extents()},
                             {"resent", committed.resent()},
                             {"transfer_us", static_cast<int64_t>(committed.transfer_us())}});
      }
      return;
    }
    case v1::PrefillEvent::kEnded:
      // Prefill has aborted the lease and had its answer: nothing is left at the decode worker.
      CloseDecodeLeg(*attempt);
      return;
    case v1::PrefillEvent::EVENT_NOT_SET:
      if (flow != nullptr) Fail(*flow, ClientError(absl::InternalError("empty event")), now);
      return;
  }
}

void RequestFlow::OnFirstToken(Flow& flow, Attempt& attempt, const v1::FirstToken& first, TimePoint now) {
  if (attempt.prompt_counted) {
    book_[attempt.prefill->incarnation].prompt_tokens -= attempt.prompt_tokens;
    attempt.prompt_counted = false;
  }
  metrics_.prefill_seconds.Observe(Seconds(now - attempt.started));
  flow.cached_tokens = first.cached_tokens();
  if (attempt.trace != nullptr) {
    attempt.trace->End(attempt.prefill_span, FromSteady(now), absl::StatusCode::kOk,
                       {{"tokens", attempt.prompt_tokens},
                        {"cached_tokens", first.cached_tokens()},
                        {"queue_us", static_cast<int64_t>(first.queue_us())},
                        {"compute_us", static_cast<int64_t>(first.compute_us())}});
  }
  if (!Deliver(flow, first.token(), now)) return;
  if (first.finish() != v1::FINISH_REASON_UNSPECIFIED) {
    attempt.ended_at_prefill = true;
    Finish(flow, first.finish(), now);
    return;
  }
  attempt.handoff_span = BeginPhase(flow, Phase::kHandoff, now, attempt.prefill->name);
  attempt.decode_span = BeginPhase(flow, Phase::kDecode, now, attempt.decode->name);
  StartDecode(flow, attempt, now);
}

void RequestFlow::OnPrefillDone(AttemptId id, const absl::Status& status, TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr) return;
  attempt->prefill_stream.reset();
  if (attempt->prefill_leg == Leg::kOpen) ClosePrefillLeg(*attempt);  // the worker's own word that it is over
  if (attempt->prefill_leg == Leg::kAborting) {
    EraseIfClosed(id, now);
    return;
  }
  if (attempt->closing) {
    // Token 0 was the last one and prefill should have ended the lease; if it could not say so, we do.
    if (attempt->decode_leg == Leg::kOpen) AbortDecode(id, now);
    EraseIfClosed(id, now);
    return;
  }
  Flow* flow = FindFlow(attempt->flow);
  CHECK(flow != nullptr, "an attempt that is not closing has its flow");
  if (attempt->committed) {  // the hand-off is done; what the stream ends with no longer matters
    PlaceQueued(now);
    return;
  }
  const absl::Status why = status.ok() ? absl::InternalError("prefill ended without a hand-off") : status;
  const LogScope about = About(*attempt);
  spdlog::warn("request {} attempt {}: prefill at {} ended: {}", attempt->wire_id, attempt->number,
               attempt->prefill->name, why.ToString());
  if (MayTryAgain(*flow, why)) {
    saturated_[attempt->prefill->incarnation] = now;  // full, draining or going: until it says that it is not
    Requeue(*flow, why, now);
    return;
  }
  Fail(*flow, ClientError(why, now + kDeadlineSlack >= flow->deadline), now);
}

// Opened as soon as there is a first token, beside the transfer: its tokens start when the hand-off is committed.
void RequestFlow::StartDecode(Flow& flow, Attempt& attempt, TimePoint now) {
  auto request = std::make_shared<v1::DecodeRequest>();
  *request->mutable_lease() = attempt.lease;
  request->set_traceparent(Traceparent(attempt, attempt.decode_span));
  auto peer = attempt.decode;
  attempt.decode_stream = std::make_shared<StreamCall<v1::DecodeEvent>>(
      loop_, calls_,
      [this, id = attempt.id](const v1::DecodeEvent& event, TimePoint at) { OnDecodeEvent(id, event, at); },
      [this, id = attempt.id, peer, request](const absl::Status& status, TimePoint at) {
        OnDecodeDone(id, status, at);
      });
  attempt.decode_stream->SetPaused(flow.paused);
  attempt.decode_stream->Start(flow.deadline - now + kCallSlack, [&](grpc::ClientContext* context, auto* reactor) {
    peer->decode->async()->Decode(context, request.get(), reactor);
  });
}

void RequestFlow::OnDecodeEvent(AttemptId id, const v1::DecodeEvent& event, TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr) return;
  if (event.has_end()) attempt->decode_ended = true;
  if (attempt->closing) return;
  Flow* flow = FindFlow(attempt->flow);
  CHECK(flow != nullptr, "an attempt that is not closing has its flow");
  if (event.has_tokens()) {
    attempt->committed = true;  // it decodes, so it has verified the state, whatever prefill still reports
    for (const v1::Token& token : event.tokens().tokens()) {
      if (!Deliver(*flow, token, now)) return;
    }
    return;
  }
  if (!event.has_end()) {
    Fail(*flow, ClientError(absl::InternalError("empty event")), now);
    return;
  }
  if (static_cast<int64_t>(event.end().tokens()) != flow->next_index) {
    const LogScope about = About(*attempt);
    spdlog::error("request {}: {} counts {} tokens, {} were forwarded", attempt->wire_id, attempt->decode->name,
                  event.end().tokens(), flow->next_index);
    Fail(*flow, ClientError(absl::InternalError("token count")), now);
    return;
  }
  Finish(*flow, event.end().reason(), now);
}

void RequestFlow::OnDecodeDone(AttemptId id, const absl::Status& status, TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr) return;
  attempt->decode_stream.reset();
  if (attempt->decode_ended && attempt->decode_leg == Leg::kOpen) {
    // The memory went back with the last token; the lease itself is forgotten by Release.
    ReleaseLease(*attempt);
    CloseDecodeLeg(*attempt);
    EraseIfClosed(id, now);
    return;
  }
  if (attempt->closing) {
    EraseIfClosed(id, now);
    return;
  }
  Flow* flow = FindFlow(attempt->flow);
  CHECK(flow != nullptr, "an attempt that is not closing has its flow");
  const absl::Status why = status.ok() ? absl::InternalError("decode ended without an end") : status;
  const LogScope about = About(*attempt);
  spdlog::warn("request {} attempt {}: decode at {} ended after {} tokens: {}", attempt->wire_id, attempt->number,
               attempt->decode->name, flow->next_index, why.ToString());
  Fail(*flow, ClientError(why, now + kDeadlineSlack >= flow->deadline), now);
}

bool RequestFlow::Deliver(Flow& flow, const v1::Token& token, TimePoint now) {
  const int64_t index = static_cast<int64_t>(token.index());
  if (index < flow.next_index) {  // forwarded before: whoever repeats it, the client must not see it twice
    metrics_.tokens_repeated.Increment();
    return true;
  }
  if (index > flow.next_index) {
    spdlog::error("request {}: token {} arrived, {} is next", flow.wire_id, index, flow.next_index);
    Fail(flow, ClientError(absl::InternalError("token index")), now);
    return false;
  }
  ++flow.next_index;
  metrics_.tokens.Increment();
  flow.sink->OnToken(FromProto(token));
  return true;
}
}  // namespace millrace::router
