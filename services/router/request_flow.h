// SPDX-License-Identifier: Apache-2.0
// THE life of a request: from admission to the release of the last page, whatever fails on the way.
//
//   queued -> Reserve at D -> Prefill at P -> token 0 to the client -> [hand-off P to D] -> tokens from D -> end
//
// Everything about retries, deadlines, leases and cancellation of a generation is here and nowhere else. Which pair
// serves it is placement; how calls travel is worker_calls; text, stop strings and JSON are the fronts'.
//
// A Flow is what the client waits for; an Attempt is one try on one pair. They end separately: the client hears of its
// end at once, while the attempt lives on until both workers have confirmed that nothing of it is left (or are gone, or
// its lease has run out). Only then does its share return to the book that placement looks at. So a cancelled request
// cannot be replaced by one that does not fit yet.
//
// The router holds the only authoritative token log: index k is forwarded once, whoever sends it and however often.
// Until there is a first token, what goes wrong at a worker is tried again on another pair, within max_attempts and the
// queue's patience; after it a worker's death ends its requests with an error that says to try again.
//
// Thread: Start, Ready, Generation's methods: any. Everything else: the loop's.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "millrace/v1/types.pb.h"
#include "services/common/log_scope.h"
#include "services/common/request_trace.h"
#include "services/router/cluster_snapshot.h"
#include "services/router/event_loop.h"
#include "services/router/generation.h"
#include "services/router/router_metrics.h"
#include "services/router/worker_calls.h"
#include "services/router/worker_registry.h"

namespace millrace::router {

struct FlowOptions {
  IncarnationId router;
  std::shared_ptr<const PeerSecurity> security;  // of calls to workers; null: plain
  std::vector<int32_t> end_ids;                  // ids that end a sequence (unless ignore_eos)
  int max_requests = 256;                        // generations not yet ended, queued ones included
  milliseconds queue_timeout{10000};             // longest wait for a place
  milliseconds lease_ttl{10000};                 // renewed every third
  milliseconds reserve_timeout{3000};            // a decode worker that does not answer in this time is taken for gone
  milliseconds abort_timeout{500};               // of one Abort call; repeated every 200 ms until it is answered
  milliseconds default_deadline{600000};
  milliseconds max_deadline{3600000};
  int max_attempts = 3;  // of one generation, before its first token only
  int max_deaths = 2;    // of workers that one generation was at: it may be what kills them
};

class RequestFlow final : public GenerationService {
 public:
  // All three must outlive it. Takes over the registry's callbacks.
  RequestFlow(EventLoop& loop, WorkerRegistry& registry, FlowOptions options, FlowMetrics& metrics);
  // Ends what is left with UNAVAILABLE and waits (bounded) for its calls. Generations must be gone.
  ~RequestFlow() override;

  absl::StatusOr<std::unique_ptr<Generation>> Start(GenerationRequest request,
                                                    std::shared_ptr<GenerationSink> sink) override;
  absl::Status Ready() const override;

  // From now on Start refuses. Any thread.
  void StopAccepting() { accepting_.store(false); }
  // Generations not yet ended, and attempts not yet confirmed gone. Any thread.
  int64_t open_generations() const { return open_.load(); }
  int64_t open_attempts() const { return open_attempts_.load(); }
  // Ends every generation with this status. Any thread.
  void EndAll(absl::Status status);
  // The registry's view with what this router has assigned. Any thread; at most one sweep old.
  std::shared_ptr<const ClusterSnapshot> snapshot() const;

 private:
  using FlowId = uint64_t;
  using AttemptId = uint64_t;
  class Handle;

  // Our own deadline timer ends a request; the calls' deadlines are its safety net and fire later.
  static constexpr milliseconds kCallSlack{2000};

  struct Flow {
    FlowId id = 0;
    GenerationRequest request;
    std::shared_ptr<GenerationSink> sink;
    v1::GenerationSpec spec;
    std::string wire_id;  // what workers know it as: unique over the life of every router
    uint64_t token_hash = 0;
    TimePoint accepted, queued_until, deadline;
    EventLoop::TimerId deadline_timer = 0, queue_timer = 0;
    int attempts = 0;
    int deaths = 0;         // of workers it was at
    AttemptId attempt = 0;  // the current one, 0 while queued
    bool admitted = false;
    bool paused = false;
    int64_t next_index = 0;  // of the token to forward next
    int64_t cached_tokens = 0;
    absl::Status last_refusal;                     // why it is back in the queue
    uint64_t generation_span = 0, queue_span = 0;  // of its trace
  };

  enum class Leg {
    kNone,      // nothing at the worker
    kCalling,   // decode: Reserve is out
    kOpen,      // decode: leased; prefill: its stream is open
    kAborting,  // waiting for the answer to an abort
    kClosed,    // confirmed: nothing is left there
  };

  struct Attempt {
    AttemptId id = 0;
    FlowId flow = 0;
    std::string wire_id;
    uint32_t number = 0;
    uint32_t choice = 0;
    TimePoint started;
    std::shared_ptr<WorkerPeer> prefill, decode;
    int64_t prompt_tokens = 0, pages = 0;  // in the book
    bool prompt_counted = false;

    Leg prefill_leg = Leg::kNone;
    std::shared_ptr<StreamCall<v1::PrefillEvent>> prefill_stream;
    bool committed = false;         // the decode worker has verified the state
    bool ended_at_prefill = false;  // token 0 was the last; the prefill worker aborts the lease

