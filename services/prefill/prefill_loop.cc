// SPDX-License-Identifier: Apache-2.0
// See prefill_loop.h. Here: entry points, the round, admission, a pass. The hand-off is prefill_handoff.cc.
#include "services/prefill/prefill_loop.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/cache_extents.h"
#include "services/common/clock.h"
#include "services/common/failpoints.h"
#include "spdlog/spdlog.h"

namespace millrace::prefill {
namespace {

constexpr absl::Duration kSweep = absl::Milliseconds(100);  // deadlines of transfers are looked at this often

}  // namespace

PrefillLoop::PrefillLoop(Engine& engine, kvtransfer::Transport& transport, HandoffClient& decode_workers,
                         PrefillLoopOptions options, WorkerMetrics* metrics)
    : EngineLoop("prefill worker", engine, options.max_commands, metrics),
      transport_(transport),
      decode_workers_(decode_workers),
      options_(std::move(options)) {
  Start();
}

PrefillLoop::~PrefillLoop() { Stop(); }

void PrefillLoop::Submit(v1::PrefillRequest request, absl::Duration time_left, std::shared_ptr<PrefillSink> sink) {
  Command command = [this, request = std::move(request), time_left, sink](absl::Time now) mutable {
    DoSubmit(std::move(request), time_left, std::move(sink), now);
  };
  if (!TryPost(command)) sink->OnClose(Behind());
}

// Aborts are posted past the limit: what they end was admitted, and refusing them would keep its memory.
void PrefillLoop::Abort(v1::AbortPrefillRequest request, absl::AnyInvocable<void(bool)> done) {
  auto shared = std::make_shared<decltype(done)>(std::move(done));
  const bool posted = commands_->Post([this, request = std::move(request), shared](absl::Time) {
    const auto it = prompt_of_key_.find(PromptKey{request.request_id(), request.choice()});
    if (it == prompt_of_key_.end()) return (*shared)(false);
    Prompt& prompt = prompts_.at(it->second);
    if (prompt.request.attempt() != request.attempt()) return (*shared)(false);
    prompt.on_gone.push_back(std::move(*shared));
    End(prompt, absl::CancelledError("aborted by the router"));
  });
  if (!posted) (*shared)(false);
}

void PrefillLoop::Cancel(const PrefillSink* sink) {
  commands_->Post([this, sink](absl::Time) {
    for (auto& [id, prompt] : prompts_) {
      if (prompt.sink.get() != sink) continue;
      End(prompt, absl::CancelledError("stream closed by the router"));
      return;
    }
  });
}

void PrefillLoop::CancelAll(absl::Status why) {
  commands_->Post([this, why = std::move(why)](absl::Time) { EndAll(why); });
}

void PrefillLoop::EndAll(const absl::Status& why) {
  std::vector<uint64_t> ids;
  for (const auto& [id, prompt] : prompts_) ids.push_back(id);
  for (uint64_t id : ids) {
    if (const auto it = prompts_.find(id); it != prompts_.end()) End(it->second, why);
  }
}

// --- The round ---

absl::Duration PrefillLoop::Round(absl::Time now) {
  const sched::PrefillPlan plan = Plan(now);
  if (plan.chunks.empty()) return kSweep;
  Step(plan);
  return absl::ZeroDuration();
}

sched::PrefillPlan PrefillLoop::Plan(absl::Time now) {
  std::vector<sched::PrefillCandidate> candidates;
  std::vector<uint64_t> late;
  for (const auto& [id, prompt] : prompts_) {
    switch (prompt.phase) {
      case PromptPhase::kQueued:
      case PromptPhase::kComputing:
        candidates.push_back({id, static_cast<int64_t>(prompt.ids.size()) - prompt.tokens_done,
                              ToMicros(prompt.deadline), prompt.phase == PromptPhase::kComputing,
                              PagesFor(static_cast<int64_t>(prompt.ids.size()))});
        break;
      case PromptPhase::kSending:
      case PromptPhase::kCommitting:
        if (now >= std::min(prompt.deadline, prompt.transfer_deadline)) late.push_back(id);
        break;
      case PromptPhase::kEnding:
        break;
    }
  }
  for (uint64_t id : late) {
    Prompt& prompt = prompts_.at(id);
    if (metrics_ != nullptr) metrics_->CountTransferFailure("deadline");
    End(prompt, AtDecode(prompt, "hand-off", absl::DeadlineExceededError("did not finish in time")));
  }
  const CacheUsage usage = engine_.Usage();
  sched::PrefillPlan plan = sched::PlanPrefill(
      candidates, {engine_.options().max_batch_tokens, usage.pages_free, usage.slots_free}, ToMicros(now));
  for (uint64_t id : plan.expired) {
    End(prompts_.at(id), absl::DeadlineExceededError("deadline passed before the prompt was computed"));
  }
  for (uint64_t id : plan.admit) {
    Prompt& prompt = prompts_.at(id);
    if (const absl::Status failed = Admit(prompt, now); !failed.ok()) End(prompt, failed);
  }
  std::erase_if(plan.chunks, [this](const auto& chunk) {
    const auto it = prompts_.find(chunk.id);
    return it == prompts_.end() || it->second.phase != PromptPhase::kComputing;
  });
  return plan;
}

void PrefillLoop::DoSubmit(v1::PrefillRequest request, absl::Duration time_left, std::shared_ptr<PrefillSink> sink,
                           absl::Time now) {
  const PromptKey key{request.request_id(), request.spec().choice()};
  if (const absl::Status refused = CheckSubmit(request, key); !refused.ok()) {
    if (metrics_ != nullptr) metrics_->CountRejected(absl::StatusCodeToString(refused.code()));
    return sink->OnClose(refused);
  }
  if (const auto older = prompt_of_key_.find(key); older != prompt_of_key_.end()) {
    End(prompts_.at(older->second), absl::AbortedError("stale: a newer attempt has taken over"));
  }
  Prompt prompt;
  prompt.id = next_id_++;
  prompt.key = key;
  prompt.ids.assign(request.prompt_ids().begin(), request.prompt_ids().end());
  request.clear_prompt_ids();
  prompt.request = std::move(request);
  prompt.sink = std::move(sink);
  prompt.arrived = now;
  prompt.deadline = now + time_left;
  prompt.draw.emplace(prompt.request.spec(), prompt.ids);
  if (options_.traces != nullptr && !prompt.request.traceparent().empty()) {
    prompt.trace = options_.traces->Begin(key.request_id, "prefill worker", prompt.request.traceparent(), now);
    prompt.queue_span = prompt.trace->Begin(Phase::kQueue, now);
  }
  const LogScope about = About(prompt);
  spdlog::debug("request {} attempt {} accepted: {} prompt tokens", key.request_id, prompt.request.attempt(),
                prompt.ids.size());

  v1::PrefillEvent event;
  options_.incarnation.To(event.mutable_accepted()->mutable_worker());
  const auto queued = std::count_if(prompts_.begin(), prompts_.end(),
                                    [](const auto& entry) { return entry.second.phase == PromptPhase::kQueued; });
  event.mutable_accepted()->set_queue_position(static_cast<uint32_t>(queued));
  prompt.sink->OnEvent(std::move(event));
  prompt_of_key_[key] = prompt.id;
  prompts_.emplace(prompt.id, std::move(prompt));
  live_.store(static_cast<int>(prompts_.size()));
}

absl::Status PrefillLoop::CheckSubmit(const v1::PrefillRequest& request, const PromptKey& key) const {
  if (draining_) return absl::UnavailableError("the prefill worker is draining");
  if (options_.ready) RETURN_IF_ERROR(options_.ready());
  if (request.target().compat_hash() != options_.compat_hash) {
    return absl::FailedPreconditionError(absl::StrCat("incompatible_peer: target.compat_hash is ",
                                                      request.target().compat_hash(), ", this prefill worker's is ",
                                                      options_.compat_hash));
  }
  const CacheUsage usage = engine_.Usage();
  const int64_t pages = PagesFor(request.prompt_ids_size());
  if (pages > usage.pages_total) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the prompt needs ", pages, " pages, this prefill worker has ", usage.pages_total));
  }
  if (const auto live = prompt_of_key_.find(key); live != prompt_of_key_.end()) {
    const uint32_t attempt = prompts_.at(live->second).request.attempt();
    if (attempt == request.attempt()) return absl::AlreadyExistsError("this attempt of the request is here already");
    if (attempt > request.attempt()) return absl::AbortedError(absl::StrCat("stale: attempt ", attempt, " is here"));
  }
  size_t queued = 0;
  for (const auto& [id, prompt] : prompts_) queued += prompt.phase == PromptPhase::kQueued;
  if (queued >= options_.max_queue) {
    return absl::ResourceExhaustedError(absl::StrCat("the queue holds ", queued, " prompts, its limit"));
  }
  return absl::OkStatus();
}

