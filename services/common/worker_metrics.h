// SPDX-License-Identifier: Apache-2.0
// What a worker counts, for /metrics. Labels: role and name of the worker, and words from fixed sets; names and
// meanings are metric_catalogue.h.
//
// A role makes only what it has: a prefill worker exposes no leases, an expert worker no pages. Thread: any.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/transport.h"
#include "millrace/v1/types.pb.h"

namespace millrace {

// Why a request waits at a worker. The words are labels of millrace_queue_requests.
enum class WaitReason {
  kPages,    // prefill: none free for the prompt
  kSlots,    // prefill: no slot free
  kTurn,     // prefill, expert: its turn has not come
  kDecode,   // prefill, stage handoff: the decode worker has not answered
  kHandoff,  // decode: its state is arriving
  kStream,   // decode: the router has not opened its stream
  kReader,   // decode: its reader is behind
  kBatch,    // decode: more sequences than a pass holds
};
inline constexpr int kWaitReasons = 8;

struct LeaseCounts {
  int receiving = 0, committed = 0, running = 0, ending = 0;
};

class WorkerMetrics {
 public:
  // The registry must outlive this object.
  WorkerMetrics(prometheus::Registry& registry, v1::Role role, const std::string& name);

  void CountOutcome(absl::StatusCode code);     // requests (prefill), leases (decode), messages (expert)
  void CountRejected(std::string_view reason);  // refused before any work: "queue_full", "draining" ...
  void CountResent(uint64_t extents);           // of one repair
  void CountTransfer(uint64_t bytes) { transfer_bytes_->Increment(static_cast<double>(bytes)); }
  void CountTransferFailure(std::string_view reason);
  void CountTokens(int64_t tokens) { tokens_.Increment(static_cast<double>(tokens)); }
  void CountExpert(int expert, int64_t rows);  // expert workers; `expert` is one of the member's own
  void CountWave(uint32_t wave);
  void CountLease() { leases_granted_->Increment(); }
  void CountEpochMismatch() { epoch_mismatches_->Increment(); }
  void ObserveStep(double seconds, int64_t rows);
  void ObserveHandoff(double seconds) { handoff_->Observe(seconds); }
  void ObserveHandoffPhase(std::string_view phase, double seconds);
  void ObserveQueue(double seconds) { queue_->Observe(seconds); }

  prometheus::Gauge& queued() { return queued_; }
  prometheus::Gauge& running() { return running_; }
  void SetWaiting(const std::array<int, kWaitReasons>& by_reason);  // of this role; others' reasons are ignored
  void SetLeases(const LeaseCounts& leases);
  void SetHandoffsInFlight(int stream, int tail, int commit);
  void SetPages(int64_t free, int64_t owned);
  void SetSlots(int64_t free, int64_t total);
  void SetLoad(int64_t done, int64_t total);
  void SetDeviceMemory(int64_t free, int64_t total);
  void SetTransport(const kvtransfer::TransportStatistics& statistics);
  void SetReceiver(const kvtransfer::ReceiverStatistics& statistics);
  struct Exchange {
    uint64_t batches = 0, failed_batches = 0, messages = 0, dropped_replies = 0, bytes_sent = 0, bytes_received = 0;
    double wait_seconds = 0;
  };
  void SetExchange(const Exchange& exchange);

 private:
  using Labels = std::map<std::string, std::string>;
  Labels With(const char* key, std::string value) const;
  prometheus::Gauge& Gauge(const char* name, const char* key, const char* value);

  prometheus::Registry& registry_;
  const v1::Role role_;
  const Labels labels_;
  prometheus::Family<prometheus::Counter>& outcomes_;
  prometheus::Family<prometheus::Counter>& rejected_;
  prometheus::Counter& tokens_;
  prometheus::Counter& steps_;
  prometheus::Histogram& step_seconds_;
  prometheus::Histogram& step_rows_;
  prometheus::Gauge& queued_;
  prometheus::Gauge& running_;
  prometheus::Gauge& load_done_;
  prometheus::Gauge& load_total_;
  std::map<WaitReason, prometheus::Gauge*> waiting_;
  // Null where the role has none.
  prometheus::Family<prometheus::Counter>* transfer_failures_ = nullptr;
  prometheus::Family<prometheus::Counter>* expert_tokens_ = nullptr;
  prometheus::Family<prometheus::Counter>* waves_ = nullptr;
  prometheus::Family<prometheus::Histogram>* handoff_phases_ = nullptr;
  prometheus::Gauge *pages_free_ = nullptr, *pages_owned_ = nullptr;
  prometheus::Gauge *slots_free_ = nullptr, *slots_owned_ = nullptr;
  prometheus::Counter *resent_ = nullptr, *repairs_ = nullptr, *transfer_bytes_ = nullptr;
  prometheus::Histogram *handoff_ = nullptr, *queue_ = nullptr;
  prometheus::Counter *leases_granted_ = nullptr, *epoch_mismatches_ = nullptr;
};

}  // namespace millrace
