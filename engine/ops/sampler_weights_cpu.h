// SPDX-License-Identifier: Apache-2.0
// The sampler's passes over a whole row of logits: its maximum, and the weights of all ids with their sums.
//
// Private to sampler_cpu.cc. The bits are the same whatever the machine's vectors: sums have eight lanes (id mod 8) in
// blocks of kSamplerBlock ids, in one order. Thread: any; pure functions.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace millrace {

struct MaxOfRow {
  float value;  // -inf for an empty row
  bool finite;  // all of it is below +inf and no NaN
};
MaxOfRow FindMax(absl::Span<const float> logits);

struct RowWeights {
  std::vector<double> weights;     // by id: exp((logit - max) * inv_temperature)
  std::vector<double> block_sums;  // one per kSamplerBlock ids
};
// Fills `out`, whose memory is kept from row to row, and returns the sum of all. `max` is the row's, and finite.
double Weigh(absl::Span<const float> logits, float max, double inv_temperature, RowWeights& out);

}  // namespace millrace