// Gives a prompt its pages and its way to the decode worker.
absl::Status PrefillLoop::Admit(Prompt& prompt, absl::Time now) {
  RETURN_IF_ERROR(failpoints::Hit("p.before_prefill"));
  const v1::HandoffTarget& target = prompt.request.target();
  auto peer = transport_.Connect(target.transfer_address());
  if (!peer.ok()) return AtDecode(prompt, "connecting", peer.status());
  ASSIGN_OR_RETURN(prompt.sequence, engine_.NewSequence(static_cast<int64_t>(prompt.ids.size())));
  prompt.peer = *peer;
  kvtransfer::SenderOptions options;
  options.max_in_flight_bytes = options_.max_inflight_bytes;
  options.memory = CacheMemoryFunctions();
  prompt.sender = std::make_unique<kvtransfer::Sender>(
      transport_, prompt.peer, kvtransfer::LeaseKey{target.lease().id(), target.lease().epoch()}, options);
  prompt.phase = PromptPhase::kComputing;
  prompt.first_pass = now;
  if (prompt.trace != nullptr) {
    prompt.trace->End(prompt.queue_span, now);
    prompt.prefill_span = prompt.trace->Begin(Phase::kPrefill, now);
  }
  if (metrics_ != nullptr) metrics_->ObserveQueue(absl::ToDoubleSeconds(now - prompt.arrived));
  return absl::OkStatus();
}

