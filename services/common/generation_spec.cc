// SPDX-License-Identifier: Apache-2.0
// See generation_spec.h.
#include "services/common/generation_spec.h"

#include <xxhash.h>

#include <algorithm>
#include <cmath>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/cache/cache_layout.h"
#include "engine/status.h"

namespace millrace {
namespace {

constexpr int64_t kMaxDeadlineMs = 3600 * 1000;
constexpr uint32_t kMaxChoice = 127;
constexpr int kMaxLogitBias = 1024;
constexpr int kMaxEndIds = 64;

absl::Status Bad(absl::string_view field, absl::string_view found, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": found ", found, ", allowed ", allowed));
}

absl::Status InRange(absl::string_view field, float value, float low, float high) {
  // Written so that NaN fails.
  if (value >= low && value <= high) return absl::OkStatus();
  return Bad(field, absl::StrCat(value), absl::StrCat(low, " to ", high));
}

}  // namespace

absl::Status CheckRequestId(std::string_view request_id) {
  const bool printable = std::all_of(request_id.begin(), request_id.end(), [](char c) { return c > 0x20 && c < 0x7f; });
  if (request_id.empty() || request_id.size() > 128 || !printable) {
    return Bad("request_id", absl::StrCat(request_id.size(), " bytes"), "1 to 128 printable ASCII characters");
  }
  return absl::OkStatus();
}

absl::Status CheckAttempt(uint32_t attempt) {
  return attempt >= 1 ? absl::OkStatus() : Bad("attempt", "0", "1 and more");
}

absl::Status CheckIncarnation(std::string_view field, const v1::Incarnation& incarnation) {
  if (!IncarnationId::From(incarnation).empty()) return absl::OkStatus();
  return Bad(absl::string_view(field.data(), field.size()), "nothing", "128 random bits");
}

absl::Status CheckSpec(const v1::GenerationSpec& spec, const RequestLimits& limits) {
  if (!spec.has_sampling()) return Bad("spec.sampling", "nothing", "sampling parameters");
  const v1::SamplingParams& s = spec.sampling();
  RETURN_IF_ERROR(InRange("spec.sampling.temperature", s.temperature(), 0, 2));
  RETURN_IF_ERROR(InRange("spec.sampling.top_p", s.top_p(), 0, 1));
  RETURN_IF_ERROR(InRange("spec.sampling.min_p", s.min_p(), 0, 1));
  RETURN_IF_ERROR(InRange("spec.sampling.presence_penalty", s.presence_penalty(), -2, 2));
  RETURN_IF_ERROR(InRange("spec.sampling.frequency_penalty", s.frequency_penalty(), -2, 2));
  RETURN_IF_ERROR(InRange("spec.sampling.repetition_penalty", s.repetition_penalty(), 0, 2));
  if (s.logit_bias_size() > kMaxLogitBias) {
    return Bad("spec.sampling.logit_bias", absl::StrCat(s.logit_bias_size(), " entries"), absl::StrCat(kMaxLogitBias));
  }
  int64_t previous = -1;
  for (int i = 0; i < s.logit_bias_size(); ++i) {
    const v1::LogitBias& bias = s.logit_bias(i);
    const std::string field = absl::StrCat("spec.sampling.logit_bias[", i, "]");
    if (bias.id() >= limits.vocab_size || bias.id() <= previous) {
      return Bad(field + ".id", absl::StrCat(bias.id()), absl::StrCat("ascending ids below ", limits.vocab_size));
    }
    previous = bias.id();
    RETURN_IF_ERROR(InRange(field + ".bias", bias.bias(), -100, 100));
  }
  if (spec.choice() > kMaxChoice) return Bad("spec.choice", absl::StrCat(spec.choice()), "0 to 127");
  if (spec.max_tokens() < 1) return Bad("spec.max_tokens", "0", "1 and more");
  if (spec.prior_tokens() >= spec.max_tokens()) {
    return Bad("spec.prior_tokens", absl::StrCat(spec.prior_tokens()), "less than max_tokens");
  }
  if (spec.end_ids_size() > kMaxEndIds) return Bad("spec.end_ids", absl::StrCat(spec.end_ids_size()), "at most 64 ids");
  for (int i = 0; i < spec.end_ids_size(); ++i) {
    if (spec.end_ids(i) >= limits.vocab_size) {
      return Bad(absl::StrCat("spec.end_ids[", i, "]"), absl::StrCat(spec.end_ids(i)),
                 absl::StrCat("below ", limits.vocab_size));
    }
  }
  if (spec.num_logprobs() < -1 || spec.num_logprobs() > 20) {
    return Bad("spec.num_logprobs", absl::StrCat(spec.num_logprobs()), "-1 to 20");
  }
  return absl::OkStatus();
}

absl::Status CheckPromptLength(int64_t prompt_tokens, const v1::GenerationSpec& spec, const RequestLimits& limits) {
  if (prompt_tokens < 1) return Bad("prompt_tokens", "0", "1 and more");
  if (spec.prior_tokens() >= prompt_tokens) {
    return Bad("spec.prior_tokens", absl::StrCat(spec.prior_tokens()), "less than the ids sent");
  }
  // Subtracting first keeps both sides far from overflow, whatever the fields say.
  const int64_t output_left = int64_t{spec.max_tokens()} - spec.prior_tokens();
  if (prompt_tokens > limits.max_context_tokens || output_left > limits.max_context_tokens - prompt_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("spec.max_tokens: ", prompt_tokens, " prompt tokens and ",
                                                   output_left, " more do not fit the context of ",
                                                   limits.max_context_tokens));
  }
  return absl::OkStatus();
}

