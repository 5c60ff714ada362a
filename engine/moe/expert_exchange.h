// SPDX-License-Identifier: Apache-2.0
// Dispatch and Combine: all that the model knows about where experts run.
//
// The rows of one MoE layer go out with the experts they chose; one row per (token, expert) comes back. Partial sums
// never travel, and the model adds the rows in ascending expert id, so the bits do not depend on placement, arrival
// order or retries. Implementations: LocalExperts (this process), services/expert/remote_experts (the pool, over a
// transport). Thread: engine thread; an implementation may use others inside.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "engine/moe/expert_rows.h"

namespace millrace {

struct ExpertBatch {
  int layer = 0;  // backbone layer, or L for MTP
  int64_t num_tokens = 0;
  int64_t hidden = 0;
  int top_k = 0;
  const void* rows = nullptr;          // [num_tokens, hidden]; values are BF16-representable in `release`
  const int32_t* experts = nullptr;    // [num_tokens, top_k], ascending in each row
  const float* weights = nullptr;      // [num_tokens, top_k], routing weight of each expert
  RowFormat format = RowFormat::kF32;  // of rows and of what Combine fills
};

class ExpertExchange {
 public:
  virtual ~ExpertExchange() = default;
  // Starts the batch. Pointers stay valid until Combine returns. At most one batch is open at a time.
  virtual absl::Status Dispatch(const ExpertBatch& batch) = 0;
  // Waits (bounded) and fills expert_rows [num_tokens, top_k, hidden], in the order of batch.experts; values are
  // BF16-representable in `release`. On error the batch is over and nothing of it may be used: a missing expert is
  // never skipped.
  virtual absl::Status Combine(void* expert_rows) = 0;
  // What fixes the bits of the rows that come back (engine.h). Any thread.
  virtual std::string KernelSet() const = 0;
};

}  // namespace millrace
