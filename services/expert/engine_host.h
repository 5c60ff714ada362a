// SPDX-License-Identifier: Apache-2.0
// An engine and the experts it needs: all in this process, or some here and the rest in the pool.
//
// What prefill and decode workers share. Owns the checkpoint, the exchange and the engine, in the order in which they
// depend on each other. Thread: made on the worker's main thread; Ready and SetPeers from any.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/moe/expert_computer.h"
#include "engine/moe/local_experts.h"
#include "millrace/v1/cluster.pb.h"
#include "services/common/generation_spec.h"
#include "services/common/worker_core.h"
#include "services/expert/remote_experts.h"

namespace millrace::expert {

// The kernels that the pool's experts are computed with, wherever they are: those of its device.
std::string PoolKernelSet(const WorkerConfig& config);

// What callers and members of a pool must agree on: model content, numerics, kernel set, wire version, and whether
// messages are sealed, which it says in clear so that a refusal shows it.
std::string ExpertCompatHash(const Checkpoint& checkpoint, Numerics numerics, const std::string& kernel_set,
                             bool sealed);

// Experts of a pool that this process computes itself, on the pool's device.
absl::StatusOr<std::unique_ptr<ExpertComputer>> LoadExperts(const WorkerConfig& config, const Checkpoint& checkpoint,
                                                            LocalExpertsOptions options);

struct EngineHostOptions {
  int64_t cache_pages = 0;
  int max_sequences = 0;
  int max_batch_tokens = 0;
  std::string local_experts;  // "0-3"; only where the configuration has a pool
  std::string section;        // "prefill[0]", for messages
};

class EngineHost {
 public:
  // Loads everything; reports progress to the core. Errors are one line about the model or the configuration.
  static absl::StatusOr<std::unique_ptr<EngineHost>> Create(WorkerCore& core, const EngineHostOptions& options);

  Engine& engine() { return *engine_; }
  absl::Status Ready() const { return remote_ == nullptr ? absl::OkStatus() : remote_->Ready(); }
  void SetPeers(const v1::PeerList& peers) {
    if (remote_ != nullptr) remote_->SetPeers(peers);
  }
  void PublishMetrics(WorkerMetrics& metrics) const;  // what the exchange has counted; any thread
  RemoteExperts* remote_experts() { return remote_.get(); }

  // Prefill and decode workers pair only if these agree.
  const std::string& compat_hash() const { return compat_hash_; }
  RequestLimits limits() const;
  // Capacity, hashes, numerics: what the two roles say alike.
  v1::WorkerReady Describe() const;

 private:
  EngineHost() = default;
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::unique_ptr<ExpertComputer> local_;
  std::unique_ptr<RemoteExperts> remote_;
  std::unique_ptr<Engine> engine_;  // last: uses all of the above
  std::string compat_hash_, expert_compat_hash_;
};

}  // namespace millrace::expert
