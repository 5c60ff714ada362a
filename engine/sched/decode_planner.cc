// SPDX-License-Identifier: Apache-2.0
// See decode_planner.h.
#include "engine/sched/decode_planner.h"

#include <algorithm>

namespace millrace::sched {

DecodePlan PlanDecode(absl::Span<const DecodeCandidate> candidates, int max_batch, int64_t now_us) {
  DecodePlan plan;
  std::vector<const DecodeCandidate*> ready;
  for (const DecodeCandidate& candidate : candidates) {
    if (candidate.deadline_us <= now_us) {
      plan.deadline_passed.push_back(candidate.id);
    } else if (candidate.lease_us <= now_us) {
      plan.lease_ended.push_back(candidate.id);
    } else if (candidate.runnable) {
      ready.push_back(&candidate);
    }
  }
  if (static_cast<int>(ready.size()) > max_batch) {
    std::stable_sort(ready.begin(), ready.end(), [](const auto* a, const auto* b) {
      return a->last_step != b->last_step ? a->last_step < b->last_step : a->id < b->id;
    });
    ready.resize(max_batch);
  }
  for (const DecodeCandidate* candidate : ready) plan.batch.push_back(candidate->id);
  std::sort(plan.batch.begin(), plan.batch.end());
  std::sort(plan.deadline_passed.begin(), plan.deadline_passed.end());
  std::sort(plan.lease_ended.begin(), plan.lease_ended.end());
  return plan;
}

}  // namespace millrace::sched