// --- A pass ---

void PrefillLoop::Step(const sched::PrefillPlan& plan) {
  std::vector<Chunk> chunks;
  std::vector<Prompt*> members;
  int64_t rows = 0;
  for (const auto& [id, num_tokens] : plan.chunks) {
    Prompt& prompt = prompts_.at(id);
    Chunk chunk;
    chunk.sequence = *prompt.sequence;
    chunk.tokens = absl::MakeConstSpan(prompt.ids).subspan(prompt.tokens_done, num_tokens);
    const int64_t reached = prompt.tokens_done + num_tokens;
    if (reached == static_cast<int64_t>(prompt.ids.size())) chunk.sampling = &prompt.draw->Request();
    prompt.extents = engine_.Extents(*prompt.sequence, reached);
    members.push_back(&prompt);
    chunks.push_back(chunk);
    rows += num_tokens;
  }
  ForwardOptions options;
  options.on_layer_done = [&](int layer) {
    for (size_t i = 0; i < members.size(); ++i) {
      SendFinal(*members[i], members[i]->tokens_done + static_cast<int64_t>(chunks[i].tokens.size()), layer + 1);
    }
  };
  const absl::Time began = MonotonicNow();
  auto outputs = engine_.Forward(chunks, options);
  if (const absl::Status injected = failpoints::Hit("p.during_prefill"); outputs.ok() && !injected.ok()) {
    outputs = injected;
  }
  const absl::Time now = RecordStep(began, rows, outputs.ok());
  for (size_t i = 0; i < members.size(); ++i) {
    Prompt& prompt = *members[i];
    if (!outputs.ok()) {
      End(prompt, outputs.status());
      continue;
    }
    prompt.tokens_done += static_cast<int64_t>(chunks[i].tokens.size());
    SendFinal(prompt, prompt.tokens_done, engine_.config().num_hidden_layers);
    if (!prompt.transfer_error.ok()) {
      End(prompt, AtDecode(prompt, "sending", prompt.transfer_error));
    } else if (prompt.tokens_done == static_cast<int64_t>(prompt.ids.size())) {
      OnFirstToken(prompt, (*outputs)[i], now);
    }
  }
}

