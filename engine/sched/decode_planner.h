// SPDX-License-Identifier: Apache-2.0
// Which sequences the next decode step moves by one token.
//
// Every sequence that is committed, attached to its stream and not held back by a slow reader, up to the size of the
// batch; when there are more, those that have waited longest, so that nobody waits more than one round.
//
// Pure: the same state and time give the same plan. Thread: any.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace millrace::sched {

struct DecodeCandidate {
  uint64_t id = 0;
  int64_t deadline_us = 0;  // of the request
  int64_t lease_us = 0;     // the lease ends then unless renewed
  bool runnable = false;    // committed, attached, reader keeps up
  uint64_t last_step = 0;   // number of the step it was last part of; 0 for none
};

struct DecodePlan {
  std::vector<uint64_t> deadline_passed;  // ascending
  std::vector<uint64_t> lease_ended;      // ascending; every lease is looked at, deadlines have no order
  std::vector<uint64_t> batch;            // ascending id, at most max_batch
};

DecodePlan PlanDecode(absl::Span<const DecodeCandidate> candidates, int max_batch, int64_t now_us);

}  // namespace millrace::sched
