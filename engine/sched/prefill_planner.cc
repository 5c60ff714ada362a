// SPDX-License-Identifier: Apache-2.0
// See prefill_planner.h.
#include "engine/sched/prefill_planner.h"

#include <algorithm>

namespace millrace::sched {

PrefillPlan PlanPrefill(absl::Span<const PrefillCandidate> candidates, const PrefillLimits& limits, int64_t now_us) {
  PrefillPlan plan;
  std::vector<const PrefillCandidate*> runnable;
  int64_t pages_free = limits.pages_free;
  int slots_free = limits.slots_free;
  bool blocked = false;
  for (const PrefillCandidate& candidate : candidates) {
    if (candidate.deadline_us <= now_us) {
      plan.expired.push_back(candidate.id);
      continue;
    }
    if (!candidate.admitted) {
      blocked = blocked || candidate.pages_needed > pages_free || slots_free < 1;
      if (blocked) continue;
      pages_free -= candidate.pages_needed;
      --slots_free;
      plan.admit.push_back(candidate.id);
    }
    runnable.push_back(&candidate);
  }
  if (runnable.empty()) return plan;

  // Shortest first into what the oldest's promise leaves; then the oldest takes everything that is still free.
  const PrefillCandidate* oldest = runnable.front();
  const int64_t promised = std::min(oldest->tokens_left, (limits.max_batch_tokens + 1) / 2);
  int64_t room = limits.max_batch_tokens - promised;
  std::vector<const PrefillCandidate*> others(runnable.begin() + 1, runnable.end());
  std::stable_sort(others.begin(), others.end(),
                   [](const auto* a, const auto* b) { return a->tokens_left < b->tokens_left; });
  for (const PrefillCandidate* candidate : others) {
    const int64_t num_tokens = std::min(candidate->tokens_left, room);
    if (num_tokens == 0) break;
    plan.chunks.push_back({candidate->id, num_tokens});
    room -= num_tokens;
  }
  plan.chunks.push_back({oldest->id, std::min(oldest->tokens_left, promised + room)});
  std::sort(plan.chunks.begin(), plan.chunks.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  return plan;
}

}  // namespace millrace::sched
