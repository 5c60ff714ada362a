// SPDX-License-Identifier: Apache-2.0
// What the router counts about generations and workers. The HTTP front's own counts are services/common/metrics.
//
// Labels come from closed sets. Thread: Prometheus' types are thread-safe; SetWorkers is the loop's.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <chrono>
#include <string_view>

#include "services/router/cluster_snapshot.h"

namespace millrace::router {

// A duration as histograms take it.
inline double Seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

class FlowMetrics {
 public:
  // The registry must outlive this object.
  explicit FlowMetrics(prometheus::Registry& registry);

  void CountEnd(std::string_view outcome);   // "stop", "length", or the word of a status code: "unavailable"
  void CountRefusal(std::string_view code);  // never entered the cluster; the ApiError's code
  void CountHandoff(int64_t bytes, int64_t resent_extents, double seconds);
  int64_t queued() const { return static_cast<int64_t>(generations_queued_.Value()); }
  void SetQueued(size_t queued, bool for_workers);  // what the head of the queue waits for: workers, else capacity
  void SetJoins(int64_t joins);                     // since start
  void SetWorkers(const ClusterSnapshot& snapshot, std::chrono::steady_clock::time_point now);

 private:
  prometheus::Family<prometheus::Counter>& ends_;
  prometheus::Family<prometheus::Counter>& refusals_;
  prometheus::Family<prometheus::Gauge>& workers_;
  prometheus::Family<prometheus::Gauge>& cache_pages_;
  prometheus::Gauge& waiting_capacity_;
  prometheus::Gauge& waiting_workers_;
  prometheus::Counter& handoff_bytes_;
  prometheus::Counter& handoff_resent_;
  prometheus::Histogram& handoff_seconds_;

 public:
  prometheus::Gauge& generations_open;
  prometheus::Gauge& attempts_open;  // not yet confirmed gone at both workers; 0 when idle, or something leaks
  prometheus::Histogram& queue_seconds;
  prometheus::Histogram& decision_seconds;
  prometheus::Histogram& reserve_seconds;
  prometheus::Histogram& prefill_seconds;
  prometheus::Histogram& generation_seconds;  // of those that ended well
  prometheus::Counter& requeues;
  prometheus::Counter& tokens;
  prometheus::Counter& tokens_repeated;    // dropped because they were forwarded before
  prometheus::Counter& aborts_unanswered;  // given up; the lease's end has freed the memory
  prometheus::Counter& worker_deaths;

 private:
  prometheus::Gauge& generations_queued_;
  prometheus::Counter& worker_joins_;
};

}  // namespace millrace::router