    Leg decode_leg = Leg::kNone;
    v1::LeaseRef lease;
    std::shared_ptr<StreamCall<v1::DecodeEvent>> decode_stream;
    bool decode_ended = false;  // the end event was seen
    EventLoop::TimerId renew_timer = 0;

    bool closing = false;  // no flow waits for it any more
    EventLoop::TimerId close_timer = 0, abort_prefill_timer = 0, abort_decode_timer = 0;
    std::shared_ptr<RequestTrace> trace;  // the flow's; may be null
    uint64_t reserve_span = 0, prefill_span = 0, handoff_span = 0, decode_span = 0;
    TimePoint give_up;  // when unanswered aborts are no longer repeated: the lease has run out by then
  };

  // The steps, in order of a request's life.
  void Begin(std::unique_ptr<Flow> flow, TimePoint now);
  void PlaceQueued(TimePoint now);
  void StartAttempt(Flow& flow, const WorkerView& prefill, const WorkerView& decode, TimePoint now);
  void OnReserved(AttemptId id, const absl::Status& status, const v1::ReserveResponse& response, TimePoint now);
  void StartPrefill(Flow& flow, Attempt& attempt, v1::PrefillRequest request, TimePoint now);
  void OnPrefillEvent(AttemptId id, const v1::PrefillEvent& event, TimePoint now);
  void OnFirstToken(Flow& flow, Attempt& attempt, const v1::FirstToken& first, TimePoint now);
  void OnPrefillDone(AttemptId id, const absl::Status& status, TimePoint now);
  void StartDecode(Flow& flow, Attempt& attempt, TimePoint now);
  void OnDecodeEvent(AttemptId id, const v1::DecodeEvent& event, TimePoint now);
  void OnDecodeDone(AttemptId id, const absl::Status& status, TimePoint now);
  bool Deliver(Flow& flow, const v1::Token& token, TimePoint now);  // false: the flow has ended over it

  // Ends of flows. `flow` is gone afterwards.
  void Finish(Flow& flow, v1::FinishReason reason, TimePoint now);
  void Fail(Flow& flow, absl::Status status, TimePoint now);
  void Requeue(Flow& flow, const absl::Status& why, TimePoint now);
  bool MayTryAgain(const Flow& flow, const absl::Status& why) const;
  void Forget(Flow& flow);

  // Ends of attempts.
  void Close(Attempt& attempt, TimePoint now);
  void AbortLegs(AttemptId id, TimePoint now);
  void AbortPrefill(AttemptId id, TimePoint now);
  void AbortDecode(AttemptId id, TimePoint now);
  void ReleaseLease(Attempt& attempt);
  void ClosePrefillLeg(Attempt& attempt);
  void CloseDecodeLeg(Attempt& attempt);
  void EraseIfClosed(AttemptId id, TimePoint now);
  void CancelTimers(Attempt& attempt);

  void ScheduleRenew(Attempt& attempt, milliseconds granted, TimePoint now);
  void Renew(AttemptId id, TimePoint now);

  void OnWorkerGone(const WorkerView& worker, const std::string& why, TimePoint now);
  void EndAttemptsAt(const IncarnationId& gone, const std::string& why, bool died, TimePoint now);
  void Sweep(TimePoint now);
  void Publish(TimePoint now);
  ClusterSnapshot BookedSnapshot() const;
  std::shared_ptr<WorkerPeer> Peer(const WorkerView& view);

  // Phases of the request's trace; nothing without one. `worker`: who does it, if not the router.
  static uint64_t BeginPhase(const Flow& flow, Phase phase, TimePoint now, const std::string& worker = "");
  static void EndPhases(Flow& flow, absl::StatusCode code, TimePoint now);          // all that are open
  static void EndPhasesOf(Attempt& attempt, absl::StatusCode code, TimePoint now);  // of one that failed
  static std::string Traceparent(const Attempt& attempt, uint64_t span);            // for a worker; empty without one
  static LogScope About(const Attempt& attempt);

  Flow* FindFlow(FlowId id);
  Attempt* FindAttempt(AttemptId id);
  void Cancel(FlowId id);
  void SetPaused(FlowId id, bool paused);

  EventLoop& loop_;
  WorkerRegistry& registry_;
  const FlowOptions options_;
  FlowMetrics& metrics_;
  CallCount calls_;
  std::atomic<uint64_t> next_flow_{1};
  std::atomic<int64_t> open_{0}, open_attempts_{0};
  std::atomic<bool> accepting_{true};

  mutable absl::Mutex published_mutex_;
  std::shared_ptr<const ClusterSnapshot> published_ ABSL_GUARDED_BY(published_mutex_);

  // Loop thread only.
  AttemptId next_attempt_ = 1;
  std::map<FlowId, std::unique_ptr<Flow>> flows_;
  std::deque<FlowId> queue_;  // bounded by max_requests
  bool placing_ = false;
  bool queue_waits_for_workers_ = false;  // what held up the head of the queue when it was last looked at
  std::map<AttemptId, std::unique_ptr<Attempt>> attempts_;
  absl::flat_hash_map<IncarnationId, std::shared_ptr<WorkerPeer>> peers_;
  absl::flat_hash_map<IncarnationId, Assigned> book_;
  absl::flat_hash_map<IncarnationId, TimePoint> saturated_;  // until heard after this
  struct Left {  // has drained and is gone; its streams may not have said their last word here yet
    std::string why;
    TimePoint until;
  };
  absl::flat_hash_map<IncarnationId, Left> left_;
  EventLoop::TimerId sweep_timer_ = 0;
};

}  // namespace millrace::router
