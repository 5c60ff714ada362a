// SPDX-License-Identifier: Apache-2.0
// The engine thread of an expert worker: requests in, one row per (token, expert) out.
//
// Requests come over the transport or over a gRPC stream and wait in one bounded queue, in the order of arrival, which
// is the order of waves: while one is computed, the next is travelling. What a row gives does not depend on what it is
// computed with. The thread waits inside the transport, so that a request is picked up without a thread switch.
//
// Thread: Submit, Attach and the queries from any; OnMessage on the transport's thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"
#include "engine/moe/expert_computer.h"
#include "kvtransfer/transport.h"
#include "millrace/v1/cluster.pb.h"
#include "services/common/worker_metrics.h"
#include "services/expert/expert_wire.h"

namespace millrace::expert {

struct ExpertLoopOptions {
  size_t max_queue = 256;     // requests that have arrived or are arriving
  size_t max_callers = 1024;  // attached; the one attached longest ago makes room
  int num_experts = 0;        // of the model
  int num_layers = 0;         // MoE layers, MTP's included
  int64_t hidden = 0;
  RowFormat format = RowFormat::kBf16;
};

// Bytes of four-byte alignment: what vectors of uint8_t from operator new have.
using Payload = std::shared_ptr<std::vector<uint8_t>>;
using Reply = std::function<void(ExpertHeader, Payload)>;

class ExpertLoop final : public kvtransfer::MessageHandler {
 public:
  // `transport` may be null (data over gRPC only). Everything must outlive the loop.
  ExpertLoop(ExpertComputer& experts, kvtransfer::Transport* transport, ExpertLoopOptions options,
             WorkerMetrics* metrics);
  ~ExpertLoop() override;  // Stop

  void Attach(IncarnationId caller);
  void Detach(IncarnationId caller);
  bool attached(IncarnationId caller) const;
  // One request from a stream. `reply` is called once, from the engine thread or at once.
  void Submit(ExpertHeader header, Payload payload, Reply reply);
  void Stop();  // requests still waiting are answered Unavailable

  void FillStatus(v1::WorkerStatus& status) const;
  bool Idle() const { return waiting_.load() == 0; }
  // Idle, and nobody will ask again: every caller has let go, or none has asked for `silence` (those that died do not
  // let go).
  bool LetGo(absl::Time now, absl::Duration silence) const;

  kvtransfer::Placement OnMessage(const kvtransfer::IncomingMessage& message) override;

 private:
  struct Request {
    ExpertHeader header;
    Payload payload;
    Reply reply;
  };

  absl::Status CheckHeader(const ExpertHeader& header) const;
  void Enqueue(Request request);
  void PublishQueue(size_t queued);  // mutex_ held, so that the last word is the newest
  void Run();
  void Serve(Request& request);
  absl::Status Compute(const Request& request, std::vector<uint8_t>& out);
  static void ReplyError(const ExpertHeader& header, const Reply& reply, const absl::Status& status);
  Reply ReplyTo(kvtransfer::PeerId peer);

  ExpertComputer& experts_;
  kvtransfer::Transport* const transport_;
  const ExpertLoopOptions options_;
  WorkerMetrics* const metrics_;

  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Request> queue_;                             // guarded by mutex_
  absl::flat_hash_map<IncarnationId, uint64_t> callers_;  // guarded by mutex_; value: order of attachment
  uint64_t attachments_ = 0;                              // guarded by mutex_
  absl::Time last_arrival_;                               // guarded by mutex_
  std::atomic<size_t> arriving_or_queued_{0};
  std::atomic<size_t> queued_{0};
  std::atomic<size_t> waiting_{0};
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> steps_{0}, pairs_{0};
  std::atomic<uint32_t> last_step_us_{0};
  std::thread thread_;
};

}  // namespace millrace::expert
