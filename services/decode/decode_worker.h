// SPDX-License-Identifier: Apache-2.0
// A decode worker as a whole: engine, receiver, loop, services, membership.
//
// Thread: the worker's main thread.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvtransfer/receiver.h"
#include "services/common/worker_core.h"
#include "services/decode/decode_loop.h"
#include "services/decode/decode_service.h"
#include "services/expert/engine_host.h"

namespace millrace::decode {

class DecodeWorker {
 public:
  // Returns when the weights are loaded and the worker serves (it may still wait for its expert pool).
  static absl::StatusOr<std::unique_ptr<DecodeWorker>> Start(const WorkerConfig& config, WorkerEnvironment environment);
  ~DecodeWorker();  // Stop

  void Drain(absl::Duration grace);
  void Stop();
  WorkerCore& core() { return core_; }
  const std::string& address() const { return core_.address(); }
  Engine& engine() { return host_->engine(); }
  DecodeLoop& loop() { return *loop_; }
  kvtransfer::Receiver& receiver() { return *receiver_; }
  expert::EngineHost& host() { return *host_; }

 private:
  DecodeWorker(const WorkerConfig& config, WorkerEnvironment environment) : core_(config, std::move(environment)) {}
  absl::Status Load();

  WorkerCore core_;
  HandoffService handoff_service_;
  DecodeService decode_service_;
  std::unique_ptr<expert::EngineHost> host_;
  std::unique_ptr<kvtransfer::Receiver> receiver_;
  std::unique_ptr<DecodeLoop> loop_;
};

inline absl::Status RunDecodeWorker(const WorkerConfig& config, WorkerEnvironment environment, const StopSignal& stop) {
  return RunWorker<DecodeWorker>(config, std::move(environment), stop);
}

}  // namespace millrace::decode
