// SPDX-License-Identifier: Apache-2.0
// Field by field, and the table of errors.
#include "services/router/generation_wire.h"

#include <algorithm>
#include <bit>
#include <string>

#include "services/common/error.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace millrace::router {

absl::Status Retryable(const std::string& code, const std::string& message) {
  return MakeError(absl::StatusCode::kUnavailable, std::string(message),
                   {.code = std::string(code), .retry_after_s = 1});
}

absl::Status DeadlineError() {
  return MakeError(absl::StatusCode::kDeadlineExceeded, "the request's deadline has passed",
                   {.code = "deadline_exceeded"});
}

absl::Status ClientError(const absl::Status& status, bool deadline_passed) {
  const auto error = GetApiError(status);
  const std::string stage = error.has_value() ? error->code : "";
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
      if (stage == "experts_late") return Retryable(stage, "the experts did not answer in time; send it again");
      if (stage == "handoff_late") {
        return Retryable(stage, "the request's state did not reach its decode worker in time; send it again");
      }
      return Retryable("worker_lost", "a worker that served this request is gone; send it again");
    case absl::StatusCode::kDeadlineExceeded:
      if (deadline_passed) return DeadlineError();
      return Retryable("worker_late", "a worker did not answer in time; send it again");
    case absl::StatusCode::kResourceExhausted:
      return MakeError(absl::StatusCode::kResourceExhausted, "every worker is busy",
                       {.code = "overloaded", .retry_after_s = 2});
    case absl::StatusCode::kDataLoss:
      return Retryable("handoff_failed", "the request's state could not be moved intact; send it again");
    case absl::StatusCode::kFailedPrecondition:
      return Retryable("no_compatible_pair", "the workers chosen do not serve the same model; send it again");
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kCancelled:  // not by us: our own cancels are not reported
      return Retryable("lease_lost", "the request lost its place on a worker; send it again");
    default:
      return MakeError(absl::StatusCode::kInternal, "a worker could not continue this request",
                       {.code = "internal_error"});
  }
}

GeneratedToken FromProto(const v1::Token& token) {
  GeneratedToken out;
  out.index = static_cast<int64_t>(token.index());
  out.id = static_cast<int32_t>(token.id());
  out.logprob = token.logprob();
  out.top_logprobs.reserve(token.top_logprobs_size());
  for (const v1::TokenLogprob& top : token.top_logprobs()) {
    out.top_logprobs.push_back({static_cast<int32_t>(top.id()), top.logprob()});
  }
  return out;
}

v1::GenerationSpec ToSpec(const GenerationRequest& request, const std::vector<int32_t>& end_ids) {
  v1::GenerationSpec spec;
  v1::SamplingParams* sampling = spec.mutable_sampling();
  const SamplingParams& from = request.sampling;
  sampling->set_temperature(static_cast<float>(from.temperature));
  sampling->set_top_p(static_cast<float>(from.top_p));
  sampling->set_top_k(static_cast<uint32_t>(from.top_k));
  sampling->set_min_p(static_cast<float>(from.min_p));
  sampling->set_presence_penalty(static_cast<float>(from.presence_penalty));
  sampling->set_frequency_penalty(static_cast<float>(from.frequency_penalty));
  sampling->set_repetition_penalty(static_cast<float>(from.repetition_penalty));
  sampling->set_seed(from.seed);
  for (const auto& [id, bias] : from.logit_bias) {
    v1::LogitBias* entry = sampling->add_logit_bias();
    entry->set_id(static_cast<uint32_t>(id));
    entry->set_bias(bias);
  }
  spec.set_choice(static_cast<uint32_t>(request.choice));
  spec.set_max_tokens(static_cast<uint32_t>(request.max_tokens));
  spec.set_min_tokens(static_cast<uint32_t>(request.min_tokens));
  if (!request.ignore_eos) {
    for (int32_t id : end_ids) spec.add_end_ids(static_cast<uint32_t>(id));
  }
  spec.set_num_logprobs(request.num_logprobs);
  return spec;
}

uint64_t TokenHash(const std::vector<int32_t>& ids) {
  static_assert(std::endian::native == std::endian::little, "the hash is defined over little-endian ids");
  return XXH3_64bits(ids.data(), ids.size() * sizeof(int32_t));
}

uint64_t LeftMs(std::chrono::steady_clock::time_point deadline, std::chrono::steady_clock::time_point now) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - now).count();
  return static_cast<uint64_t>(std::clamp<int64_t>(left, 1, 3600000));
}

}  // namespace millrace::router
