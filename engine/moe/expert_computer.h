// SPDX-License-Identifier: Apache-2.0
// Whoever holds some experts' weights and computes with them: local_experts.h on the CPU, cuda_experts.h on a card.
//
// It is asked for pairs (row, expert) and gives a row for each. What a pair gives does not depend on which others are
// asked for with it, nor on how they are cut into calls. Its caller is an expert worker, or a worker that runs some of
// the experts of a pool itself. Thread: one at a time.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/moe/expert_rows.h"

namespace millrace {

// So many pairs of one expert. Lies in memory as it travels.
struct ExpertGroup {
  uint32_t expert = 0, count = 0;
};

struct ExpertPairs {
  int layer = 0;                         // backbone layer, or their number for MTP
  RowFormat format = RowFormat::kF32;    // of rows and results
  const void* rows = nullptr;            // [rows, hidden]
  absl::Span<const ExpertGroup> groups;  // pairs by expert, in this order; counts add up to num_pairs
  absl::Span<const uint32_t> pair_rows;  // [num_pairs], index into rows
  absl::Span<const float> weights;       // [num_pairs], routing weights
};

class ExpertComputer {
 public:
  virtual ~ExpertComputer() = default;
  // out [num_pairs, hidden] in the order of the pairs. NotFound: an expert that is not loaded here.
  virtual absl::Status Compute(const ExpertPairs& pairs, void* out) = 0;
  virtual bool Has(int layer, int expert) const = 0;
  virtual int64_t weight_bytes() const = 0;
  // What fixes the bits of its results (engine.h).
  virtual std::string KernelSet() const = 0;
};

}  // namespace millrace
