// SPDX-License-Identifier: Apache-2.0
// The engine thread of a prefill or a decode worker: what the two roles' loops have in common.
//
// Runs drain commands -> Round -> publish until it is stopped and nothing is live, within kStopPatience. A role derives
// and says what a round is and how everything ends; other threads post commands. Time enters once per round. An expert
// worker's thread is not one of these: it waits inside the transport (services/expert/expert_loop).
//
// Thread: public methods from any thread; what a role overrides runs on the engine thread, and must not block.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "millrace/v1/cluster.pb.h"
#include "services/common/bounded_queue.h"
#include "services/common/worker_metrics.h"

namespace millrace {

class EngineLoop {
 public:
  EngineLoop(const EngineLoop&) = delete;
  EngineLoop& operator=(const EngineLoop&) = delete;

  void Drain();  // no new requests
  void Stop();   // ends everything, gives everything back, joins; idempotent
  void FillStatus(v1::WorkerStatus& status) const;
  bool Idle() const { return live_.load() == 0; }

 protected:
  using Command = absl::AnyInvocable<void(absl::Time now)>;

  // `name` is the worker's in errors: "prefill worker". `metrics` may be null. Everything must outlive the loop.
  EngineLoop(std::string name, Engine& engine, size_t max_commands, WorkerMetrics* metrics);
  virtual ~EngineLoop();  // a role's own destructor has called Stop

  void Start();  // the end of the role's constructor: from here on the thread calls what it overrides

  // Ends what is over, plans, makes a pass. Returns how long the thread may sleep if no command comes.
  virtual absl::Duration Round(absl::Time now) = 0;
  virtual void EndAll(const absl::Status& why) = 0;  // begins the end of all that is live
  virtual void Publish() = 0;                        // calls PublishLoad; also once before the thread starts

  // Takes `command` unless the engine thread is too far behind: then it is left as it was, and Behind() says so.
  bool TryPost(Command& command) { return commands_->TryPush(command); }
  absl::Status Behind() const;

  // A pass of `rows` rows that began at `began` and has ended now, well or not. Returns now.
  absl::Time RecordStep(absl::Time began, int64_t rows, bool ok);

  // What Publish found, for the router and for the metrics; `more` adds the role's own fields.
  struct Load {
    uint32_t queued = 0, running = 0;  // as the metrics count them
    bool work_pending = false;         // for the watchdog
    std::array<int, kWaitReasons> waiting{};
  };
  void PublishLoad(const Load& load, const CacheUsage& usage, absl::FunctionRef<void(v1::WorkerStatus& status)> more);

  Engine& engine_;
  WorkerMetrics* const metrics_;
  // Shared with callbacks that may come after this object has gone.
  const std::shared_ptr<BoundedQueue<Command>> commands_;
  bool draining_ = false, stopping_ = false;  // engine thread only
  std::atomic<int> live_{0};                  // requests that hold anything; written on the engine thread

 private:
  void Run();

  const std::string name_;
  mutable std::mutex status_mutex_;
  v1::WorkerStatus published_;  // guarded by status_mutex_
  std::thread thread_;
};

}  // namespace millrace
