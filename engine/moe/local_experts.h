// SPDX-License-Identifier: Apache-2.0
// The weights of a set of routed experts and the arithmetic on them, in this process.
//
// Used by the CPU engine when no pool is configured, and by the expert service for its share. Thread: one at a time.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/checkpoint.h"
#include "engine/moe/expert_computer.h"
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
  std::function<void(const std::string&)> notice;  // a line on what start-up takes of a device
};

// Makes an empty list all experts; InvalidArgument: an id beyond the model's.
absl::Status CompleteExpertIds(const ModelConfig& config, std::vector<int>& experts);

class LocalExperts : public ExpertExchange, public ExpertComputer {
 public:
  static absl::StatusOr<std::unique_ptr<LocalExperts>> Create(const Checkpoint& checkpoint,
                                                              LocalExpertsOptions options);
  ~LocalExperts() override;

  // Of the batch's formats it takes F32, which is what the CPU engine has.
  absl::Status Dispatch(const ExpertBatch& batch) override;
  absl::Status Combine(void* expert_rows) override;

  absl::Status Compute(const ExpertPairs& pairs, void* out) override;
  bool Has(int layer, int expert) const override;
  int64_t weight_bytes() const override;
  std::string KernelSet() const override;

 private:
  // One expert on `num_rows` rows: rows [num_rows, D], weights [num_rows] -> out [num_rows, D].
  absl::Status ComputeOne(int layer, int expert, const float* rows, const float* weights, int64_t num_rows, float* out);

  struct Impl;
  explicit LocalExperts(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace millrace
