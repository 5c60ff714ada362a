// SPDX-License-Identifier: Apache-2.0
// What a worker checks of a request before it believes it, and what it makes of it for the engine.
//
// Every check answers InvalidArgument with the field's name first. Requests come from our own router, and are checked
// all the same: a worker that trusts a field has given its memory away. Thread: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/ops/sampler.h"
#include "millrace/v1/types.pb.h"
#include "services/common/incarnation.h"

namespace millrace {

inline constexpr uint32_t kWireVersion = 1;

// Limits of one worker against which requests are checked.
struct RequestLimits {
  int64_t vocab_size = 0;
  int64_t max_context_tokens = 0;
};

absl::Status CheckRequestId(std::string_view request_id);
absl::Status CheckAttempt(uint32_t attempt);
absl::Status CheckIncarnation(std::string_view field, const v1::Incarnation& incarnation);
absl::Status CheckSpec(const v1::GenerationSpec& spec, const RequestLimits& limits);
// At least one, each in [0, vocab); with max_tokens they fit the context.
absl::Status CheckPrompt(absl::Span<const int32_t> prompt_ids, const v1::GenerationSpec& spec,
                         const RequestLimits& limits);
absl::Status CheckPromptLength(int64_t prompt_tokens, const v1::GenerationSpec& spec, const RequestLimits& limits);
// Zero is DeadlineExceeded; more than an hour is cut to it.
absl::StatusOr<absl::Duration> CheckDeadline(uint64_t deadline_ms);
// Ids, epoch and owner set, and the owner is `self` (Aborted: another incarnation's lease).
absl::Status CheckLease(const v1::LeaseRef& lease, const IncarnationId& self);

// Tokens of cache that a request can come to need: everything but the last token drawn.
int64_t CacheTokens(int64_t prompt_tokens, const v1::GenerationSpec& spec);
int64_t PagesFor(int64_t tokens);

// XXH3-64 of the ids as little-endian int32.
uint64_t TokenHash(absl::Span<const int32_t> ids);

// The engine's form of the knobs. `banned` is left to MakeSampling, because it depends on the token's index.
SamplingParams ToSamplingParams(const v1::GenerationSpec& spec);

// One sequence's drawing: knows its spec, its ids so far and the index of the next token.
class TokenDraw {
 public:
  // `ids`: what prefill got, prior output included; may be empty where penalties do not need it.
  TokenDraw(const v1::GenerationSpec& spec, std::vector<int32_t> ids);

  uint64_t next_index() const { return next_index_; }
  // For the next token. Borrowed: valid until the next call of a non-const method.
  const SamplingRequest& Request();
  // Takes the token drawn; what to tell the router. Unspecified while the sequence goes on.
  v1::FinishReason Accept(const SampledToken& sampled, v1::Token& token);
  // Takes a token that another worker drew.
  void AcceptForeign(const v1::Token& token);
  int32_t last_id() const { return last_id_; }
  uint64_t total_tokens() const { return next_index_; }

 private:
  v1::GenerationSpec spec_;
  std::vector<int32_t> prompt_;
  std::vector<int32_t> output_;
  uint64_t next_index_ = 0;
  int32_t last_id_ = -1;
  bool keeps_output_ = false;
  SamplingRequest request_;
};

}  // namespace millrace
