// SPDX-License-Identifier: Apache-2.0
// The life of a request, in order: admission, placement, Reserve, Prefill, token 0, hand-off, Decode, end.
//
// How attempts are taken down (aborts, leases, dead workers) is request_flow_release.cc.
#include "services/router/request_flow.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/router/generation_wire.h"
#include "services/router/placement.h"
#include "spdlog/spdlog.h"

namespace millrace::router {
namespace {

// Our own deadline timer ends a request; the calls' deadlines are its safety net and fire later.
constexpr milliseconds kCallSlack{2000};

uint64_t LeftMs(TimePoint deadline, TimePoint now) {
  const auto left = std::chrono::duration_cast<milliseconds>(deadline - now).count();
  return static_cast<uint64_t>(std::clamp<int64_t>(left, 1, 3600000));
}

// A worker counts its time from when it heard of it, in whole milliseconds: its word may come a little before our own.
constexpr milliseconds kDeadlineSlack{50};

double Seconds(Duration d) { return std::chrono::duration<double>(d).count(); }

std::string Traceparent(const std::shared_ptr<RequestTrace>& trace, uint64_t span) {
  return trace == nullptr ? "" : trace->ContextOf(span).Traceparent();
}

}  // namespace

// What a front holds. Cancels when it is dropped; the flow may be gone by then, which Cancel tolerates.
class RequestFlow::Handle final : public Generation {
 public:
  Handle(RequestFlow& owner, FlowId id) : owner_(owner), id_(id) {}
  ~Handle() override { Cancel(); }
  void Cancel() override {
    if (cancelled_.exchange(true)) return;
    owner_.loop_.Post([&owner = owner_, id = id_](TimePoint) { owner.Cancel(id); });
  }
  void SetPaused(bool paused) override {
    owner_.loop_.Post([&owner = owner_, id = id_, paused](TimePoint) { owner.SetPaused(id, paused); });
  }

