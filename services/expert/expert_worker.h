// SPDX-License-Identifier: Apache-2.0
// An expert worker as a whole: its experts' weights, its loop, its services, its membership.
//
// Thread: the worker's main thread.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "services/common/worker_core.h"
#include "services/expert/expert_loop.h"
#include "services/expert/expert_service.h"

namespace millrace::expert {

class ExpertWorker {
 public:
  // Returns when the weights are loaded and the worker serves.
  static absl::StatusOr<std::unique_ptr<ExpertWorker>> Start(const WorkerConfig& config, WorkerEnvironment environment);
  ~ExpertWorker();  // Stop

  void Drain(absl::Duration grace);
  void Stop();
  WorkerCore& core() { return core_; }
  const std::string& address() const { return core_.address(); }

 private:
  ExpertWorker(const WorkerConfig& config, WorkerEnvironment environment) : core_(config, std::move(environment)) {}
  absl::Status Load();

  WorkerCore core_;
  ExpertService service_;
  std::unique_ptr<ExpertComputer> experts_;
  std::unique_ptr<ExpertLoop> loop_;
};

inline absl::Status RunExpertWorker(const WorkerConfig& config, WorkerEnvironment environment, const StopSignal& stop) {
  return RunWorker<ExpertWorker>(config, std::move(environment), stop);
}

}  // namespace millrace::expert
