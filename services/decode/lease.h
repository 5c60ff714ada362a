// SPDX-License-Identifier: Apache-2.0
// One lease of a decode worker: what was promised, what has arrived, what is being decoded.
//
//   receiving -> committed -> running -> ending -> (gone)          every arrow may also go straight to ending
//
// `ending` is the wait for the fence: the sequence's memory goes back only when no message can write it any more.
// Thread: the decode loop's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "kvtransfer/manifest.h"
#include "millrace/v1/decode.pb.h"
#include "millrace/v1/handoff.pb.h"
#include "services/common/generation_spec.h"
#include "services/common/incarnation.h"
#include "services/common/log_scope.h"
#include "services/common/request_trace.h"

namespace millrace::decode {

// Where the tokens of one sequence go. Called on the engine thread; must not block and must not call the loop's
// methods other than Wake.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  virtual void OnTokens(v1::DecodeTokens tokens) = 0;
  // The last call: exactly one of these two.
  virtual void OnEnd(v1::FinishReason reason, uint64_t total_tokens) = 0;
  virtual void OnError(absl::Status status) = 0;
  // The reader is behind: the sequence is left out of steps until this is false again.
  virtual bool Congested() const = 0;
};

using CommitDone = absl::AnyInvocable<void(absl::StatusOr<v1::CommitResponse>)>;
using AbortDone = absl::AnyInvocable<void(absl::StatusOr<v1::AbortLeaseResponse>)>;

struct PendingCommit {
  kvtransfer::Manifest manifest;
  v1::HandoffState state;
  absl::Time came;            // when the manifest did
  absl::Time give_up;         // then the extents still missing are asked for again
  uint64_t extents_seen = 0;  // arrivals push give_up back
  CommitDone done;
};

struct Lease {
  uint64_t id = 0;
  uint64_t epoch = 0;
  v1::LeasePhase phase = v1::LEASE_PHASE_RECEIVING;
  bool ending = false;
  std::string request_id;
  uint32_t attempt = 0;
  v1::GenerationSpec spec;
  int64_t prompt_tokens = 0;
  uint64_t token_hash = 0;
  IncarnationId prefill, router;
  absl::Time expires;   // unless renewed
  absl::Time deadline;  // the request's
  SequenceId sequence;
  std::optional<TokenDraw> draw;
  uint64_t last_step = 0;
  std::shared_ptr<TokenSink> sink;  // shared: a gRPC reactor outlives its last call
  std::optional<PendingCommit> commit;
  std::optional<uint64_t> committed_digest;  // of the manifest that was verified
  std::vector<AbortDone> on_gone;
  std::shared_ptr<RequestTrace> trace;  // null: the request is not traced
  uint64_t receive_span = 0, verify_span = 0, decode_span = 0;
  uint64_t decode_parent = 0;  // the router's span; 0 until its stream is here
};

// For messages: which lease, and whose.
inline std::string LeaseName(const Lease& lease) {
  return absl::StrFormat("lease %x (request %s, attempt %d)", lease.id, lease.request_id, lease.attempt);
}

// For the log: whose lines follow.
inline LogScope About(const Lease& lease) {
  return LogScope(ClientRequestId(lease.request_id), lease.trace == nullptr ? "" : lease.trace->trace_id());
}

// The time a caller gets for what it asks: [1 s, 60 s], 10 s if it does not say.
inline absl::Duration LeaseTtl(uint32_t ttl_ms) {
  return ttl_ms == 0 ? absl::Seconds(10) : absl::Milliseconds(std::clamp<uint32_t>(ttl_ms, 1000, 60000));
}

}  // namespace millrace::decode