 private:
  RequestFlow& owner_;
  const FlowId id_;
  std::atomic<bool> cancelled_{false};
};

RequestFlow::RequestFlow(EventLoop& loop, WorkerRegistry& registry, FlowOptions options, FlowMetrics& metrics)
    : loop_(loop), registry_(registry), options_(std::move(options)), metrics_(metrics) {
  loop_.Call([this](TimePoint now) {
    registry_.set_on_gone(
        [this](const WorkerView& worker, const std::string& why, TimePoint at) { OnWorkerGone(worker, why, at); });
    registry_.set_on_change([this](TimePoint at) {
      Publish(at);
      PlaceQueued(at);
    });
    Sweep(now);
  });
}

RequestFlow::~RequestFlow() {
  StopAccepting();
  EndAll(Retryable("shutting_down", "the router is shutting down"));
  // Streams were cancelled and unary calls are short: this is bounded by their deadlines, and by ten seconds at worst.
  for (int i = 0; i < 1000 && (calls_.value() > 0 || open_attempts_.load() > 0); ++i) {
    std::this_thread::sleep_for(milliseconds(10));
  }
  loop_.Call([this](TimePoint) {
    registry_.set_on_gone(nullptr);
    registry_.set_on_change(nullptr);
    loop_.Cancel(sweep_timer_);
    for (auto& [id, attempt] : attempts_) CancelTimers(*attempt);
  });
}

absl::StatusOr<std::unique_ptr<Generation>> RequestFlow::Start(GenerationRequest request,
                                                               std::shared_ptr<GenerationSink> sink) {
  CHECK(!request.prompt_ids.empty() && request.max_tokens >= 1, "a front must not start an empty generation");
  const TimePoint now = std::chrono::steady_clock::now();
  const auto refuse = [this](absl::Status status) {
    metrics_.CountRefusal(ToPublicError(status).error.code);
    return status;
  };
  if (!accepting_.load()) {
    return refuse(
        MakeError(absl::StatusCode::kUnavailable, "this router is draining", {.code = "draining", .retry_after_s = 5}));
  }
  if (request.deadline <= now) {
    return refuse(MakeError(absl::StatusCode::kDeadlineExceeded, "the deadline has passed already",
                            {.code = "deadline_unreachable"}));
  }
  const PlacementRequest placement{static_cast<int64_t>(request.prompt_ids.size()), request.max_tokens};
  // Only whether it could ever be placed: where and when is decided on the loop, in order of arrival.
  const absl::Status feasible = ChoosePair(*snapshot(), placement, now).status();
  if (!feasible.ok() && !absl::IsResourceExhausted(feasible)) return refuse(feasible);
  if (open_.fetch_add(1) >= options_.max_requests) {
    open_.fetch_sub(1);
    return refuse(MakeError(absl::StatusCode::kResourceExhausted,
                            absl::StrCat("this router serves ", options_.max_requests, " generations at a time"),
                            {.code = "overloaded", .retry_after_s = 2}));
  }

  auto flow = std::make_unique<Flow>();
  flow->id = next_flow_.fetch_add(1);
  flow->spec = ToSpec(request, options_.end_ids);
  flow->token_hash = TokenHash(request.prompt_ids);
  // A client may use an id again once it is free, but workers remember ids by attempt: ours are never used twice.
  flow->wire_id =
      absl::StrCat(request.request_id.substr(0, 80), "#", options_.router.ToString().substr(0, 8), "-", flow->id);
  flow->accepted = now;
  flow->queued_until = now + options_.queue_timeout;
  flow->deadline = std::min(request.deadline, now + options_.max_deadline);
  if (request.deadline == TimePoint::max()) flow->deadline = now + options_.default_deadline;
  flow->request = std::move(request);
  flow->sink = std::move(sink);
  auto handle = std::make_unique<Handle>(*this, flow->id);
  loop_.Post([this, flow = std::move(flow)](TimePoint at) mutable { Begin(std::move(flow), at); });
  return handle;
}

absl::Status RequestFlow::Ready() const {
  if (!accepting_.load()) return absl::UnavailableError("draining");
  const absl::Status status = ChoosePair(*snapshot(), {1, 1}, std::chrono::steady_clock::now()).status();
  // Busy is ready: what comes now waits its turn.
  return absl::IsResourceExhausted(status) ? absl::OkStatus() : status;
}

void RequestFlow::Begin(std::unique_ptr<Flow> owned, TimePoint now) {
  Flow& flow = *owned;
  const FlowId id = flow.id;
  flows_.emplace(id, std::move(owned));
  flow.generation_span = BeginPhase(flow, Phase::kGeneration, flow.accepted);
  flow.queue_span = BeginPhase(flow, Phase::kQueue, flow.accepted);
  flow.deadline_timer = loop_.At(flow.deadline, [this, id](TimePoint at) {
    if (Flow* late = FindFlow(id)) Fail(*late, DeadlineError(), at);
  });
  flow.queue_timer = loop_.At(flow.queued_until, [this, id](TimePoint at) {
    Flow* waiting = FindFlow(id);
    if (waiting == nullptr || waiting->attempt != 0) return;
    Fail(*waiting,
         waiting->last_refusal.ok() ? MakeError(absl::StatusCode::kResourceExhausted, "no worker had room in time",
                                                {.code = "overloaded", .retry_after_s = 2})
                                    : ClientError(waiting->last_refusal),
         at);
  });
  queue_.push_back(id);
  metrics_.generations_open.Set(static_cast<double>(open_.load()));
  PlaceQueued(now);
}

// In order of arrival: a large request at the head waits for its room rather than being overtaken for ever.
void RequestFlow::PlaceQueued(TimePoint now) {
  if (placing_) return;  // Fail() below ends up here again; the loop under way sees what it changed
  placing_ = true;
  while (!queue_.empty()) {
    Flow* flow = FindFlow(queue_.front());
    if (flow == nullptr) {  // ended while it waited
      queue_.pop_front();
      continue;
    }
    const TimePoint asked = std::chrono::steady_clock::now();
    const ClusterSnapshot snapshot = BookedSnapshot();
    const absl::StatusOr<Pair> pair =
        ChoosePair(snapshot, {static_cast<int64_t>(flow->request.prompt_ids.size()), flow->request.max_tokens}, now);
    const TimePoint decided = std::chrono::steady_clock::now();
    metrics_.decision_seconds.Observe(Seconds(decided - asked));
    // A pool that is empty for a moment (a worker restarts) is worth the queue's patience to a request accepted before.
    queue_waits_for_workers_ = absl::IsUnavailable(pair.status());
    if (absl::IsResourceExhausted(pair.status()) || (queue_waits_for_workers_ && flow->attempts > 0)) break;
    queue_.pop_front();
    if (!pair.ok()) {
      Fail(*flow, pair.status(), now);
      continue;
    }
    if (RequestTrace* const trace = flow->request.trace.get()) {
      const std::string chosen =
          absl::StrCat(snapshot.workers[pair->prefill].name, ", ", snapshot.workers[pair->decode].name);
      trace->End(BeginPhase(*flow, Phase::kPlacement, asked, chosen), FromSteady(decided), absl::StatusCode::kOk,
                 {{"prefill_fit", pair->prefill_fit},
                  {"prefill_waiting_tokens", pair->prefill_waiting_tokens},
                  {"decode_fit", pair->decode_fit},
                  {"decode_use_percent", static_cast<int64_t>(100 * pair->decode_use)}});
    }
    StartAttempt(*flow, snapshot.workers[pair->prefill], snapshot.workers[pair->decode], now);
  }
  placing_ = false;
  metrics_.SetQueued(queue_.size(), queue_waits_for_workers_);
}

void RequestFlow::StartAttempt(Flow& flow, const WorkerView& prefill, const WorkerView& decode, TimePoint now) {
  auto owned = std::make_unique<Attempt>();
  Attempt& attempt = *owned;
  attempt.id = next_attempt_++;
  attempt.flow = flow.id;
  attempt.wire_id = flow.wire_id;
  attempt.number = static_cast<uint32_t>(++flow.attempts);
  attempt.choice = flow.spec.choice();
  attempt.started = now;
  attempt.prefill = Peer(prefill);
  attempt.decode = Peer(decode);
  attempt.prompt_tokens = static_cast<int64_t>(flow.request.prompt_ids.size());
  attempt.pages = PagesFor(attempt.prompt_tokens + flow.request.max_tokens, decode.serves.capacity().page_tokens());
  attempts_.emplace(attempt.id, std::move(owned));
  open_attempts_.fetch_add(1);
  metrics_.attempts_open.Set(static_cast<double>(attempts_.size()));
  flow.attempt = attempt.id;
  metrics_.queue_seconds.Observe(Seconds(now - flow.accepted));
  attempt.trace = flow.request.trace;
  if (attempt.trace != nullptr) attempt.trace->End(flow.queue_span, FromSteady(now));
  attempt.reserve_span = BeginPhase(flow, Phase::kReserve, now, attempt.decode->name);
  const LogScope about = About(attempt);
  spdlog::debug("request {} attempt {}: {} prompt tokens, prefill at {}, decode at {}", attempt.wire_id, attempt.number,
                attempt.prompt_tokens, attempt.prefill->name, attempt.decode->name);

  Assigned& at_prefill = book_[prefill.incarnation];
  at_prefill.requests += 1;
  at_prefill.prompt_tokens += attempt.prompt_tokens;
  attempt.prompt_counted = true;
  attempt.prefill_leg = Leg::kCalling;
  Assigned& at_decode = book_[decode.incarnation];
  at_decode.requests += 1;
  at_decode.pages += attempt.pages;
  attempt.decode_leg = Leg::kCalling;

  v1::ReserveRequest request;
  request.set_request_id(flow.wire_id);
  request.set_attempt(attempt.number);
  *request.mutable_spec() = flow.spec;
  request.set_prompt_tokens(static_cast<uint32_t>(attempt.prompt_tokens));
  request.set_token_hash(flow.token_hash);
  if (flow.spec.sampling().repetition_penalty() != 1.0f) {
    request.mutable_prompt_ids()->Assign(flow.request.prompt_ids.begin(), flow.request.prompt_ids.end());
  }
  request.set_compat_hash(prefill.serves.compat_hash());
  *request.mutable_prefill() = prefill.incarnation.ToProto();
  *request.mutable_router() = options_.router.ToProto();
  request.set_ttl_ms(static_cast<uint32_t>(options_.lease_ttl.count()));
  request.set_deadline_ms(LeftMs(flow.deadline, now));
  request.set_traceparent(Traceparent(attempt.trace, attempt.reserve_span));
  // Not cancelled when the request ends meanwhile: only its answer tells which lease to abort.
  auto shared = std::make_shared<v1::ReserveRequest>(std::move(request));
  auto peer = attempt.decode;
  CallUnary<v1::ReserveResponse>(
      loop_, calls_, std::min<Duration>(options_.reserve_timeout, flow.deadline - now + kCallSlack),
      [&](grpc::ClientContext* context, v1::ReserveResponse* response, std::function<void(grpc::Status)> done) {
        peer->handoff->async()->Reserve(context, shared.get(), response,
                                        [shared, peer, done](const grpc::Status& status) { done(status); });
      },
      [this, id = attempt.id](const absl::Status& status, const v1::ReserveResponse& response, TimePoint at) {
        OnReserved(id, status, response, at);
      });
}

void RequestFlow::OnReserved(AttemptId id, const absl::Status& status, const v1::ReserveResponse& response,
                             TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr) return;  // its worker went first
  if (attempt->decode_leg != Leg::kCalling) return;
  metrics_.reserve_seconds.Observe(Seconds(now - attempt->started));
  if (attempt->trace != nullptr) attempt->trace->End(attempt->reserve_span, FromSteady(now), status.code());
  const LogScope about = About(*attempt);
  Flow* flow = attempt->closing ? nullptr : FindFlow(attempt->flow);
  if (!status.ok()) {
    spdlog::info("request {} attempt {}: {} refused the reservation: {}", attempt->wire_id, attempt->number,
                 attempt->decode->name, status.ToString());
    CloseDecodeLeg(*attempt);
    if (flow == nullptr) {
      EraseIfClosed(id, now);
      return;
    }
    saturated_[attempt->decode->incarnation] = now;
    if (MayTryAgain(*flow, status)) {
      Requeue(*flow, status, now);
    } else {
      Fail(*flow, ClientError(absl::IsDeadlineExceeded(status) ? absl::UnavailableError("") : status), now);
    }
    return;
  }
  attempt->lease = response.lease();
  attempt->decode_leg = Leg::kOpen;
  if (response.lease().id() == 0 || IncarnationId::From(response.lease().owner()) != attempt->decode->incarnation) {
    spdlog::error("request {}: {} granted a lease of another incarnation", attempt->wire_id, attempt->decode->name);
    CloseDecodeLeg(*attempt);
    if (flow != nullptr) Fail(*flow, ClientError(absl::UnavailableError("")), now);
    EraseIfClosed(id, now);
    return;
  }
  if (flow == nullptr) {  // ended while we asked
    AbortDecode(id, now);
    return;
  }
  ScheduleRenew(*attempt, milliseconds(response.ttl_ms()), now);

  v1::PrefillRequest request;
  v1::HandoffTarget* target = request.mutable_target();
  *target->mutable_lease() = response.lease();
  target->set_transfer_address(response.transfer_address());
  target->set_control_address(attempt->decode->control_address);
  target->set_name(attempt->decode->name);
  if (const WorkerView* view = registry_.Find(attempt->decode->incarnation)) {
    target->set_compat_hash(view->serves.compat_hash());
  }
  StartPrefill(*flow, *attempt, std::move(request), now);
}

void RequestFlow::StartPrefill(Flow& flow, Attempt& attempt, v1::PrefillRequest request, TimePoint now) {
  request.set_request_id(flow.wire_id);
  request.set_attempt(attempt.number);
  *request.mutable_spec() = flow.spec;
  request.mutable_prompt_ids()->Assign(flow.request.prompt_ids.begin(), flow.request.prompt_ids.end());
  request.set_deadline_ms(LeftMs(flow.deadline, now));
  attempt.prefill_span = BeginPhase(flow, Phase::kPrefill, now, attempt.prefill->name);
  request.set_traceparent(Traceparent(attempt.trace, attempt.prefill_span));

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
  request->set_traceparent(Traceparent(attempt.trace, attempt.decode_span));
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
