// SPDX-License-Identifier: Apache-2.0
// From logits to the next token: penalties, bias, temperature, top-k, top-p, min-p, and a counter-based draw.
//
// The draw for token `token_index` of choice `choice` is Philox4x32-10 with key = seed and counter = (choice,
// token_index): there is no generator state to move, and a migrated request draws the same numbers. Log-probabilities
// are of the distribution after penalties and bias, before temperature and truncation. Pure functions, any thread.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace millrace {

struct SamplingParams {
  float temperature = 1.0f;  // below 1e-5 (and 0) means greedy: ties to the lower id
  float top_p = 1.0f;        // (0, 1]
  int top_k = 0;             // 0 means off; of equals, the lower ids stay
  float min_p = 0.0f;        // [0, 1]
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;  // over prompt and output
  uint64_t seed = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;  // id, added value
  int top_logprobs = 0;                               // 0 .. 20
  // Ids that may not be drawn (for min_tokens: the end-of-sentence id), -inf before anything else.
  std::vector<int32_t> banned;
};

struct SamplingRequest {
  SamplingParams params;
  uint32_t choice = 0;               // which of `n`
  uint64_t token_index = 0;          // index of the token to draw within its output
  absl::Span<const int32_t> prompt;  // for repetition_penalty only
  absl::Span<const int32_t> output;  // tokens drawn so far, for the penalties
};

struct SampledToken {
  int32_t id = -1;
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top;  // best first, ties to the lower id
  bool finite = true;                          // false: a logit was NaN or all are -inf; the token must not be used
};

// Philox4x32-10: four uniform 32-bit words. A draw takes counter_low = token_index, counter_high = choice, and as its
// uniform number in [0, 1) the upper 53 bits of (v[1], v[0]).
struct PhiloxWords {
  uint32_t v[4];
};
PhiloxWords Philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high);

SampledToken Sample(absl::Span<const float> logits, const SamplingRequest& request);

}  // namespace millrace
