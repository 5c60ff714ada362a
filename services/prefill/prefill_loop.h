// SPDX-License-Identifier: Apache-2.0
// The engine thread of a prefill worker: prompts in, token 0 and a verified hand-off out.
//
// A round plans and makes a pass (services/common/engine_loop). Pages leave while later ones are computed; token 0 goes
// to the router the moment it is drawn; then the rest and the commit. The sequence is kept until the decode worker has
// answered, so that it can ask again for what did not arrive. What fails, expires or is cancelled aborts its lease and
// waits for the answer before it is forgotten.
//
// Thread: public methods from any thread; callbacks on the engine thread, and they must not block.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/engine.h"
#include "engine/sched/prefill_planner.h"
#include "kvtransfer/transport.h"
#include "services/common/engine_loop.h"
#include "services/common/incarnation.h"
#include "services/common/worker_metrics.h"
#include "services/prefill/handoff_client.h"
#include "services/prefill/prompt.h"

namespace millrace::prefill {

struct PrefillLoopOptions {
  size_t max_queue = 64;  // prompts that wait for pages or their first pass
  size_t max_commands = 1024;
  IncarnationId incarnation;
  std::string compat_hash;  // what the target must say
  uint64_t max_inflight_bytes = 64u << 20;
  absl::Duration transfer_timeout = absl::Seconds(2);  // plus bytes / 50 MB/s
  absl::Duration abort_timeout = absl::Milliseconds(500);
  int max_repairs = 3;                  // times the decode worker may ask again for damaged or missing extents
  std::function<absl::Status()> ready;  // as in DecodeLoopOptions
  TraceLog* traces = nullptr;           // as there
};

class PrefillLoop final : public EngineLoop {
 public:
  // Everything must outlive the loop. `metrics` may be null.
  PrefillLoop(Engine& engine, kvtransfer::Transport& transport, HandoffClient& decode_workers,
              PrefillLoopOptions options, WorkerMetrics* metrics);
  ~PrefillLoop() override;  // Stop

  // The request was checked (prefill_service). Refusals go to the sink.
  void Submit(v1::PrefillRequest request, absl::Duration time_left, std::shared_ptr<PrefillSink> sink);
  // Answered when the request's memory is back and its lease settled; false: unknown or ended.
  void Abort(v1::AbortPrefillRequest request, absl::AnyInvocable<void(bool was_live)> done);
  void Cancel(const PrefillSink* sink);  // its stream is gone
  void CancelAll(absl::Status why);      // the router is gone

 private:
  absl::Duration Round(absl::Time now) override;
  void EndAll(const absl::Status& why) override;
  void Publish() override;
  sched::PrefillPlan Plan(absl::Time now);  // ends what is late, admits what has room
  void DoSubmit(v1::PrefillRequest request, absl::Duration time_left, std::shared_ptr<PrefillSink> sink,
                absl::Time now);
  absl::Status CheckSubmit(const v1::PrefillRequest& request, const PromptKey& key) const;
  absl::Status Admit(Prompt& prompt, absl::Time now);

  void Step(const sched::PrefillPlan& plan);
  void OnFirstToken(Prompt& prompt, const ChunkOutput& output, absl::Time now);

  // prefill_handoff.cc: sending, committing, ending.
  void SendFinal(Prompt& prompt, int64_t tokens, int layers_done);  // what can no longer change
  void SendExtent(Prompt& prompt, const CacheExtent& extent);
  void SendRest(Prompt& prompt, absl::Time now);
  void FlushThenCommit(Prompt& prompt);
  void StartCommit(Prompt& prompt);
  absl::StatusOr<std::string> EncodeManifest(Prompt& prompt) const;
  // The tail or the commit: one at a time, measured and traced.
  void BeginPhase(Prompt& prompt, Phase phase, absl::Time now);
  void EndPhase(Prompt& prompt, Phase phase, absl::Time now, absl::StatusCode code = absl::StatusCode::kOk);
  void OnCommitAnswer(Prompt& prompt, absl::StatusOr<v1::CommitResponse> answer, absl::Time now);
  void End(Prompt& prompt, absl::Status why);  // closes the sink, lets go of wire and lease
  void SettleLease(Prompt& prompt, const std::string& reason);
  void LeaseSettled(Prompt& prompt, bool answered);
  void EraseIfGone(uint64_t prompt_id);
  absl::Status AtDecode(const Prompt& prompt, absl::string_view what, const absl::Status& status) const;

  kvtransfer::Transport& transport_;
  HandoffClient& decode_workers_;
  const PrefillLoopOptions options_;

  // Engine thread only.
  std::map<uint64_t, Prompt> prompts_;  // by arrival
  absl::flat_hash_map<PromptKey, uint64_t> prompt_of_key_;
  uint64_t next_id_ = 1;
};

}  // namespace millrace::prefill
