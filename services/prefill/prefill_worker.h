// SPDX-License-Identifier: Apache-2.0
// A prefill worker as a whole: engine, loop, service, membership.
//
// Thread: the worker's main thread.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "services/common/worker_core.h"
#include "services/expert/engine_host.h"
#include "services/prefill/prefill_loop.h"
#include "services/prefill/prefill_service.h"

namespace millrace::prefill {

class PrefillWorker {
 public:
  // Returns when the weights are loaded and the worker serves (it may still wait for its expert pool).
  static absl::StatusOr<std::unique_ptr<PrefillWorker>> Start(const WorkerConfig& config,
                                                              WorkerEnvironment environment);
  ~PrefillWorker();  // Stop

  void Drain(absl::Duration grace);
  void Stop();
  WorkerCore& core() { return core_; }
  const std::string& address() const { return core_.address(); }
  Engine& engine() { return host_->engine(); }
  PrefillLoop& loop() { return *loop_; }
  expert::EngineHost& host() { return *host_; }

 private:
  PrefillWorker(const WorkerConfig& config, WorkerEnvironment environment) : core_(config, std::move(environment)) {}
  absl::Status Load();

  WorkerCore core_;
  PrefillService service_;
  std::unique_ptr<HandoffClient> decode_workers_;
  std::unique_ptr<expert::EngineHost> host_;
  std::unique_ptr<PrefillLoop> loop_;
};

inline absl::Status RunPrefillWorker(const WorkerConfig& config, WorkerEnvironment environment,
                                     const StopSignal& stop) {
  return RunWorker<PrefillWorker>(config, std::move(environment), stop);
}

}  // namespace millrace::prefill
