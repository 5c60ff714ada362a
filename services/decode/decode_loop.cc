// SPDX-License-Identifier: Apache-2.0
// See decode_loop.h. Order: public entry points, the round, a step, leases, commits, the end of a lease.
#include "services/decode/decode_loop.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/status.h"
#include "services/common/cache_extents.h"
#include "services/common/clock.h"
#include "services/common/failpoints.h"

namespace millrace::decode {
namespace {

constexpr absl::Duration kSweep = absl::Milliseconds(500);       // every lease is looked at this often
constexpr absl::Duration kCommitPoll = absl::Microseconds(500);  // while a commit waits for its last blocks
constexpr size_t kEndedAttempts = 4096;                          // remembered, so that a late attempt is recognised
constexpr absl::Duration kStopPatience = absl::Seconds(5);       // for fences at the end; each is bounded by itself

constexpr uint32_t kMinTtlMs = 1000, kMaxTtlMs = 60000, kDefaultTtlMs = 10000;

std::string Name(const Lease& lease) {
  return absl::StrFormat("lease %x (request %s, attempt %d)", lease.id, lease.request_id, lease.attempt);
}

absl::Duration Ttl(uint32_t ttl_ms) {
  return absl::Milliseconds(ttl_ms == 0 ? kDefaultTtlMs : std::clamp(ttl_ms, kMinTtlMs, kMaxTtlMs));
}

}  // namespace

DecodeLoop::DecodeLoop(Engine& engine, kvtransfer::Receiver& receiver, DecodeLoopOptions options,
                       WorkerMetrics* metrics)
    : engine_(engine),
      receiver_(receiver),
      options_(std::move(options)),
      metrics_(metrics),
      commands_(std::make_shared<BoundedQueue<Command>>(options_.max_commands)),
      // Ids of two incarnations differ, so that a lease in a log or a message names one thing.
      next_lease_(options_.incarnation.low << 24) {
  Publish();
  thread_ = std::thread([this] { Run(); });
}

DecodeLoop::~DecodeLoop() { Stop(); }

// --- Entry points: post, and answer ResourceExhausted when the engine thread is too far behind. ---

template <typename Done>
void DecodeLoop::Enqueue(Done done, absl::AnyInvocable<void(absl::Time, Done)> run) {
  auto shared = std::make_shared<std::pair<Done, decltype(run)>>(std::move(done), std::move(run));
  Command command = [shared](absl::Time now) { shared->second(now, std::move(shared->first)); };
  if (!commands_->TryPush(command)) {
    shared->first(absl::ResourceExhaustedError("the decode worker's command queue is full or closed"));
  }
}

void DecodeLoop::Reserve(v1::ReserveRequest request,
                         absl::AnyInvocable<void(absl::StatusOr<v1::ReserveResponse>)> done) {
  using Done = decltype(done);
  Enqueue<Done>(std::move(done), [this, request = std::move(request)](absl::Time now, Done reply) {
    auto response = DoReserve(request, now);
    if (!response.ok() && metrics_ != nullptr)
      metrics_->CountRejected(absl::StatusCodeToString(response.status().code()));
    reply(std::move(response));
  });
}

void DecodeLoop::Renew(v1::RenewRequest request, absl::AnyInvocable<void(absl::StatusOr<v1::RenewResponse>)> done) {
  using Done = decltype(done);
  Enqueue<Done>(std::move(done), [this, request = std::move(request)](absl::Time now, Done reply) {
    auto lease = Find(request.lease());
    if (!lease.ok()) return reply(lease.status());
    (*lease)->expires = now + Ttl(request.ttl_ms());
    v1::RenewResponse response;
    const absl::Duration granted = std::min((*lease)->expires, (*lease)->deadline) - now;
    response.set_ttl_ms(static_cast<uint32_t>(std::max<int64_t>(0, absl::ToInt64Milliseconds(granted))));
    response.set_phase((*lease)->phase);
    reply(std::move(response));
  });
}

void DecodeLoop::Commit(v1::CommitRequest request, CommitDone done) {
  Enqueue<CommitDone>(std::move(done), [this, request = std::move(request)](absl::Time now, CommitDone reply) {
    DoCommit(request, std::move(reply), now);
  });
}

// Aborts are posted past the limit: what they end was admitted, and refusing them would keep its memory.
void DecodeLoop::Abort(v1::AbortLeaseRequest request, AbortDone done) {
  auto shared = std::make_shared<AbortDone>(std::move(done));
  const bool posted = commands_->Post([this, request = std::move(request), shared](absl::Time) {
    auto lease = leases_.find(request.lease().id());
    if (lease == leases_.end() || lease->second.epoch != request.lease().epoch()) {
      return (*shared)(v1::AbortLeaseResponse());
    }
    lease->second.on_gone.push_back(std::move(*shared));
    End(lease->second, absl::AbortedError(absl::StrCat("aborted: ", request.reason())));
  });
  if (!posted) (*shared)(v1::AbortLeaseResponse());
}

void DecodeLoop::Release(v1::LeaseRef ref, absl::AnyInvocable<void(absl::Status)> done) {
  using Done = decltype(done);
  Enqueue<Done>(std::move(done), [this, ref = std::move(ref)](absl::Time, Done reply) {
    auto lease = Find(ref);
    if (lease.ok()) End(**lease, absl::CancelledError("released by the router"));
    reply(absl::OkStatus());
  });
}

void DecodeLoop::Attach(v1::LeaseRef ref, std::shared_ptr<TokenSink> sink) {
  Command command = [this, ref = std::move(ref), sink](absl::Time) {
    auto lease = Find(ref);
    if (!lease.ok()) return sink->OnError(lease.status());
    if ((*lease)->sink != nullptr) {
      return sink->OnError(absl::AlreadyExistsError(absl::StrCat(Name(**lease), " has a token stream already")));
    }
    (*lease)->sink = sink;
  };
  if (!commands_->TryPush(command)) {
    sink->OnError(absl::ResourceExhaustedError("the decode worker's command queue is full or closed"));
  }
}

void DecodeLoop::Detach(uint64_t lease_id, const TokenSink* sink) {
  commands_->Post([this, lease_id, sink](absl::Time) {
    const auto lease = leases_.find(lease_id);
    if (lease == leases_.end() || lease->second.sink.get() != sink) return;
    End(lease->second, absl::CancelledError("token stream closed by the router"));
  });
}

void DecodeLoop::KeepOnlyRouter(IncarnationId router, std::string why) {
  commands_->Post([this, router, why = std::move(why)](absl::Time) {
    for (auto& [id, lease] : leases_) {
      if (lease.router != router) End(lease, absl::AbortedError(why));
    }
  });
}

void DecodeLoop::Drain() {
  commands_->Post([this](absl::Time) { draining_ = true; });
}

void DecodeLoop::Stop() {
  if (!thread_.joinable()) return;
  commands_->Post([this](absl::Time) {
    stopping_ = draining_ = true;
    for (auto& [id, lease] : leases_) End(lease, absl::UnavailableError("the decode worker is stopping"));
  });
  thread_.join();
}

void DecodeLoop::FillStatus(v1::WorkerStatus& status) const {
  std::lock_guard<std::mutex> lock(status_mutex_);
  status.MergeFrom(published_);
}

// --- The round ---

void DecodeLoop::Run() {
  absl::Duration wait = kSweep;
  absl::Time stop_by = absl::InfiniteFuture();
  for (;;) {
    std::deque<Command> commands = commands_->DrainFor(wait);
    const absl::Time now = MonotonicNow();
    for (Command& command : commands) command(now);
    if (stopping_) {
      if (stop_by == absl::InfiniteFuture()) stop_by = now + kStopPatience;
      if (leases_.empty() || now > stop_by) break;
    }
    sched::DecodePlan plan;
    wait = Round(now, plan);
    if (!plan.batch.empty()) Step(plan.batch);
    Publish();
  }
  CHECK(leases_.empty(), absl::StrCat(leases_.size(), " leases could not be fenced"));
  commands_->Close();
  for (Command& command : commands_->DrainFor(absl::ZeroDuration())) command(MonotonicNow());
}

// Ends what is over, looks after commits, plans the step. Returns how long the thread may sleep afterwards.
absl::Duration DecodeLoop::Round(absl::Time now, sched::DecodePlan& plan) {
  std::vector<sched::DecodeCandidate> candidates;
  bool commit_waits = false;
  absl::Time next_end = now + kSweep;
  for (auto& [id, lease] : leases_) {
    if (lease.ending) continue;
    if (lease.commit.has_value()) PollCommit(lease, now);
    if (lease.ending) continue;
    commit_waits = commit_waits || lease.commit.has_value();
    const bool committed = lease.phase == v1::LEASE_PHASE_COMMITTED || lease.phase == v1::LEASE_PHASE_RUNNING;
    candidates.push_back({id, ToMicros(lease.deadline), ToMicros(lease.expires),
                          committed && lease.sink != nullptr && !lease.sink->Congested(), lease.last_step});
    next_end = std::min({next_end, lease.deadline, lease.expires});
  }
  plan = sched::PlanDecode(candidates, options_.max_batch, ToMicros(now));
  for (uint64_t id : plan.deadline_passed) {
    End(leases_.at(id), absl::DeadlineExceededError(absl::StrCat(Name(leases_.at(id)), ": deadline passed in decode")));
  }
  for (uint64_t id : plan.lease_ended) {
    End(leases_.at(id), absl::AbortedError(absl::StrCat(Name(leases_.at(id)), " was not renewed in time")));
  }
  if (!plan.batch.empty()) return absl::ZeroDuration();
  if (commit_waits) return kCommitPoll;
  return std::max(next_end - now, absl::Milliseconds(1));
}

void DecodeLoop::Step(const std::vector<uint64_t>& batch) {
  std::vector<int32_t> tokens(batch.size());
  std::vector<Chunk> chunks(batch.size());
  ++step_count_;
  for (size_t i = 0; i < batch.size(); ++i) {
    Lease& lease = leases_.at(batch[i]);
    lease.phase = v1::LEASE_PHASE_RUNNING;
    lease.last_step = step_count_;
    tokens[i] = lease.draw->last_id();
    chunks[i].sequence = lease.sequence;
    chunks[i].tokens = absl::MakeConstSpan(&tokens[i], 1);
    chunks[i].sampling = &lease.draw->Request();
  }
  const absl::Time began = MonotonicNow();
  auto outputs = [&]() -> absl::StatusOr<std::vector<ChunkOutput>> {
    RETURN_IF_ERROR(failpoints::Hit("d.before_step"));
    ASSIGN_OR_RETURN(auto forward, engine_.Forward(chunks));
    RETURN_IF_ERROR(failpoints::Hit("d.after_step"));
    return forward;
  }();
  const absl::Duration took = MonotonicNow() - began;
  {
    std::lock_guard<std::mutex> lock(status_mutex_);
    published_.set_steps(published_.steps() + 1);
    published_.set_last_step_us(static_cast<uint32_t>(absl::ToInt64Microseconds(took)));
    if (outputs.ok()) published_.set_tokens_total(published_.tokens_total() + batch.size());
  }
  if (metrics_ != nullptr) {
    metrics_->ObserveStep(absl::ToDoubleSeconds(took), static_cast<int64_t>(batch.size()));
    if (outputs.ok()) metrics_->CountTokens(static_cast<int64_t>(batch.size()));
  }
  for (size_t i = 0; i < batch.size(); ++i) {
    Lease& lease = leases_.at(batch[i]);
    if (!outputs.ok()) {
      End(lease, outputs.status());
    } else {
      DeliverToken(lease, (*outputs)[i]);
    }
  }
}

void DecodeLoop::DeliverToken(Lease& lease, const ChunkOutput& output) {
  if (!output.sampled.finite) {
    return End(lease, absl::InternalError(absl::StrCat(Name(lease), ": numeric_error: logits are not finite")));
  }
  v1::DecodeTokens tokens;
  const v1::FinishReason finish = lease.draw->Accept(output.sampled, *tokens.add_tokens());
  if (const absl::Status injected = failpoints::Hit("d.before_send"); !injected.ok()) return End(lease, injected);
  if (failpoints::Bug("bug.double_token")) lease.sink->OnTokens(tokens);
  lease.sink->OnTokens(std::move(tokens));
  if (finish == v1::FINISH_REASON_UNSPECIFIED) return;
  lease.phase = v1::LEASE_PHASE_FINISHED;
  // The stream hears its end before the memory is back: the client need not wait for our housekeeping.
  std::exchange(lease.sink, nullptr)->OnEnd(finish, lease.draw->total_tokens());
  End(lease, absl::OkStatus());
}

// --- Leases ---

absl::StatusOr<v1::ReserveResponse> DecodeLoop::DoReserve(const v1::ReserveRequest& request, absl::Time now) {
  if (draining_) return absl::UnavailableError("the decode worker is draining");
  RETURN_IF_ERROR(failpoints::Hit("d.reserve"));
  if (options_.ready) RETURN_IF_ERROR(options_.ready());
  if (request.compat_hash() != options_.compat_hash) {
    return absl::FailedPreconditionError(absl::StrCat("incompatible_peer: compat_hash is ", request.compat_hash(),
                                                      ", this decode worker's is ", options_.compat_hash));
  }
  RETURN_IF_ERROR(CheckAttemptIsNew(request));
  const int64_t tokens = CacheTokens(request.prompt_tokens(), request.spec());
  auto sequence = engine_.NewSequence(tokens);
  if (!sequence.ok()) {
    const CacheUsage usage = engine_.Usage();
    return absl::Status(sequence.status().code(),
                        absl::StrCat(sequence.status().message(), " (wanted ", PagesFor(tokens),
                                     " pages and a slot, free ", usage.pages_free, " of ", usage.pages_total,
                                     " pages, ", usage.slots_free, " of ", usage.slots_total, " slots)"));
  }
  Lease lease;
  lease.id = ++next_lease_;
  lease.epoch = next_epoch_++;
  const absl::Status opened =
      receiver_.Open({lease.id, lease.epoch},
                     ToExpectedExtents(engine_.Extents(*sequence, request.prompt_tokens()), engine_.options().device));
  if (!opened.ok()) {
    engine_.Release(*sequence);
    return opened;
  }
  lease.request_id = request.request_id();
  lease.attempt = request.attempt();
  lease.spec = request.spec();
  lease.prompt_tokens = request.prompt_tokens();
  lease.token_hash = request.token_hash();
  lease.prefill = IncarnationId::From(request.prefill());
  lease.router = IncarnationId::From(request.router());
  lease.expires = now + Ttl(request.ttl_ms());
  lease.deadline = now + absl::Milliseconds(static_cast<int64_t>(std::min<uint64_t>(request.deadline_ms(), 3600000)));
  lease.sequence = *sequence;
  lease.draw.emplace(request.spec(), std::vector<int32_t>(request.prompt_ids().begin(), request.prompt_ids().end()));

  v1::ReserveResponse response;
  response.mutable_lease()->set_id(lease.id);
  response.mutable_lease()->set_epoch(lease.epoch);
  options_.incarnation.To(response.mutable_lease()->mutable_owner());
  response.set_transfer_address(options_.transfer_address);
  response.set_ttl_ms(static_cast<uint32_t>(absl::ToInt64Milliseconds(Ttl(request.ttl_ms()))));
  lease_of_request_[{lease.request_id, lease.spec.choice()}] = lease.id;
  leases_.emplace(lease.id, std::move(lease));
  live_leases_.store(static_cast<int>(leases_.size()));
  return response;
}

absl::Status DecodeLoop::CheckAttemptIsNew(const v1::ReserveRequest& request) {
  const std::pair<std::string, uint32_t> key{request.request_id(), request.spec().choice()};
  const auto ended = ended_attempts_.find(key);
  if (ended != ended_attempts_.end() && ended->second >= request.attempt() && !failpoints::Bug("bug.stale_attempt")) {
    return absl::AbortedError(absl::StrCat("stale attempt ", request.attempt(), " of request ", request.request_id(),
                                           ": attempt ", ended->second, " was here"));
  }
  const auto live = lease_of_request_.find(key);
  if (live == lease_of_request_.end()) return absl::OkStatus();
  Lease& lease = leases_.at(live->second);
  if (lease.attempt >= request.attempt() && !failpoints::Bug("bug.stale_attempt")) {
    return absl::AlreadyExistsError(
        absl::StrCat(Name(lease), " is live; attempt ", request.attempt(), " is not newer"));
  }
  End(lease, absl::AbortedError(absl::StrCat("stale: attempt ", request.attempt(), " has taken over")));
  return absl::OkStatus();
}

absl::StatusOr<Lease*> DecodeLoop::Find(const v1::LeaseRef& ref) {
  const auto it = leases_.find(ref.id());
  if (it == leases_.end() || it->second.ending) {
    return absl::NotFoundError(absl::StrFormat("lease %x is not live here: ended, expired or never granted", ref.id()));
  }
  if (it->second.epoch != ref.epoch() && !failpoints::Bug("bug.stale_attempt")) {
    return absl::AbortedError(
        absl::StrCat("stale epoch ", ref.epoch(), ": ", Name(it->second), " has epoch ", it->second.epoch));
  }
  return &it->second;
}

// --- Commits ---

void DecodeLoop::DoCommit(const v1::CommitRequest& request, CommitDone done, absl::Time now) {
  if (const absl::Status injected = failpoints::Hit("d.before_commit"); !injected.ok()) return done(injected);
  auto found = Find(request.lease());
  if (!found.ok()) return done(found.status());
  Lease& lease = **found;
  kvtransfer::ManifestLimits limits;
  // A manifest that claims more than the lease expects is refused before anything is allocated for it.
  limits.max_extents = engine_.Extents(lease.sequence, lease.prompt_tokens).size();
  limits.max_metadata_bytes = 64 << 10;
  auto manifest = kvtransfer::DecodeManifest(request.manifest(), limits);
  if (!manifest.ok()) return done(manifest.status());
  if (lease.committed_digest.has_value()) {
    if (*lease.committed_digest == manifest->whole_digest) {  // the answer was lost
      v1::CommitResponse response;
      response.set_outcome(v1::COMMIT_OUTCOME_COMPLETE);
      return done(std::move(response));
    }
    const absl::Status two = absl::AbortedError(absl::StrCat(Name(lease), ": two different manifests were committed"));
    done(two);
    return End(lease, two);
  }
  PendingCommit commit;
  if (!commit.state.ParseFromString(manifest->metadata)) {
    return done(absl::InvalidArgumentError("manifest.metadata: not a HandoffState"));
  }
  if (const absl::Status wrong = CheckHandoffState(lease, commit.state); !wrong.ok()) {
    done(wrong);
    return End(lease, wrong);
  }
  if (lease.commit.has_value()) lease.commit->done(absl::AbortedError("another commit of this lease has come"));
  commit.manifest = *std::move(manifest);
  commit.give_up = now + options_.arrival_grace;
  commit.done = std::move(done);
  lease.commit = std::move(commit);
  PollCommit(lease, now);
}

absl::Status DecodeLoop::CheckHandoffState(const Lease& lease, const v1::HandoffState& state) const {
  const auto differs = [&](absl::string_view field, auto found, auto expected) {
    return absl::FailedPreconditionError(
        absl::StrCat("token_mismatch: ", Name(lease), ": manifest says ", field, " ", found, ", expected ", expected));
  };
  if (!failpoints::Bug("bug.stale_attempt")) {
    if (state.request_id() != lease.request_id) return differs("request_id", state.request_id(), lease.request_id);
    if (state.attempt() != lease.attempt) {
      return absl::AbortedError(absl::StrCat("stale attempt ", state.attempt(), " committed to ", Name(lease)));
    }
    if (IncarnationId::From(state.prefill()) != lease.prefill) {
      return absl::AbortedError(
          absl::StrCat(Name(lease), ": committed by another prefill worker than it was made for"));
    }
  }
  if (state.choice() != lease.spec.choice()) return differs("choice", state.choice(), lease.spec.choice());
  if (state.compat_hash() != options_.compat_hash)
    return differs("compat_hash", state.compat_hash(), options_.compat_hash);
  if (static_cast<int64_t>(state.token_count()) != lease.prompt_tokens) {
    return differs("token_count", state.token_count(), lease.prompt_tokens);
  }
  if (state.token_hash() != lease.token_hash) return differs("token_hash", state.token_hash(), lease.token_hash);
  if (state.first_token().index() != lease.draw->next_index()) {
    return differs("first_token.index", state.first_token().index(), lease.draw->next_index());
  }
  if (state.first_token().id() >= static_cast<uint64_t>(engine_.config().vocab_size)) {
    return differs("first_token.id", state.first_token().id(), engine_.config().vocab_size);
  }
  if (state.sampler().next_token_index() != state.first_token().index() + 1) {
    return differs("sampler.next_token_index", state.sampler().next_token_index(), state.first_token().index() + 1);
  }
  return absl::OkStatus();
}

void DecodeLoop::PollCommit(Lease& lease, absl::Time now) {
  PendingCommit& commit = *lease.commit;
  const kvtransfer::Receiver::Progress progress = receiver_.progress(lease.id);
  if (progress.extents < progress.expected_extents) {
    if (progress.extents > commit.extents_seen || progress.arriving > 0) {
      commit.extents_seen = progress.extents;
      commit.give_up = now + options_.arrival_grace;
    }
    if (now < commit.give_up) return;
  }
  PendingCommit finished = *std::exchange(lease.commit, std::nullopt);
  auto response = FinishCommit(lease, finished);
  const absl::Status failed = response.status();
  finished.done(std::move(response));
  if (!failed.ok()) End(lease, failed);
}

absl::StatusOr<v1::CommitResponse> DecodeLoop::FinishCommit(Lease& lease, const PendingCommit& commit) {
  ASSIGN_OR_RETURN(const kvtransfer::VerifyResult verified, receiver_.Verify(commit.manifest));
  v1::CommitResponse response;
  if (!verified.complete) {
    response.set_outcome(v1::COMMIT_OUTCOME_RESEND);
    response.mutable_resend()->Add(verified.resend.begin(), verified.resend.end());
    return response;
  }
  int64_t imported = lease.prompt_tokens;
  if (failpoints::Bug("bug.n_minus_1") && imported > 1) --imported;
  if (failpoints::Bug("bug.rope_position")) ++imported;
  RETURN_IF_ERROR(engine_.CommitImport(lease.sequence, imported));
  lease.draw->AcceptForeign(commit.state.first_token());
  lease.committed_digest = commit.manifest.whole_digest;
  lease.phase = v1::LEASE_PHASE_COMMITTED;
  if (metrics_ != nullptr) {
    uint64_t bytes = 0;
    for (const kvtransfer::ManifestExtent& extent : commit.manifest.extents) bytes += extent.bytes;
    metrics_->CountTransfer(bytes);
  }
  RETURN_IF_ERROR(failpoints::Hit("d.after_commit"));
  response.set_outcome(v1::COMMIT_OUTCOME_COMPLETE);
  return response;
}

// --- The end of a lease ---

void DecodeLoop::End(Lease& lease, const absl::Status& why) {
  if (lease.ending) return;
  lease.ending = true;
  if (metrics_ != nullptr) metrics_->CountOutcome(why.code());
  if (lease.commit.has_value()) std::exchange(lease.commit, std::nullopt)->done(why);
  if (lease.sink != nullptr) std::exchange(lease.sink, nullptr)->OnError(why);
  // The callback may run on the transport's thread, now or up to the fence's grace later.
  receiver_.Fence(
      lease.id, [commands = commands_, this, id = lease.id] { commands->Post([this, id](absl::Time) { Gone(id); }); });
}

void DecodeLoop::Gone(uint64_t lease_id) {
  const auto it = leases_.find(lease_id);
  CHECK(it != leases_.end(), absl::StrCat("lease ", lease_id, " fenced twice"));
  Lease lease = std::move(it->second);
  leases_.erase(it);
  live_leases_.store(static_cast<int>(leases_.size()));
  engine_.Release(lease.sequence);
  const std::pair<std::string, uint32_t> key{lease.request_id, lease.spec.choice()};
  if (const auto of = lease_of_request_.find(key); of != lease_of_request_.end() && of->second == lease_id) {
    lease_of_request_.erase(of);
  }
  uint32_t& ended = ended_attempts_[key];
  if (ended == 0) ended_order_.push_back(key);
  ended = std::max(ended, lease.attempt);
  if (ended_order_.size() > kEndedAttempts) {
    ended_attempts_.erase(ended_order_.front());
    ended_order_.pop_front();
  }
  for (AbortDone& done : lease.on_gone) {
    v1::AbortLeaseResponse response;
    response.set_was_live(true);
    done(std::move(response));
  }
}

void DecodeLoop::Publish() {
  const CacheUsage usage = engine_.Usage();
  int running = 0, leased = 0;
  for (const auto& [id, lease] : leases_) {
    const bool committed = lease.phase == v1::LEASE_PHASE_COMMITTED || lease.phase == v1::LEASE_PHASE_RUNNING;
    ++(committed && !lease.ending ? running : leased);
  }
  std::lock_guard<std::mutex> lock(status_mutex_);
  published_.set_running(running);
  published_.set_leased(leased);
  published_.set_pages_free(usage.pages_free);
  published_.set_slots_free(usage.slots_free);
  published_.set_work_pending(running > 0);
  if (metrics_ == nullptr) return;
  metrics_->running().Set(running);
  metrics_->SetPages(usage.pages_free, usage.pages_owned);
  metrics_->SetSlots(usage.slots_free, usage.slots_total);
}

}  // namespace millrace::decode