absl::Status CheckPrompt(absl::Span<const int32_t> prompt_ids, const v1::GenerationSpec& spec,
                         const RequestLimits& limits) {
  if (prompt_ids.empty()) return Bad("prompt_ids", "nothing", "at least one id");
  RETURN_IF_ERROR(CheckPromptLength(static_cast<int64_t>(prompt_ids.size()), spec, limits));
  for (size_t i = 0; i < prompt_ids.size(); ++i) {
    if (prompt_ids[i] < 0 || prompt_ids[i] >= limits.vocab_size) {
      return Bad(absl::StrCat("prompt_ids[", i, "]"), absl::StrCat(prompt_ids[i]),
                 absl::StrCat("0 to ", limits.vocab_size - 1));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<absl::Duration> CheckDeadline(uint64_t deadline_ms) {
  if (deadline_ms == 0) return absl::DeadlineExceededError("deadline_ms: nothing is left of the request's time");
  return absl::Milliseconds(std::min<uint64_t>(deadline_ms, kMaxDeadlineMs));
}

absl::Status CheckLease(const v1::LeaseRef& lease, const IncarnationId& self) {
  if (lease.id() == 0) return Bad("lease.id", "0", "the id of a lease");
  if (lease.epoch() == 0) return Bad("lease.epoch", "0", "the epoch of a lease");
  RETURN_IF_ERROR(CheckIncarnation("lease.owner", lease.owner()));
  if (!self.empty() && IncarnationId::From(lease.owner()) != self) {
    return absl::AbortedError("stale epoch: the lease belongs to another incarnation of this worker");
  }
  return absl::OkStatus();
}

int64_t CacheTokens(int64_t prompt_tokens, const v1::GenerationSpec& spec) {
  return prompt_tokens + int64_t{spec.max_tokens()} - spec.prior_tokens() - 1;
}

int64_t PagesFor(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

uint64_t TokenHash(absl::Span<const int32_t> ids) { return XXH3_64bits(ids.data(), ids.size() * sizeof(int32_t)); }

SamplingParams ToSamplingParams(const v1::GenerationSpec& spec) {
  const v1::SamplingParams& s = spec.sampling();
  SamplingParams params;
  params.temperature = s.temperature();
  params.top_p = s.top_p() == 0 ? 1.0f : s.top_p();
  params.top_k = static_cast<int>(std::min<uint32_t>(s.top_k(), 1u << 30));
  params.min_p = s.min_p();
  params.presence_penalty = s.presence_penalty();
  params.frequency_penalty = s.frequency_penalty();
  params.repetition_penalty = s.repetition_penalty() == 0 ? 1.0f : s.repetition_penalty();
  params.seed = s.seed();
  for (const v1::LogitBias& bias : s.logit_bias()) {
    params.logit_bias.emplace_back(static_cast<int32_t>(bias.id()), bias.bias());
  }
  params.top_logprobs = std::max(0, spec.num_logprobs());
  return params;
}

TokenDraw::TokenDraw(const v1::GenerationSpec& spec, std::vector<int32_t> ids)
    : spec_(spec), prompt_(std::move(ids)), next_index_(spec.prior_tokens()) {
  const size_t prior = std::min<size_t>(spec.prior_tokens(), prompt_.size());
  output_.assign(prompt_.end() - prior, prompt_.end());
  prompt_.resize(prompt_.size() - prior);
  request_.params = ToSamplingParams(spec);
  request_.choice = spec.choice();
  keeps_output_ = request_.params.presence_penalty != 0 || request_.params.frequency_penalty != 0 ||
                  request_.params.repetition_penalty != 1.0f;
  output_.reserve(keeps_output_ ? spec.max_tokens() : output_.size());
}

const SamplingRequest& TokenDraw::Request() {
  request_.params.banned.clear();
  if (next_index_ < spec_.min_tokens()) request_.params.banned.assign(spec_.end_ids().begin(), spec_.end_ids().end());
  request_.token_index = next_index_;
  request_.prompt = prompt_;
  request_.output = output_;
  return request_;
}

v1::FinishReason TokenDraw::Accept(const SampledToken& sampled, v1::Token& token) {
  token.set_index(next_index_);
  token.set_id(static_cast<uint32_t>(sampled.id));
  if (spec_.num_logprobs() >= 0) {
    token.set_logprob(sampled.logprob);
    for (const auto& [id, logprob] : sampled.top) {
      v1::TokenLogprob* top = token.add_top_logprobs();
      top->set_id(static_cast<uint32_t>(id));
      top->set_logprob(logprob);
    }
  }
  AcceptForeign(token);
  if (std::find(spec_.end_ids().begin(), spec_.end_ids().end(), token.id()) != spec_.end_ids().end()) {
    return v1::FINISH_REASON_STOP;
  }
  return next_index_ >= spec_.max_tokens() ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_UNSPECIFIED;
}

void TokenDraw::AcceptForeign(const v1::Token& token) {
  last_id_ = static_cast<int32_t>(token.id());
  if (keeps_output_) output_.push_back(last_id_);
  ++next_index_;
}

}  // namespace millrace