void PrefillLoop::OnFirstToken(Prompt& prompt, const ChunkOutput& output, absl::Time now) {
  if (!output.sampled.finite) {
    return End(prompt, absl::InternalError("numeric_error: logits of the first token are not finite"));
  }
  if (const absl::Status injected = failpoints::Hit("p.after_prefill"); !injected.ok()) return End(prompt, injected);
  prompt.finish = prompt.draw->Accept(output.sampled, prompt.first_token);
  prompt.token_at = now;
  if (prompt.trace != nullptr) {
    prompt.trace->End(prompt.stream_span, now);
    prompt.trace->End(prompt.prefill_span, now, absl::StatusCode::kOk,
                      {{"tokens", static_cast<int64_t>(prompt.ids.size())}});
  }
  if (metrics_ != nullptr && prompt.first_sent != absl::InfiniteFuture()) {
    metrics_->ObserveHandoffPhase("stream", absl::ToDoubleSeconds(now - prompt.first_sent));
  }
  v1::PrefillEvent event;
  v1::FirstToken& first = *event.mutable_first_token();
  *first.mutable_token() = prompt.first_token;
  first.set_queue_us(static_cast<uint64_t>(absl::ToInt64Microseconds(prompt.first_pass - prompt.arrived)));
  first.set_compute_us(static_cast<uint64_t>(absl::ToInt64Microseconds(now - prompt.first_pass)));
  first.set_finish(prompt.finish);
  prompt.sink->OnEvent(std::move(event));
  if (prompt.finish == v1::FINISH_REASON_UNSPECIFIED) return SendRest(prompt, now);
  End(prompt, absl::OkStatus());
}

void PrefillLoop::Publish() {
  const CacheUsage usage = engine_.Usage();
  Load load;
  uint64_t queued_tokens = 0;
  int streaming = 0, tail = 0, committing = 0;
  for (const auto& [id, prompt] : prompts_) {
    if (prompt.phase == PromptPhase::kEnding) continue;
    ++(prompt.phase == PromptPhase::kQueued ? load.queued : load.running);
    queued_tokens += prompt.ids.size() - static_cast<size_t>(prompt.tokens_done);
    switch (prompt.phase) {
      case PromptPhase::kQueued: {
        const bool pages = PagesFor(static_cast<int64_t>(prompt.ids.size())) > usage.pages_free;
        const WaitReason reason = usage.slots_free == 0 ? WaitReason::kSlots
                                  : pages               ? WaitReason::kPages
                                                        : WaitReason::kTurn;
        ++load.waiting[static_cast<size_t>(reason)];
        break;
      }
      case PromptPhase::kComputing:
        streaming += prompt.bytes_sent > 0;
        break;
      case PromptPhase::kSending:
        ++tail;
        break;
      case PromptPhase::kCommitting:
        ++committing;
        break;
      case PromptPhase::kEnding:
        break;
    }
  }
  load.waiting[static_cast<size_t>(WaitReason::kDecode)] = committing;
  load.work_pending = load.queued + load.running > 0;
  PublishLoad(load, usage, [&](v1::WorkerStatus& status) {
    status.set_queued(load.queued);
    status.set_queued_tokens(queued_tokens);
  });
  if (metrics_ != nullptr) metrics_->SetHandoffsInFlight(streaming, tail, committing);
}

}  // namespace millrace::prefill
