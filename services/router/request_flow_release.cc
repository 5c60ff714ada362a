// SPDX-License-Identifier: Apache-2.0
// How attempts end: aborts that are repeated until answered, leases, dead workers, and the book of what is in use.
//
// A leg is closed when its worker has said so (the end of its stream, the answer to an abort), when the worker is gone,
// or when its lease has certainly run out. An attempt is erased when both legs are closed.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/error.h"
#include "services/router/generation_wire.h"
#include "services/router/placement.h"
#include "services/router/request_flow.h"
#include "spdlog/spdlog.h"

namespace millrace::router {
namespace {

constexpr milliseconds kSweepInterval{100};
constexpr milliseconds kAbortInterval{200};
// After a good end both workers finish by themselves; past this they are asked.
constexpr milliseconds kSelfClose{5000};
// From the end of a drained worker's membership: how long the ends of its other streams may take to be read.
constexpr milliseconds kLastWords{1000};

}  // namespace

void RequestFlow::Close(Attempt& attempt, TimePoint now) {
  attempt.closing = true;
  attempt.give_up = now + options_.lease_ttl + milliseconds(2000);
  const AttemptId id = attempt.id;
  if (attempt.decode_stream != nullptr) attempt.decode_stream->SetPaused(false);  // so that it can see its end
  if (attempt.ended_at_prefill || attempt.decode_ended) {
    attempt.close_timer = loop_.At(now + kSelfClose, [this, id](TimePoint at) { AbortLegs(id, at); });
    EraseIfClosed(id, now);
    return;
  }
  AbortLegs(id, now);
}

void RequestFlow::AbortLegs(AttemptId id, TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr) return;
  attempt->give_up = std::max(attempt->give_up, now + options_.lease_ttl + milliseconds(2000));
  switch (attempt->prefill_leg) {
    case Leg::kOpen:
      attempt->prefill_leg = Leg::kAborting;
      if (attempt->prefill_stream != nullptr) attempt->prefill_stream->Cancel();
      AbortPrefill(id, now);
      break;
    case Leg::kNone:
    case Leg::kCalling:  // only booked: it was never asked
      ClosePrefillLeg(*attempt);
      break;
    case Leg::kAborting:
    case Leg::kClosed:
      break;
  }
  if (attempt->decode_leg == Leg::kOpen) AbortDecode(id, now);
  // A Reserve that is out (kCalling) is answered or times out; OnReserved aborts what it granted.
  EraseIfClosed(id, now);
}

void RequestFlow::AbortPrefill(AttemptId id, TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr || attempt->prefill_leg != Leg::kAborting) return;
  if (now >= attempt->give_up) {
    const LogScope about = About(*attempt);
    spdlog::error("request {} attempt {}: prefill at {} never answered its abort", attempt->wire_id, attempt->number,
                  attempt->prefill->name);
    metrics_.aborts_unanswered.Increment();
    ClosePrefillLeg(*attempt);
    EraseIfClosed(id, now);
    return;
  }
  auto request = std::make_shared<v1::AbortPrefillRequest>();
  request->set_request_id(attempt->wire_id);
  request->set_attempt(attempt->number);
  request->set_choice(attempt->choice);
  auto peer = attempt->prefill;
  CallUnary<v1::AbortPrefillResponse>(
      loop_, calls_, options_.abort_timeout,
      [&](grpc::ClientContext* context, v1::AbortPrefillResponse* response, std::function<void(grpc::Status)> done) {
        peer->prefill->async()->Abort(context, request.get(), response,
                                      [request, peer, done](const grpc::Status& status) { done(status); });
      },
      [this, id](const absl::Status& status, const v1::AbortPrefillResponse&, TimePoint at) {
        Attempt* ended = FindAttempt(id);
        if (ended == nullptr || ended->prefill_leg != Leg::kAborting) return;
        if (status.ok() || absl::IsNotFound(status)) {
          ClosePrefillLeg(*ended);
          EraseIfClosed(id, at);
          return;
        }
        ended->abort_prefill_timer =
            loop_.At(at + kAbortInterval, [this, id](TimePoint later) { AbortPrefill(id, later); });
      });
}

