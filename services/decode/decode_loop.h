// SPDX-License-Identifier: Apache-2.0
// The engine thread of a decode worker: leases in, tokens out.
//
// A round plans and makes a step (services/common/engine_loop). This thread alone touches the engine and the lease
// table. Handlers on gRPC's threads post commands and are answered through callbacks on it.
//
// Promises: a sequence decodes only after its manifest was verified; a page goes back only after its fence; a lease
// that is neither renewed nor finished ends; an ended sequence says so to its stream exactly once.
//
// Thread: public methods from any thread; callbacks on the engine thread, and they must not block.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/engine.h"
#include "engine/sched/decode_planner.h"
#include "kvtransfer/receiver.h"
#include "services/common/engine_loop.h"
#include "services/common/worker_metrics.h"
#include "services/decode/lease.h"

namespace millrace::decode {

struct DecodeLoopOptions {
  int max_batch = 32;
  size_t max_commands = 4096;  // commands that wait for the engine thread; more are refused
  IncarnationId incarnation;
  std::string compat_hash;       // what Reserve must say
  std::string transfer_address;  // what Reserve answers
  // A commit may overtake the last blocks, which come another way: how long after the last arrival they are waited for.
  absl::Duration arrival_grace = absl::Milliseconds(200);
  // Called on the engine thread before a reservation: OK, or why no request can be taken (expert pool not complete).
  std::function<absl::Status()> ready;
  TraceLog* traces = nullptr;  // must outlive the loop; null: nothing is recorded
};

class DecodeLoop final : public EngineLoop {
 public:
  // Everything must outlive the loop. `metrics` may be null.
  DecodeLoop(Engine& engine, kvtransfer::Receiver& receiver, DecodeLoopOptions options, WorkerMetrics* metrics);
  ~DecodeLoop() override;  // Stop

  void Reserve(v1::ReserveRequest request, absl::AnyInvocable<void(absl::StatusOr<v1::ReserveResponse>)> done);
  void Renew(v1::RenewRequest request, absl::AnyInvocable<void(absl::StatusOr<v1::RenewResponse>)> done);
  void Commit(v1::CommitRequest request, CommitDone done);
  void Abort(v1::AbortLeaseRequest request, AbortDone done);  // answered when the memory is back
  void Release(v1::LeaseRef lease, absl::AnyInvocable<void(absl::Status)> done);
  // Refusals go to the sink. `traceparent`: of the router's call, what the tokens' span belongs to.
  void Attach(v1::LeaseRef lease, std::shared_ptr<TokenSink> sink, std::string traceparent = "");
  void Detach(uint64_t lease_id, const TokenSink* sink);  // its stream is gone: the lease ends

  // Ends every lease of routers other than `router`; an empty one: of all routers.
  void KeepOnlyRouter(IncarnationId router, std::string why);
  void Wake() {
    commands_->Post([](absl::Time) {});
  }

 private:
  template <typename Done>
  void Enqueue(Done done, absl::AnyInvocable<void(absl::Time, Done)> run);

  absl::Duration Round(absl::Time now) override;
  void EndAll(const absl::Status& why) override;
  void Publish() override;
  void Step(const std::vector<uint64_t>& batch);
  void DeliverToken(Lease& lease, const ChunkOutput& output);

  // decode_leases.cc
  absl::StatusOr<v1::ReserveResponse> DoReserve(const v1::ReserveRequest& request, absl::Time now);
  absl::Status CheckAttemptIsNew(const v1::ReserveRequest& request);
  void DoCommit(const v1::CommitRequest& request, CommitDone done, absl::Time now);
  void PollCommit(Lease& lease, absl::Time now);
  absl::Status CheckHandoffState(const Lease& lease, const v1::HandoffState& state) const;
  absl::StatusOr<v1::CommitResponse> FinishCommit(Lease& lease, const PendingCommit& commit);
  // Tells the stream (if any) and begins the fence; the lease is gone when that is done.
  void End(Lease& lease, const absl::Status& why);
  void Gone(uint64_t lease_id);
  // The live lease that `ref` names. NotFound, or Aborted for another epoch.
  absl::StatusOr<Lease*> Find(const v1::LeaseRef& ref);

  kvtransfer::Receiver& receiver_;
  const DecodeLoopOptions options_;

  // Engine thread only.
  std::map<uint64_t, Lease> leases_;
  using RequestKey = std::pair<std::string, uint32_t>;  // request id, choice
  absl::flat_hash_map<RequestKey, uint64_t> lease_of_request_;
  // Newest attempt of requests that ended here; one that is not newer is stale. Bounded: the oldest are forgotten.
  absl::flat_hash_map<RequestKey, uint32_t> ended_attempts_;
  std::deque<RequestKey> ended_order_;
  uint64_t next_lease_ = 0;
  uint64_t step_count_ = 0;
};

}  // namespace millrace::decode
