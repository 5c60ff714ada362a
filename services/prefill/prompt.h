// SPDX-License-Identifier: Apache-2.0
// One request of a prefill worker: its ids, what is computed, what was sent, and how it ends.
//
//   queued -> computing -> sending -> committing -> (repair: sending -> committing) -> ending -> (gone)
//
// `ending` waits for two things: the wire has let go of the sequence's memory, and the decode worker has answered the
// abort (or was given long enough to). The first guards our pages, the second the other side's.
// Thread: the prefill loop's.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "kvtransfer/sender.h"
#include "millrace/v1/prefill.pb.h"
#include "services/common/generation_spec.h"
#include "services/common/log_scope.h"
#include "services/common/request_trace.h"

namespace millrace::prefill {

// Where the events of one request go. Called on the engine thread; must not block.
class PrefillSink {
 public:
  virtual ~PrefillSink() = default;
  virtual void OnEvent(v1::PrefillEvent event) = 0;
  // The last call. OK after committed or ended, else why it failed.
  virtual void OnClose(absl::Status status) = 0;
};

// A request and a choice; attempts of it follow each other.
struct PromptKey {
  std::string request_id;
  uint32_t choice = 0;
  friend bool operator==(const PromptKey&, const PromptKey&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const PromptKey& key) {
    return H::combine(std::move(h), key.request_id, key.choice);
  }
};

enum class PromptPhase { kQueued, kComputing, kSending, kCommitting, kEnding };

struct Prompt {
  uint64_t id = 0;  // order of arrival
  PromptKey key;
  v1::PrefillRequest request;
  std::vector<int32_t> ids;
  std::shared_ptr<PrefillSink> sink;  // shared: a gRPC reactor outlives its last call; null once it was closed
  PromptPhase phase = PromptPhase::kQueued;
  absl::Time arrived, deadline;
  absl::Time first_pass, token_at, transfer_deadline;
  absl::Time first_sent = absl::InfiniteFuture();  // of the first extent
  absl::Time phase_began;                          // of the tail or the commit under way

  std::optional<SequenceId> sequence;
  std::optional<TokenDraw> draw;
  int64_t tokens_done = 0;
  v1::Token first_token;
  v1::FinishReason finish = v1::FINISH_REASON_UNSPECIFIED;  // set if the first token was the last

  kvtransfer::PeerId peer;
  std::unique_ptr<kvtransfer::Sender> sender;
  std::vector<CacheExtent> extents;  // for the length reached by the pass under way
  std::vector<bool> sent;            // by extent index
  absl::Status transfer_error;
  uint64_t bytes_sent = 0;
  uint32_t resent = 0;
  int repairs = 0;
  int commit_tries = 0;
  bool committed = false;
  std::vector<std::vector<uint8_t>> altered;  // copies that seeded bugs send instead of the truth

  bool wire_released = false;
  bool lease_settled = false;
  int abort_tries = 0;
  std::vector<absl::AnyInvocable<void(bool was_live)>> on_gone;
  std::shared_ptr<RequestTrace> trace;  // null: the request is not traced
  uint64_t queue_span = 0, prefill_span = 0, stream_span = 0, handoff_span = 0, phase_span = 0;
};

// For the log: whose lines follow.
inline LogScope About(const Prompt& prompt) {
  return LogScope(ClientRequestId(prompt.key.request_id), prompt.trace == nullptr ? "" : prompt.trace->trace_id());
}

}  // namespace millrace::prefill