void RequestFlow::AbortDecode(AttemptId id, TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr || (attempt->decode_leg != Leg::kOpen && attempt->decode_leg != Leg::kAborting)) return;
  if (attempt->decode_leg == Leg::kOpen) {
    attempt->decode_leg = Leg::kAborting;
    loop_.Cancel(std::exchange(attempt->renew_timer, 0));
    if (attempt->decode_stream != nullptr) attempt->decode_stream->Abandon();
  }
  if (now >= attempt->give_up) {
    const LogScope about = About(*attempt);
    spdlog::error("request {} attempt {}: decode at {} never answered its abort", attempt->wire_id, attempt->number,
                  attempt->decode->name);
    metrics_.aborts_unanswered.Increment();
    CloseDecodeLeg(*attempt);
    EraseIfClosed(id, now);
    return;
  }
  auto request = std::make_shared<v1::AbortLeaseRequest>();
  *request->mutable_lease() = attempt->lease;
  request->set_reason("the request has ended at the router");
  auto peer = attempt->decode;
  CallUnary<v1::AbortLeaseResponse>(
      loop_, calls_, options_.abort_timeout,
      [&](grpc::ClientContext* context, v1::AbortLeaseResponse* response, std::function<void(grpc::Status)> done) {
        peer->handoff->async()->Abort(context, request.get(), response,
                                      [request, peer, done](const grpc::Status& status) { done(status); });
      },
      [this, id](const absl::Status& status, const v1::AbortLeaseResponse&, TimePoint at) {
        Attempt* ended = FindAttempt(id);
        if (ended == nullptr || ended->decode_leg != Leg::kAborting) return;
        // An unknown or stale lease is as gone as one that was just aborted.
        if (status.ok() || absl::IsNotFound(status) || absl::IsAborted(status)) {
          CloseDecodeLeg(*ended);
          EraseIfClosed(id, at);
          return;
        }
        ended->abort_decode_timer =
            loop_.At(at + kAbortInterval, [this, id](TimePoint later) { AbortDecode(id, later); });
      });
}

// The worker has given the memory back already; without this answer it forgets the lease when its time is over.
void RequestFlow::ReleaseLease(Attempt& attempt) {
  auto request = std::make_shared<v1::ReleaseRequest>();
  *request->mutable_lease() = attempt.lease;
  auto peer = attempt.decode;
  CallUnary<v1::ReleaseResponse>(
      loop_, calls_, options_.abort_timeout,
      [&](grpc::ClientContext* context, v1::ReleaseResponse* response, std::function<void(grpc::Status)> done) {
        peer->handoff->async()->Release(context, request.get(), response,
                                        [request, peer, done](const grpc::Status& status) { done(status); });
      },
      [](const absl::Status&, const v1::ReleaseResponse&, TimePoint) {});
}

void RequestFlow::ClosePrefillLeg(Attempt& attempt) {
  if (attempt.prefill_leg == Leg::kClosed) return;
  attempt.prefill_leg = Leg::kClosed;
  Assigned& book = book_[attempt.prefill->incarnation];
  book.requests -= 1;
  if (std::exchange(attempt.prompt_counted, false)) book.prompt_tokens -= attempt.prompt_tokens;
  saturated_.erase(attempt.prefill->incarnation);  // it has room again
}

void RequestFlow::CloseDecodeLeg(Attempt& attempt) {
  if (attempt.decode_leg == Leg::kClosed) return;
  attempt.decode_leg = Leg::kClosed;
  loop_.Cancel(std::exchange(attempt.renew_timer, 0));
  Assigned& book = book_[attempt.decode->incarnation];
  book.requests -= 1;
  book.pages -= attempt.pages;
  saturated_.erase(attempt.decode->incarnation);
}

void RequestFlow::EraseIfClosed(AttemptId id, TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr || !attempt->closing) return;
  if (attempt->prefill_leg != Leg::kClosed || attempt->decode_leg != Leg::kClosed) return;
  CancelTimers(*attempt);
  attempts_.erase(id);
  open_attempts_.fetch_sub(1);
  metrics_.attempts_open.Set(static_cast<double>(attempts_.size()));
  PlaceQueued(now);
}

void RequestFlow::CancelTimers(Attempt& attempt) {
  for (EventLoop::TimerId* timer :
       {&attempt.renew_timer, &attempt.close_timer, &attempt.abort_prefill_timer, &attempt.abort_decode_timer}) {
    loop_.Cancel(std::exchange(*timer, 0));
  }
}

void RequestFlow::ScheduleRenew(Attempt& attempt, milliseconds granted, TimePoint now) {
  if (granted <= milliseconds(0)) granted = options_.lease_ttl;
  // A third: two renewals may be lost before the lease is.
  const AttemptId id = attempt.id;
  attempt.renew_timer = loop_.At(now + granted / 3, [this, id](TimePoint at) { Renew(id, at); });
}

void RequestFlow::Renew(AttemptId id, TimePoint now) {
  Attempt* attempt = FindAttempt(id);
  if (attempt == nullptr || attempt->decode_leg != Leg::kOpen) return;
  attempt->renew_timer = 0;
  auto request = std::make_shared<v1::RenewRequest>();
  *request->mutable_lease() = attempt->lease;
  request->set_ttl_ms(static_cast<uint32_t>(options_.lease_ttl.count()));
  auto peer = attempt->decode;
  CallUnary<v1::RenewResponse>(
      loop_, calls_, options_.lease_ttl / 6,
      [&](grpc::ClientContext* context, v1::RenewResponse* response, std::function<void(grpc::Status)> done) {
        peer->handoff->async()->Renew(context, request.get(), response,
                                      [request, peer, done](const grpc::Status& status) { done(status); });
      },
      [this, id](const absl::Status& status, const v1::RenewResponse& response, TimePoint at) {
        Attempt* renewed = FindAttempt(id);
        if (renewed == nullptr || renewed->decode_leg != Leg::kOpen) return;
        const bool lost = absl::IsNotFound(status) || absl::IsAborted(status);
        if (!lost) {
          // No answer is no news: the next one may get through, and a dead worker is noticed elsewhere.
          ScheduleRenew(*renewed, status.ok() ? milliseconds(response.ttl_ms()) : options_.lease_ttl / 4, at);
          return;
        }
        Flow* flow = renewed->closing ? nullptr : FindFlow(renewed->flow);
        const LogScope about = About(*renewed);
        spdlog::warn("request {} attempt {}: lease at {} is gone: {}", renewed->wire_id, renewed->number,
                     renewed->decode->name, status.ToString());
        // With a stream attached its own status says better what happened, and is on its way.
        if (renewed->decode_stream != nullptr || flow == nullptr) return;
        Fail(*flow, ClientError(status), at);
      });
  (void)now;
}

