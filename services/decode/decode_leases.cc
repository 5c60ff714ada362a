// SPDX-License-Identifier: Apache-2.0
// The leases half of the decode loop (decode_loop.h): granted, committed, ended, fenced.
#include <sys/random.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/status.h"
#include "services/common/cache_extents.h"
#include "services/common/clock.h"
#include "services/common/failpoints.h"
#include "services/decode/decode_loop.h"
#include "spdlog/spdlog.h"

namespace millrace::decode {
namespace {

constexpr size_t kEndedAttempts = 4096;  // remembered, so that a late attempt is recognised

// Blocks count only with their lease's epoch: whoever was not told it cannot guess it.
uint64_t NewEpoch() {
  uint64_t epoch = 0;
  while (epoch == 0) CHECK(getrandom(&epoch, sizeof(epoch), 0) == sizeof(epoch), "getrandom");
  return epoch;
}

}  // namespace

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
  lease.epoch = NewEpoch();
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
  lease.expires = now + LeaseTtl(request.ttl_ms());
  lease.deadline = now + absl::Milliseconds(static_cast<int64_t>(std::min<uint64_t>(request.deadline_ms(), 3600000)));
  lease.sequence = *sequence;
  lease.draw.emplace(request.spec(), std::vector<int32_t>(request.prompt_ids().begin(), request.prompt_ids().end()));

  v1::ReserveResponse response;
  response.mutable_lease()->set_id(lease.id);
  response.mutable_lease()->set_epoch(lease.epoch);
  options_.incarnation.To(response.mutable_lease()->mutable_owner());
  response.set_transfer_address(options_.transfer_address);
  response.set_ttl_ms(static_cast<uint32_t>(absl::ToInt64Milliseconds(LeaseTtl(request.ttl_ms()))));
  lease_of_request_[{lease.request_id, lease.spec.choice()}] = lease.id;
  if (metrics_ != nullptr) metrics_->CountLease();
  if (options_.traces != nullptr && !request.traceparent().empty()) {
    lease.trace = options_.traces->Begin(lease.request_id, "decode worker", request.traceparent(), now);
    lease.receive_span = lease.trace->Begin(Phase::kReceive, now);
  }
  const LogScope about = About(lease);
  spdlog::debug("{} granted: {} prompt tokens", LeaseName(lease), lease.prompt_tokens);
  leases_.emplace(lease.id, std::move(lease));
  live_.store(static_cast<int>(leases_.size()));
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
        absl::StrCat(LeaseName(lease), " is live; attempt ", request.attempt(), " is not newer"));
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
    if (metrics_ != nullptr) metrics_->CountEpochMismatch();
    return absl::AbortedError(absl::StrCat("stale epoch ", ref.epoch(), ": ", LeaseName(it->second), " has another"));
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
    const absl::Status two =
        absl::AbortedError(absl::StrCat(LeaseName(lease), ": two different manifests were committed"));
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
  commit.came = now;
  if (lease.trace != nullptr) {
    lease.trace->End(lease.receive_span, now);
    const auto call = TraceContext::Parse(request.traceparent());
    lease.verify_span = lease.trace->Begin(Phase::kVerify, now, {.parent = call.has_value() ? call->span : 0});
  }
  commit.give_up = now + options_.arrival_grace;
  commit.done = std::move(done);
  lease.commit = std::move(commit);
  PollCommit(lease, now);
}

absl::Status DecodeLoop::CheckHandoffState(const Lease& lease, const v1::HandoffState& state) const {
  const auto differs = [&](absl::string_view field, auto found, auto expected) {
    return absl::FailedPreconditionError(absl::StrCat("token_mismatch: ", LeaseName(lease), ": manifest says ", field,
                                                      " ", found, ", expected ", expected));
  };
  if (!failpoints::Bug("bug.stale_attempt")) {
    if (state.request_id() != lease.request_id) return differs("request_id", state.request_id(), lease.request_id);
    if (state.attempt() != lease.attempt) {
      return absl::AbortedError(absl::StrCat("stale attempt ", state.attempt(), " committed to ", LeaseName(lease)));
    }
    if (IncarnationId::From(state.prefill()) != lease.prefill) {
      return absl::AbortedError(
          absl::StrCat(LeaseName(lease), ": committed by another prefill worker than it was made for"));
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
  if (lease.trace != nullptr) {
    const absl::Time now = MonotonicNow();
    lease.trace->End(lease.verify_span, now, absl::StatusCode::kOk,
                     {{"extents", static_cast<int64_t>(commit.manifest.extents.size())},
                      {"resend", static_cast<int64_t>(verified.resend.size())}});
    (verified.complete ? lease.decode_span : lease.receive_span) =
        lease.trace->Begin(verified.complete ? Phase::kDecode : Phase::kReceive, now,
                           {.parent = verified.complete ? lease.decode_parent : 0});
  }
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
    metrics_->ObserveHandoffPhase("verify", absl::ToDoubleSeconds(MonotonicNow() - commit.came));
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
  const LogScope about = About(lease);
  spdlog::debug("{} ends: {}", LeaseName(lease), why.ToString());
  if (lease.trace != nullptr) {
    lease.trace->AddNumber(lease.decode_span, "tokens", static_cast<int64_t>(lease.draw->total_tokens()));
    lease.trace->Close(MonotonicNow(), why.code());
  }
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
  live_.store(static_cast<int>(leases_.size()));
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

}  // namespace millrace::decode
