// SPDX-License-Identifier: Apache-2.0
// The ends of a request: finished, failed, cancelled, or back in the queue for another try; and the phases of its
// trace.
//
// The client hears of the end here. What the workers still hold is given back in request_flow_release.cc.
#include <utility>

#include "absl/strings/ascii.h"
#include "services/common/clock.h"
#include "services/router/generation_wire.h"
#include "services/router/request_flow.h"

namespace millrace::router {

void RequestFlow::Finish(Flow& flow, v1::FinishReason reason, TimePoint now) {
  const bool at_end_id = reason == v1::FINISH_REASON_STOP;
  if (!at_end_id && reason != v1::FINISH_REASON_LENGTH) {
    Fail(flow, ClientError(absl::InternalError("finish reason")), now);
    return;
  }
  metrics_.CountEnd(at_end_id ? "stop" : "length");
  metrics_.generation_seconds.Observe(Seconds(now - flow.accepted));
  const std::shared_ptr<GenerationSink> sink = flow.sink;
  const GenerationUsage usage{.prompt_tokens = static_cast<int64_t>(flow.request.prompt_ids.size()),
                              .cached_prompt_tokens = flow.cached_tokens,
                              .completion_tokens = flow.next_index};
  Attempt* attempt = FindAttempt(flow.attempt);
  EndPhases(flow, absl::StatusCode::kOk, now);
  Forget(flow);
  sink->OnFinish(at_end_id ? GenerationEnd::kEndOfSequence : GenerationEnd::kLength, usage);
  if (attempt != nullptr) Close(*attempt, now);
}

void RequestFlow::Fail(Flow& flow, absl::Status status, TimePoint now) {
  metrics_.CountEnd(absl::AsciiStrToLower(absl::StatusCodeToString(status.code())));
  const std::shared_ptr<GenerationSink> sink = flow.sink;
  Attempt* attempt = FindAttempt(flow.attempt);
  EndPhases(flow, status.code(), now);
  Forget(flow);
  sink->OnError(std::move(status));
  if (attempt != nullptr) Close(*attempt, now);
  PlaceQueued(now);
}

// A pair that is full costs no attempt: the request waits for room. A deadline here is the call's, not the client's.
bool RequestFlow::MayTryAgain(const Flow& flow, const absl::Status& why) const {
  if (flow.next_index > 0) return false;
  if (absl::IsResourceExhausted(why)) return true;
  return flow.attempts < options_.max_attempts &&
         (absl::IsUnavailable(why) || absl::IsDeadlineExceeded(why) || absl::IsFailedPrecondition(why));
}

// Back to the head of the queue: it has waited longest. Its patience is still measured from when it was accepted.
void RequestFlow::Requeue(Flow& flow, const absl::Status& why, TimePoint now) {
  metrics_.requeues.Increment();
  Attempt* attempt = FindAttempt(flow.attempt);
  flow.attempt = 0;
  flow.last_refusal = why;
  const FlowId id = flow.id;
  if (attempt != nullptr) EndPhasesOf(*attempt, why.code(), now);
  if (attempt != nullptr) Close(*attempt, now);
  flow.queue_span = BeginPhase(flow, Phase::kQueue, now);
  queue_.push_front(id);
  PlaceQueued(now);
  Flow* waiting = FindFlow(id);
  if (waiting != nullptr && waiting->attempt == 0 && now >= waiting->queued_until)
    Fail(*waiting, ClientError(why), now);
}

void RequestFlow::Forget(Flow& flow) {
  loop_.Cancel(flow.deadline_timer);
  loop_.Cancel(flow.queue_timer);
  flows_.erase(flow.id);
  open_.fetch_sub(1);
  metrics_.generations_open.Set(static_cast<double>(open_.load()));
}

void RequestFlow::Cancel(FlowId id) {
  const TimePoint now = std::chrono::steady_clock::now();
  if (Flow* flow = FindFlow(id)) Fail(*flow, absl::CancelledError("cancelled"), now);
}

void RequestFlow::SetPaused(FlowId id, bool paused) {
  Flow* flow = FindFlow(id);
  if (flow == nullptr) return;
  flow->paused = paused;
  Attempt* attempt = FindAttempt(flow->attempt);
  if (attempt != nullptr && attempt->decode_stream != nullptr) attempt->decode_stream->SetPaused(paused);
}

void RequestFlow::EndAll(absl::Status status) {
  loop_.Call([this, &status](TimePoint now) {
    while (!flows_.empty()) Fail(*flows_.begin()->second, status, now);
  });
}

uint64_t RequestFlow::BeginPhase(const Flow& flow, Phase phase, TimePoint now, const std::string& worker) {
  if (flow.request.trace == nullptr) return 0;
  return flow.request.trace->Begin(phase, FromSteady(now),
                                   {.choice = flow.request.choice,
                                    .attempt = static_cast<uint32_t>(flow.attempts),
                                    .worker = worker,
                                    .parent = flow.generation_span});
}

void RequestFlow::EndPhases(Flow& flow, absl::StatusCode code, TimePoint now) {
  if (flow.request.trace == nullptr) return;
  flow.request.trace->EndWithin(flow.generation_span, FromSteady(now), code, {{"tokens", flow.next_index}});
}

void RequestFlow::EndPhasesOf(Attempt& attempt, absl::StatusCode code, TimePoint now) {
  if (attempt.trace == nullptr) return;
  for (const uint64_t span : {attempt.prefill_span, attempt.handoff_span, attempt.decode_span}) {
    if (span != 0) attempt.trace->End(span, FromSteady(now), code);
  }
}

std::string RequestFlow::Traceparent(const Attempt& attempt, uint64_t span) {
  return attempt.trace == nullptr ? "" : attempt.trace->ContextOf(span).Traceparent();
}

LogScope RequestFlow::About(const Attempt& attempt) {
  return LogScope(ClientRequestId(attempt.wire_id), attempt.trace == nullptr ? "" : attempt.trace->trace_id());
}

RequestFlow::Flow* RequestFlow::FindFlow(FlowId id) {
  const auto found = flows_.find(id);
  return found == flows_.end() ? nullptr : found->second.get();
}

RequestFlow::Attempt* RequestFlow::FindAttempt(AttemptId id) {
  const auto found = attempts_.find(id);
  return found == attempts_.end() ? nullptr : found->second.get();
}

}  // namespace millrace::router
