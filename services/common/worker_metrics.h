// SPDX-License-Identifier: Apache-2.0
// What a worker counts, for /metrics. Labels: role and name of the worker, and words from fixed sets.
//
// Thread: any.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <map>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace millrace {

class WorkerMetrics {
 public:
  // The registry must outlive this object.
  WorkerMetrics(prometheus::Registry& registry, const std::string& role, const std::string& name);

  void CountOutcome(absl::StatusCode code);     // requests (prefill), leases (decode), messages (expert)
  void CountRejected(std::string_view reason);  // refused before any work: "queue_full", "draining" ...
  void CountResent(uint64_t extents) { resent_.Increment(static_cast<double>(extents)); }
  void CountTransfer(uint64_t bytes) { transfer_bytes_.Increment(static_cast<double>(bytes)); }
  void CountTransferFailure(std::string_view reason);
  void CountTokens(int64_t tokens) { tokens_.Increment(static_cast<double>(tokens)); }
  void ObserveStep(double seconds, int64_t rows);
  void ObserveHandoff(double seconds) { handoff_.Observe(seconds); }
  void ObserveQueue(double seconds) { queue_.Observe(seconds); }

  prometheus::Gauge& queued() { return queued_; }
  prometheus::Gauge& running() { return running_; }
  void SetPages(int64_t free, int64_t owned);
  void SetSlots(int64_t free, int64_t total);
  void SetLoad(int64_t done, int64_t total);

 private:
  const std::map<std::string, std::string> labels_;
  prometheus::Family<prometheus::Counter>& outcomes_;
  prometheus::Family<prometheus::Counter>& rejected_;
  prometheus::Family<prometheus::Counter>& transfer_failures_;
  prometheus::Gauge& pages_free_;
  prometheus::Gauge& pages_owned_;
  prometheus::Gauge& slots_free_;
  prometheus::Gauge& slots_owned_;
  prometheus::Counter& resent_;
  prometheus::Counter& transfer_bytes_;
  prometheus::Counter& tokens_;
  prometheus::Counter& steps_;
  prometheus::Histogram& step_seconds_;
  prometheus::Histogram& step_rows_;
  prometheus::Histogram& handoff_;
  prometheus::Histogram& queue_;
  prometheus::Gauge& queued_;
  prometheus::Gauge& running_;
  prometheus::Gauge& load_done_;
  prometheus::Gauge& load_total_;
};

}  // namespace millrace
