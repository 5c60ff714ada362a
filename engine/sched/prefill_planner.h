// SPDX-License-Identifier: Apache-2.0
// Which prompt tokens the next prefill pass computes.
//
// A pass has room for `max_batch_tokens` rows. Prompts are cut into chunks freely, because the bits do not depend on
// the cut. The oldest prompt is promised half of the room; the other half goes to the prompts with the least left, so
// that a short question does not wait for a long document, and the document cannot be starved by short ones.
//
// Pure: the same state and time give the same plan. Thread: any.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace millrace::sched {

struct PrefillCandidate {
  uint64_t id = 0;           // the caller's; also the order of arrival, ascending
  int64_t tokens_left = 0;   // of the prompt, >= 1
  int64_t deadline_us = 0;   // on the clock of `now_us`
  bool admitted = false;     // has its pages already
  int64_t pages_needed = 0;  // if not admitted
};

struct PrefillLimits {
  int64_t max_batch_tokens = 512;
  int64_t pages_free = 0;
  int slots_free = 0;
};

struct PrefillPlan {
  struct ChunkPlan {
    uint64_t id = 0;
    int64_t num_tokens = 0;
    friend bool operator==(const ChunkPlan&, const ChunkPlan&) = default;
  };
  std::vector<uint64_t> expired;  // deadline passed: to be ended, ascending
  std::vector<uint64_t> admit;    // to be given pages before the pass, in order
  std::vector<ChunkPlan> chunks;  // ascending id; sum of num_tokens <= max_batch_tokens
};

// Admission is strictly in order of arrival: the first that does not fit stops it, so that a large prompt is not passed
// for ever by small ones.
PrefillPlan PlanPrefill(absl::Span<const PrefillCandidate> candidates, const PrefillLimits& limits, int64_t now_us);

}  // namespace millrace::sched