void RequestFlow::OnWorkerGone(const WorkerView& worker, const std::string& why, TimePoint now) {
  metrics_.worker_deaths.Increment();
  const std::string reason = absl::StrCat(worker.name, " ", why);
  if (worker.status.state() != v1::WORKER_STATE_DRAINING) return EndAttemptsAt(worker.incarnation, reason, true, now);
  // One that drained ended its streams before this one, but they are other connections: their ends may come later.
  left_[worker.incarnation] = {reason, now + kLastWords};
}

void RequestFlow::EndAttemptsAt(const IncarnationId& gone, const std::string& why, bool died, TimePoint now) {
  std::vector<AttemptId> affected;
  for (const auto& [id, attempt] : attempts_) {
    if (attempt->prefill->incarnation == gone || attempt->decode->incarnation == gone) affected.push_back(id);
  }
  for (AttemptId id : affected) {
    Attempt* attempt = FindAttempt(id);
    if (attempt == nullptr) continue;
    bool needed = false;
    if (attempt->prefill->incarnation == gone && attempt->prefill_leg != Leg::kClosed) {
      // Once the decode worker has verified the state, prefill's death costs nothing.
      needed |= !attempt->committed;
      if (attempt->prefill_stream != nullptr) attempt->prefill_stream->Abandon();
      ClosePrefillLeg(*attempt);
    }
    if (attempt->decode->incarnation == gone && attempt->decode_leg != Leg::kClosed) {
      needed = true;
      if (attempt->decode_stream != nullptr) attempt->decode_stream->Abandon();
      CloseDecodeLeg(*attempt);
    }
    Flow* flow = attempt->closing ? nullptr : FindFlow(attempt->flow);
    if (flow != nullptr && needed) {
      const LogScope about = About(*attempt);
      const absl::Status lost = absl::UnavailableError(why);
      if (died) ++flow->deaths;
      const bool again = MayTryAgain(*flow, lost) && flow->deaths < options_.max_deaths;
      spdlog::warn("request {} attempt {}: {} after {} tokens: {}", attempt->wire_id, attempt->number,
                   again ? "is tried again" : "ends", flow->next_index, why);
      if (again) {
        Requeue(*flow, lost, now);
      } else {
        Fail(*flow, ClientError(lost), now);
      }
    } else if (attempt->closing && attempt->ended_at_prefill && attempt->decode_leg == Leg::kOpen) {
      AbortDecode(id, now);  // prefill would have ended the lease
    }
    EraseIfClosed(id, now);
  }
  peers_.erase(gone);
  book_.erase(gone);
  saturated_.erase(gone);
}

void RequestFlow::Sweep(TimePoint now) {
  registry_.Sweep(now);
  std::vector<std::pair<IncarnationId, Left>> over;
  for (const auto& [gone, left] : left_) {
    if (now >= left.until) over.emplace_back(gone, left);
  }
  for (const auto& [gone, left] : over) {
    left_.erase(gone);
    EndAttemptsAt(gone, left.why, false, now);
  }
  Publish(now);
  PlaceQueued(now);
  sweep_timer_ = loop_.At(now + kSweepInterval, [this](TimePoint at) { Sweep(at); });
}

void RequestFlow::Publish(TimePoint now) {
  auto fresh = std::make_shared<const ClusterSnapshot>(BookedSnapshot());
  metrics_.SetWorkers(*fresh, now);
  metrics_.SetJoins(registry_.joins());
  absl::MutexLock lock(&published_mutex_);
  published_ = std::move(fresh);
}

std::shared_ptr<const ClusterSnapshot> RequestFlow::snapshot() const {
  absl::MutexLock lock(&published_mutex_);
  return published_;
}

ClusterSnapshot RequestFlow::BookedSnapshot() const {
  ClusterSnapshot snapshot = registry_.Snapshot();
  for (WorkerView& worker : snapshot.workers) {
    if (const auto book = book_.find(worker.incarnation); book != book_.end()) worker.assigned = book->second;
    const auto full = saturated_.find(worker.incarnation);
    worker.saturated = full != saturated_.end() && worker.last_heard <= full->second;
  }
  return snapshot;
}

std::shared_ptr<WorkerPeer> RequestFlow::Peer(const WorkerView& view) {
  std::shared_ptr<WorkerPeer>& peer = peers_[view.incarnation];
  if (peer == nullptr) peer = std::make_shared<WorkerPeer>(view);
  return peer;
}

}  // namespace millrace::router
