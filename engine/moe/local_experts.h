// SPDX-License-Identifier: Apache-2.0
// The weights of a set of routed experts and the arithmetic on them, in this process.
//
// Used by the engine when no pool is configured, and by the expert service for its share. What one (row, expert) gives
// does not depend on which other rows or experts are asked for. Thread: one at a time.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/checkpoint.h"
#include "engine/moe/expert_exchange.h"
#include "engine/numerics.h"

namespace millrace {

struct LocalExpertsOptions {
  Numerics numerics = Numerics::kRelease;
  std::optional<Rounding> rounding;  // tests only; Rounding::For(numerics) otherwise
  // Experts to load, the same set in every layer (MTP included if `mtp`). Empty: all.
  std::vector<int> experts;
  bool mtp = false;
  int num_threads = 1;
  std::function<void(int64_t, int64_t)> progress;  // bytes done, bytes in all
};

class LocalExperts : public ExpertExchange {
 public:
  static absl::StatusOr<std::unique_ptr<LocalExperts>> Create(const Checkpoint& checkpoint,
                                                              LocalExpertsOptions options);
  ~LocalExperts() override;

  absl::Status Dispatch(const ExpertBatch& batch) override;
  absl::Status Combine(float* expert_rows) override;

  // One expert on `num_rows` rows: rows [num_rows, D], weights [num_rows] -> out [num_rows, D]. The expert must be
  // loaded here (NotFound otherwise).
  absl::Status Compute(int layer, int expert, const float* rows, const float* weights, int64_t num_rows, float* out);
  bool Has(int layer, int expert) const;
  int64_t weight_bytes() const;

 private:
  struct Impl;
  explicit LocalExperts(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace millrace
