// SPDX-License-Identifier: Apache-2.0
// A request from its admission to its place on a pair: Start, the queue, placement, Reserve.
//
// What the pair then says is request_flow_tokens.cc; how a request ends is request_flow_end.cc, and how its attempts
// are taken down (aborts, leases, dead workers) request_flow_release.cc.
#include "services/router/request_flow.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/router/generation_wire.h"
#include "services/router/placement.h"
#include "spdlog/spdlog.h"

namespace millrace::router {

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
  request.set_traceparent(Traceparent(attempt, attempt.reserve_span));
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
}  // namespace millrace::router
