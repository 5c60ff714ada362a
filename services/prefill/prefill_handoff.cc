// SPDX-License-Identifier: Apache-2.0
// The hand-off half of the prefill loop (prefill_loop.h): sending while computing, the manifest, repairs, and the end.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/cache_extents.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/common/failpoints.h"
#include "services/prefill/prefill_loop.h"
#include "services/prefill/seeded_bugs.h"
#include "spdlog/spdlog.h"

namespace millrace::prefill {
namespace {

constexpr double kSlowestWireBytesPerSecond = 50e6;  // slower than this is a stall, not a transfer
constexpr absl::Duration kAbortRetry = absl::Milliseconds(200);
constexpr int kMaxAbortTries = 3;
constexpr int kMaxCommitTries = 2;  // a lost answer is asked for once more; commits are idempotent

}  // namespace

// Called between layers and after a pass: extents that hold full pages and finished layers leave at once.
void PrefillLoop::SendFinal(Prompt& prompt, int64_t tokens, int layers_done) {
  if (prompt.sent.size() < prompt.extents.size()) prompt.sent.resize(prompt.extents.size());
  for (const CacheExtent& extent : prompt.extents) {
    if (!prompt.transfer_error.ok()) return;
    if (!prompt.sent[extent.index] && FinalAfter(extent, tokens, layers_done)) SendExtent(prompt, extent);
  }
}

void PrefillLoop::SendExtent(Prompt& prompt, const CacheExtent& extent) {
  absl::Status status = failpoints::Hit("p.during_transfer");
  kvtransfer::ConstMemory source = ToMemory(extent, engine_.options().device);
  if (status.ok()) {
    source = SeededBugSource(prompt, extent, engine_.layout(), source);
    status = prompt.sender->Send(static_cast<uint64_t>(extent.index), source);
  }
  if (!status.ok()) {
    prompt.transfer_error = status;
    return;
  }
  if (prompt.bytes_sent == 0) {
    prompt.first_sent = MonotonicNow();
    const bool computing = prompt.phase == PromptPhase::kComputing;
    if (prompt.trace != nullptr && computing) {
      prompt.stream_span = prompt.trace->Begin(Phase::kStream, prompt.first_sent, {.parent = prompt.prefill_span});
    }
  }
  prompt.sent[extent.index] = true;
  prompt.bytes_sent += static_cast<uint64_t>(extent.bytes);
}

// The prompt is complete: the partial page and the slot go last.
void PrefillLoop::SendRest(Prompt& prompt, absl::Time now) {
  prompt.phase = PromptPhase::kSending;
  if (prompt.trace != nullptr) prompt.handoff_span = prompt.trace->Begin(Phase::kHandoff, now);
  if (const absl::Status injected = failpoints::Hit("p.before_transfer"); !injected.ok()) return End(prompt, injected);
  prompt.extents = engine_.Extents(*prompt.sequence, prompt.tokens_done);
  prompt.sent.resize(prompt.extents.size());
  for (const CacheExtent& extent : prompt.extents) {
    if (prompt.transfer_error.ok() && !prompt.sent[extent.index]) SendExtent(prompt, extent);
  }
  if (!prompt.transfer_error.ok()) return End(prompt, AtDecode(prompt, "sending", prompt.transfer_error));
  prompt.transfer_deadline = now + options_.transfer_timeout +
                             absl::Seconds(static_cast<double>(prompt.bytes_sent) / kSlowestWireBytesPerSecond);
  if (failpoints::Bug("bug.reuse_before_ack")) engine_.Release(*std::exchange(prompt.sequence, std::nullopt));
  FlushThenCommit(prompt);
}

void PrefillLoop::FlushThenCommit(Prompt& prompt) {
  prompt.phase = PromptPhase::kSending;
  BeginPhase(prompt, Phase::kTail, MonotonicNow());
  prompt.sender->Flush([this, commands = commands_, id = prompt.id](absl::Status flushed) {
    commands->Post([this, id, flushed = std::move(flushed)](absl::Time now) {
      const auto it = prompts_.find(id);
      if (it == prompts_.end() || it->second.phase != PromptPhase::kSending) return;
      Prompt& sender = it->second;
      EndPhase(sender, Phase::kTail, now, flushed.code());
      if (!flushed.ok()) {
        if (metrics_ != nullptr) metrics_->CountTransferFailure("send");
        return End(sender, AtDecode(sender, "sending", flushed));
      }
      if (const absl::Status injected = failpoints::Hit("p.after_transfer"); !injected.ok()) {
        return End(sender, injected);
      }
      StartCommit(sender);
    });
  });
}

void PrefillLoop::StartCommit(Prompt& prompt) {
  prompt.phase = PromptPhase::kCommitting;
  BeginPhase(prompt, Phase::kCommit, MonotonicNow());
  if (const absl::Status injected = failpoints::Hit("p.before_commit"); !injected.ok()) return End(prompt, injected);
  auto manifest = EncodeManifest(prompt);
  if (!manifest.ok()) return End(prompt, AtDecode(prompt, "manifest", manifest.status()));
  v1::CommitRequest request;
  *request.mutable_lease() = prompt.request.target().lease();
  request.set_manifest(*std::move(manifest));
  if (prompt.trace != nullptr) request.set_traceparent(prompt.trace->ContextOf(prompt.phase_span).Traceparent());
  ++prompt.commit_tries;
  const absl::Duration left = std::min(prompt.deadline, prompt.transfer_deadline) - MonotonicNow();
  decode_workers_.Commit(prompt.request.target().control_address(), std::move(request),
                         std::max(left, absl::Milliseconds(1)),
                         [this, commands = commands_, id = prompt.id](absl::StatusOr<v1::CommitResponse> answer) {
                           commands->Post([this, id, answer = std::move(answer)](absl::Time now) mutable {
                             const auto it = prompts_.find(id);
                             if (it == prompts_.end() || it->second.phase != PromptPhase::kCommitting) return;
                             OnCommitAnswer(it->second, std::move(answer), now);
                           });
                         });
}

absl::StatusOr<std::string> PrefillLoop::EncodeManifest(Prompt& prompt) const {
  v1::HandoffState state;
  state.set_request_id(prompt.key.request_id);
  state.set_attempt(prompt.request.attempt());
  state.set_choice(prompt.key.choice);
  options_.incarnation.To(state.mutable_prefill());
  state.set_compat_hash(options_.compat_hash);
  state.set_token_count(prompt.ids.size());
  state.set_token_hash(TokenHash(prompt.ids));
  *state.mutable_first_token() = prompt.first_token;
  state.mutable_sampler()->set_next_token_index(prompt.draw->next_index());
  ASSIGN_OR_RETURN(const kvtransfer::Manifest manifest, prompt.sender->BuildManifest(state.SerializeAsString()));
  return kvtransfer::EncodeManifest(manifest);
}

void PrefillLoop::BeginPhase(Prompt& prompt, Phase phase, absl::Time now) {
  prompt.phase_began = now;
  if (prompt.trace == nullptr) return;
  prompt.phase_span = prompt.trace->Begin(
      phase, now,
      {.worker = phase == Phase::kCommit ? prompt.request.target().name() : "", .parent = prompt.handoff_span});
}

void PrefillLoop::EndPhase(Prompt& prompt, Phase phase, absl::Time now, absl::StatusCode code) {
  if (metrics_ != nullptr) {
    metrics_->ObserveHandoffPhase(PhaseName(phase), absl::ToDoubleSeconds(now - prompt.phase_began));
  }
  if (prompt.trace != nullptr) prompt.trace->End(prompt.phase_span, now, code);
}

void PrefillLoop::OnCommitAnswer(Prompt& prompt, absl::StatusOr<v1::CommitResponse> answer, absl::Time now) {
  EndPhase(prompt, Phase::kCommit, now, answer.status().code());
  if (!answer.ok()) {
    if (absl::IsUnavailable(answer.status()) && prompt.commit_tries < kMaxCommitTries) return StartCommit(prompt);
    if (metrics_ != nullptr) metrics_->CountTransferFailure("commit");
    return End(prompt, AtDecode(prompt, "commit", answer.status()));
  }
  if (answer->outcome() == v1::COMMIT_OUTCOME_RESEND) {
    if (++prompt.repairs > options_.max_repairs) {
      if (metrics_ != nullptr) metrics_->CountTransferFailure("repair");
      return End(prompt, AtDecode(prompt, "commit",
                                  absl::DataLossError(absl::StrCat(answer->resend_size(),
                                                                   " extents still missing or "
                                                                   "damaged after ",
                                                                   options_.max_repairs, " repairs"))));
    }
    const std::vector<uint64_t> extents(answer->resend().begin(), answer->resend().end());
    if (const absl::Status sent = prompt.sender->Resend(extents); !sent.ok()) {
      return End(prompt, AtDecode(prompt, "repair", sent));
    }
    prompt.resent += static_cast<uint32_t>(extents.size());
    if (metrics_ != nullptr) metrics_->CountResent(extents.size());
    prompt.commit_tries = 0;
    return FlushThenCommit(prompt);
  }
  if (answer->outcome() != v1::COMMIT_OUTCOME_COMPLETE) {
    return End(prompt, AtDecode(prompt, "commit", absl::InternalError("the answer has no outcome")));
  }
  prompt.committed = true;
  if (prompt.trace != nullptr) {
    prompt.trace->End(prompt.handoff_span, now, absl::StatusCode::kOk,
                      {{"bytes", static_cast<int64_t>(prompt.bytes_sent)}, {"resent", prompt.resent}});
  }
  if (const absl::Status injected = failpoints::Hit("p.after_commit"); !injected.ok()) return End(prompt, injected);
  v1::PrefillEvent event;
  v1::HandoffCommitted& committed = *event.mutable_committed();
  committed.set_bytes(prompt.bytes_sent);
  committed.set_extents(static_cast<uint32_t>(prompt.extents.size()));
  committed.set_resent(prompt.resent);
  committed.set_transfer_us(static_cast<uint64_t>(absl::ToInt64Microseconds(now - prompt.token_at)));
  prompt.sink->OnEvent(std::move(event));
  if (metrics_ != nullptr) {
    metrics_->CountTransfer(prompt.bytes_sent);
    metrics_->ObserveHandoff(absl::ToDoubleSeconds(now - prompt.token_at));
  }
  End(prompt, absl::OkStatus());
}

absl::Status PrefillLoop::AtDecode(const Prompt& prompt, absl::string_view what, const absl::Status& status) const {
  const std::string message =
      absl::StrCat(what, " at decode worker ", prompt.request.target().name(), ": ", status.message());
  // A time-out of the hand-off's own is not the request's deadline.
  if (absl::IsDeadlineExceeded(status) && MonotonicNow() < prompt.deadline) {
    return MakeError(absl::StatusCode::kUnavailable, message, {.code = "handoff_late"});
  }
  return absl::Status(status.code(), message);
}

// --- The end ---

void PrefillLoop::End(Prompt& prompt, absl::Status why) {
  if (prompt.phase == PromptPhase::kEnding) return;
  prompt.phase = PromptPhase::kEnding;
  if (metrics_ != nullptr) metrics_->CountOutcome(why.code());
  const LogScope about = About(prompt);
  spdlog::debug("request {} attempt {} ends: {}", prompt.key.request_id, prompt.request.attempt(), why.ToString());
  if (prompt.trace != nullptr) prompt.trace->Close(MonotonicNow(), why.code());
  const uint64_t id = prompt.id;
  if (prompt.committed && why.ok()) {
    prompt.lease_settled = true;  // it is the decode worker's and the router's now
  } else {
    SettleLease(prompt, why.ok() ? "ended with its first token" : std::string(why.message()));
  }
  // A good end without a commit is told when the lease's abort was answered (LeaseSettled): the router takes it for
  // that.
  if (prompt.committed || !why.ok()) std::exchange(prompt.sink, nullptr)->OnClose(std::move(why));
  if (prompt.sender == nullptr) {
    prompt.wire_released = true;
  } else {
    prompt.sender->Cancel([this, commands = commands_, id] {
      commands->Post([this, id](absl::Time) {
        const auto it = prompts_.find(id);
        if (it == prompts_.end()) return;
        it->second.wire_released = true;
        EraseIfGone(id);
      });
    });
  }
  // Never erased in here: callers hold references into the table.
  commands_->Post([this, id](absl::Time) { EraseIfGone(id); });
}

// An abort is a message with an answer. Without one after three tries the decode worker is dead or cut off, and its
// own lease timer does the rest.
void PrefillLoop::SettleLease(Prompt& prompt, const std::string& reason) {
  v1::AbortLeaseRequest request;
  *request.mutable_lease() = prompt.request.target().lease();
  request.set_reason(reason.substr(0, 200));
  ++prompt.abort_tries;
  decode_workers_.Abort(
      prompt.request.target().control_address(), std::move(request), options_.abort_timeout,
      [this, commands = commands_, id = prompt.id, reason](absl::StatusOr<v1::AbortLeaseResponse> answer) {
        commands->Post([this, id, reason, ok = answer.ok(), code = answer.status().code()](absl::Time) {
          const auto it = prompts_.find(id);
          if (it == prompts_.end()) return;
          Prompt& ending = it->second;
          const bool retry = !ok && ending.abort_tries < kMaxAbortTries && !stopping_ &&
                             (code == absl::StatusCode::kUnavailable || code == absl::StatusCode::kDeadlineExceeded);
          if (retry) {
            transport_.RunAfter(kAbortRetry, [this, commands = commands_, id, reason] {
              commands->Post([this, id, reason](absl::Time) {
                const auto again = prompts_.find(id);
                if (again != prompts_.end()) SettleLease(again->second, reason);
              });
            });
            return;
          }
          LeaseSettled(ending, ok);
          EraseIfGone(id);
        });
      });
}

void PrefillLoop::LeaseSettled(Prompt& prompt, bool answered) {
  prompt.lease_settled = true;
  if (prompt.sink == nullptr) return;  // it has heard of another end
  const auto sink = std::exchange(prompt.sink, nullptr);
  if (!answered) return sink->OnClose(absl::UnavailableError("the abort of the lease was not answered"));
  v1::PrefillEvent ended;
  ended.mutable_ended()->set_reason(prompt.finish);
  sink->OnEvent(std::move(ended));
  sink->OnClose(absl::OkStatus());
}

void PrefillLoop::EraseIfGone(uint64_t prompt_id) {
  const auto it = prompts_.find(prompt_id);
  if (it == prompts_.end()) return;
  Prompt& prompt = it->second;
  if (prompt.phase != PromptPhase::kEnding) return;
  if (prompt.wire_released && prompt.sequence.has_value()) {
    prompt.sender.reset();  // idle: returns at once
    engine_.Release(*std::exchange(prompt.sequence, std::nullopt));
  }
  if (!prompt.wire_released || !prompt.lease_settled) return;
  Prompt gone = std::move(prompt);
  prompts_.erase(it);
  if (const auto of = prompt_of_key_.find(gone.key); of != prompt_of_key_.end() && of->second == prompt_id) {
    prompt_of_key_.erase(of);
  }
  live_.store(static_cast<int>(prompts_.size()));
  for (auto& done : gone.on_gone) done(true);
}

}  // namespace millrace::prefill
