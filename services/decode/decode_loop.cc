// SPDX-License-Identifier: Apache-2.0
// See decode_loop.h. Here: entry points, the round, a step. What becomes of a lease is decode_leases.cc.
#include "services/decode/decode_loop.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/clock.h"
#include "services/common/failpoints.h"

namespace millrace::decode {
namespace {

constexpr absl::Duration kSweep = absl::Milliseconds(500);       // every lease is looked at this often
constexpr absl::Duration kCommitPoll = absl::Microseconds(500);  // while a commit waits for its last blocks

}  // namespace

DecodeLoop::DecodeLoop(Engine& engine, kvtransfer::Receiver& receiver, DecodeLoopOptions options,
                       WorkerMetrics* metrics)
    : EngineLoop("decode worker", engine, options.max_commands, metrics),
      receiver_(receiver),
      options_(std::move(options)),
      // Ids of two incarnations differ, so that a lease in a log or a message names one thing.
      next_lease_(options_.incarnation.low << 24) {
  Start();
}

DecodeLoop::~DecodeLoop() { Stop(); }

// --- Entry points: post, and answer ResourceExhausted when the engine thread is too far behind. ---

template <typename Done>
void DecodeLoop::Enqueue(Done done, absl::AnyInvocable<void(absl::Time, Done)> run) {
  auto shared = std::make_shared<std::pair<Done, decltype(run)>>(std::move(done), std::move(run));
  Command command = [shared](absl::Time now) { shared->second(now, std::move(shared->first)); };
  if (!TryPost(command)) shared->first(Behind());
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
    (*lease)->expires = now + LeaseTtl(request.ttl_ms());
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

void DecodeLoop::Attach(v1::LeaseRef ref, std::shared_ptr<TokenSink> sink, std::string traceparent) {
  Command command = [this, ref = std::move(ref), sink, traceparent = std::move(traceparent)](absl::Time) {
    auto lease = Find(ref);
    if (!lease.ok()) return sink->OnError(lease.status());
    if ((*lease)->sink != nullptr) {
      return sink->OnError(absl::AlreadyExistsError(absl::StrCat(LeaseName(**lease), " has a token stream already")));
    }
    (*lease)->sink = sink;
    if (const auto call = TraceContext::Parse(traceparent)) (*lease)->decode_parent = call->span;
  };
  if (!TryPost(command)) sink->OnError(Behind());
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

void DecodeLoop::EndAll(const absl::Status& why) {
  for (auto& [id, lease] : leases_) End(lease, why);
}

// --- The round ---

// Ends what is over, looks after commits, plans the step and makes it.
absl::Duration DecodeLoop::Round(absl::Time now) {
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
  const sched::DecodePlan plan = sched::PlanDecode(candidates, options_.max_batch, ToMicros(now));
  for (uint64_t id : plan.deadline_passed) {
    End(leases_.at(id),
        absl::DeadlineExceededError(absl::StrCat(LeaseName(leases_.at(id)), ": deadline passed in decode")));
  }
  for (uint64_t id : plan.lease_ended) {
    End(leases_.at(id), absl::AbortedError(absl::StrCat(LeaseName(leases_.at(id)), " was not renewed in time")));
  }
  if (!plan.batch.empty()) {
    Step(plan.batch);
    return absl::ZeroDuration();
  }
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
  RecordStep(began, static_cast<int64_t>(batch.size()), outputs.ok());
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
    return End(lease, absl::InternalError(absl::StrCat(LeaseName(lease), ": numeric_error: logits are not finite")));
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

void DecodeLoop::Publish() {
  const CacheUsage usage = engine_.Usage();
  LeaseCounts counts;
  Load load;
  for (const auto& [id, lease] : leases_) {
    if (lease.ending) {
      ++counts.ending;
    } else if (lease.phase == v1::LEASE_PHASE_RECEIVING) {
      ++counts.receiving;
      ++load.waiting[static_cast<size_t>(WaitReason::kHandoff)];
    } else {
      ++(lease.phase == v1::LEASE_PHASE_RUNNING ? counts.running : counts.committed);
      if (lease.sink == nullptr) {
        ++load.waiting[static_cast<size_t>(WaitReason::kStream)];
      } else if (lease.sink->Congested()) {
        ++load.waiting[static_cast<size_t>(WaitReason::kReader)];
      } else if (lease.last_step + 1 < step_count_) {  // it could have moved, and the last passes were full without it
        ++load.waiting[static_cast<size_t>(WaitReason::kBatch)];
      }
    }
  }
  load.queued = static_cast<uint32_t>(counts.receiving);
  load.running = static_cast<uint32_t>(counts.committed + counts.running);
  load.work_pending = load.running > 0;
  PublishLoad(load, usage, [&](v1::WorkerStatus& status) { status.set_leased(counts.receiving + counts.ending); });
  if (metrics_ != nullptr) metrics_->SetLeases(counts);
}

}  // namespace millrace::decode
