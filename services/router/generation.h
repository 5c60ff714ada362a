// SPDX-License-Identifier: Apache-2.0
// The boundary between the fronts (HTTP, gRPC) and the life of a request over the cluster.
//
// A front parses, validates, encodes and turns text into ids; what lies behind GenerationService turns ids into more
// ids: placement, hand-off, decode, repair. Neither side knows the other's half: there is no text, no stop string and
// no JSON here, and no worker, lease or page either. One Generation is one choice of one prompt; a front that was
// asked for n choices starts n of them with the same prompt and choice 0 .. n-1.
//
// Life of a generation, as its sink sees it (calls are sequential, never concurrent for one sink):
//
//   Start -> [OnAdmitted] -> OnToken(index 0) -> OnToken(1) ... -> OnFinish | OnError      exactly one of the last two
//
// Thread: every method of GenerationService and Generation may be called from any thread and returns without waiting
// for the network. Sink calls come from any thread, may start before Start() has returned, and must not block: a front
// posts them to its own thread. Implementations never hold a lock of theirs that Cancel() or the destructor takes while
// they call a sink.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/common/request_trace.h"

namespace millrace::router {

// How the next token is drawn. Already validated by the front: ranges below hold. Defaults are the model card's.
struct SamplingParams {
  double temperature = 1.0;                           // [0, 2]; 0 is greedy (argmax, ties to the lower id)
  double top_p = 1.0;                                 // (0, 1]
  int32_t top_k = 0;                                  // 0 = off, else >= 1
  double min_p = 0.0;                                 // [0, 1]
  double presence_penalty = 0.0;                      // [-2, 2]
  double frequency_penalty = 0.0;                     // [-2, 2]
  double repetition_penalty = 1.0;                    // (0, 2]
  uint64_t seed = 0;                                  // always set: the client's, or one the front drew and reports
  std::vector<std::pair<int32_t, float>> logit_bias;  // ids ascending and unique, bias in [-100, 100]
};

struct GenerationRequest {
  std::string request_id;           // unique in this router and for this request; all its choices share it
  int32_t choice = 0;               // 0 .. n-1; with the seed and the token index the counter of the random numbers
  std::vector<int32_t> prompt_ids;  // at least one, each in [0, vocab_size)
  SamplingParams sampling;
  int32_t max_tokens = 0;     // >= 1; prompt + max_tokens fits in the context
  int32_t min_tokens = 0;     // the end-of-sequence token is not drawn before this many
  bool ignore_eos = false;    // never end at the end-of-sequence token
  int32_t num_logprobs = -1;  // -1: none wanted; 0: the drawn token's; k in 1..20: also the k most likely
  std::string cache_salt;     // prompts share cached pages only under equal salts; empty is a salt too
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
  std::shared_ptr<RequestTrace> trace;  // of the whole request; null: its time is not recorded
};

// Log-probabilities are of the distribution after penalties and bias, before temperature and truncation
// (engine/ops/sampler.h), in nats.
struct TokenLogprob {
  int32_t id = 0;
  float logprob = 0;
};

struct GeneratedToken {
  int64_t index = 0;  // 0, 1, 2, ... without gaps or repeats, whatever restarted behind it
  int32_t id = 0;
  float logprob = 0;                       // meaningful if num_logprobs >= 0
  std::vector<TokenLogprob> top_logprobs;  // num_logprobs entries, most likely first, ties to the lower id
};

enum class GenerationEnd {
  kEndOfSequence,  // the last OnToken carried the model's end-of-sequence token
  kLength,         // max_tokens were drawn
};

// Known when the generation has its place, and not only at its end: a stop string ends a generation from the front's
// side, by Cancel(), and its reply still reports usage.
struct GenerationAdmission {
  int64_t cached_prompt_tokens = 0;  // of the prompt, those that need not be computed again
};

// What this choice cost. Tokens, not bytes.
struct GenerationUsage {
  int64_t prompt_tokens = 0;
  int64_t cached_prompt_tokens = 0;  // of prompt_tokens, those not computed again
  int64_t completion_tokens = 0;     // end-of-sequence included
};

class GenerationSink {
 public:
  virtual ~GenerationSink() = default;
  // The request has its place on the cluster (a decode lease) and its prefill is about to start. At most once, before
  // the first token; may be skipped when the generation fails first.
  virtual void OnAdmitted(GenerationAdmission admission) = 0;
  virtual void OnToken(GeneratedToken token) = 0;
  virtual void OnFinish(GenerationEnd end, GenerationUsage usage) = 0;
  // `status` may carry an ApiError (services/common/error.h) with a code, and when to retry; without one the front
  // derives both from the status code. After tokens were delivered an error means that no further token will come, not
  // that those delivered were wrong. Also the answer to Cancel() (kCancelled), unless the end overtook it.
  virtual void OnError(absl::Status status) = 0;
};

// A running generation. Destroying it cancels it. Once it is destroyed the sink may still be called by a call that had
// already begun, hence the shared_ptr in Start.
class Generation {
 public:
  virtual ~Generation() = default;
  // Idempotent. Both legs are told; the sink gets OnError(kCancelled) unless it has had its end already.
  virtual void Cancel() = 0;
  // Back-pressure of a client that reads slowly: while paused the sequence keeps its pages and draws no new tokens
  // (those already on their way still arrive). Advisory, idempotent; an implementation may ignore it, since fronts
  // bound their own memory and end the request when it does not help.
  virtual void SetPaused(bool /*paused*/) {}
};

class GenerationService {
 public:
  virtual ~GenerationService() = default;
  // Refusals known at once (no capacity, queue full, deadline unreachable) come back as the status, and the sink is
  // then never called. Everything later reaches the sink.
  virtual absl::StatusOr<std::unique_ptr<Generation>> Start(GenerationRequest request,
                                                            std::shared_ptr<GenerationSink> sink) = 0;
  // OK when a request sent now would be given a place; else why not, for /readyz. Cheap: called at every probe.
  virtual absl::Status Ready() const = 0;
};

}  // namespace millrace::router
