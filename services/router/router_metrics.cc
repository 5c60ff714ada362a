// SPDX-License-Identifier: Apache-2.0
// Names and buckets of the router's metrics.
#include "services/router/router_metrics.h"

#include <array>
#include <map>
#include <string>
#include <utility>

#include "services/common/metrics.h"
#include "services/common/role.h"

namespace millrace::router {
namespace {

prometheus::Counter& Counter(prometheus::Registry& registry, const char* name) {
  return CounterFamily(registry, name).Add({});
}
prometheus::Gauge& Gauge(prometheus::Registry& registry, const char* name) {
  return GaugeFamily(registry, name).Add({});
}
prometheus::Histogram& Seconds(prometheus::Registry& registry, const char* name) {
  return HistogramFamily(registry, name).Add({}, PhaseBuckets());
}
prometheus::Gauge& Waiting(prometheus::Registry& registry, const char* reason) {
  return GaugeFamily(registry, "millrace_queue_requests")
      .Add({{"role", "router"}, {"stage", "placement"}, {"reason", reason}});
}

}  // namespace

FlowMetrics::FlowMetrics(prometheus::Registry& registry)
    : ends_(CounterFamily(registry, "millrace_router_generations_total")),
      refusals_(CounterFamily(registry, "millrace_router_refusals_total")),
      workers_(GaugeFamily(registry, "millrace_router_workers")),
      cache_pages_(GaugeFamily(registry, "millrace_router_cache_pages")),
      waiting_capacity_(Waiting(registry, "capacity")),
      waiting_workers_(Waiting(registry, "workers")),
      handoff_bytes_(Counter(registry, "millrace_router_handoff_bytes_total")),
      handoff_resent_(Counter(registry, "millrace_router_handoff_resent_extents_total")),
      handoff_seconds_(Seconds(registry, "millrace_router_handoff_seconds")),
      generations_open(Gauge(registry, "millrace_router_generations_open")),
      attempts_open(Gauge(registry, "millrace_router_attempts_open")),
      queue_seconds(Seconds(registry, "millrace_router_queue_seconds")),
      decision_seconds(HistogramFamily(registry, "millrace_router_decision_seconds").Add({}, DecisionBuckets())),
      reserve_seconds(HistogramFamily(registry, "millrace_handoff_phase_seconds")
                          .Add({{"role", "router"}, {"phase", "reserve"}}, PhaseBuckets())),
      prefill_seconds(Seconds(registry, "millrace_router_prefill_seconds")),
      generation_seconds(
          HistogramFamily(registry, "millrace_router_generation_seconds").Add({}, RequestDurationBuckets())),
      requeues(Counter(registry, "millrace_router_requeues_total")),
      tokens(Counter(registry, "millrace_router_tokens_total")),
      tokens_repeated(Counter(registry, "millrace_router_tokens_repeated_total")),
      aborts_unanswered(Counter(registry, "millrace_router_aborts_unanswered_total")),
      worker_deaths(Counter(registry, "millrace_router_worker_deaths_total")),
      generations_queued_(Gauge(registry, "millrace_router_generations_queued")),
      worker_joins_(Counter(registry, "millrace_router_worker_joins_total")) {}

void FlowMetrics::CountEnd(std::string_view outcome) { ends_.Add({{"outcome", std::string(outcome)}}).Increment(); }

void FlowMetrics::CountRefusal(std::string_view code) { refusals_.Add({{"code", std::string(code)}}).Increment(); }

void FlowMetrics::CountHandoff(int64_t bytes, int64_t resent_extents, double seconds) {
  handoff_bytes_.Increment(static_cast<double>(bytes));
  handoff_resent_.Increment(static_cast<double>(resent_extents));
  handoff_seconds_.Observe(seconds);
}

void FlowMetrics::SetQueued(size_t queued, bool for_workers) {
  generations_queued_.Set(static_cast<double>(queued));
  waiting_capacity_.Set(for_workers ? 0 : static_cast<double>(queued));
  waiting_workers_.Set(for_workers ? static_cast<double>(queued) : 0);
}

void FlowMetrics::SetJoins(int64_t joins) { RaiseTo(worker_joins_, static_cast<double>(joins)); }

void FlowMetrics::SetWorkers(const ClusterSnapshot& snapshot, std::chrono::steady_clock::time_point now) {
  // Every combination is set each time, so that a state nobody is in reads 0 instead of its last value.
  std::map<std::pair<std::string_view, std::string_view>, int> counts;
  for (std::string_view role : {"prefill", "decode", "expert"}) {
    for (std::string_view state : {"loading", "waiting", "ready", "draining", "suspect"}) counts[{role, state}] = 0;
  }
  for (const WorkerView& worker : snapshot.workers) {
    std::string_view state = "loading";
    if (now - worker.last_heard > snapshot.suspect_after) {
      state = "suspect";
    } else if (worker.status.state() == v1::WORKER_STATE_DRAINING) {
      state = "draining";
    } else if (worker.status.state() == v1::WORKER_STATE_WAITING) {
      state = "waiting";
    } else if (worker.Serving()) {
      state = "ready";
    }
    ++counts[{RoleWord(worker.role), state}];
  }
  for (const auto& [labels, count] : counts) {
    workers_.Add({{"role", std::string(labels.first)}, {"state", std::string(labels.second)}}).Set(count);
  }
  for (const v1::Role role : {v1::ROLE_PREFILL, v1::ROLE_DECODE}) {
    double total = 0, free = 0;
    for (const WorkerView& worker : snapshot.workers) {
      if (worker.role != role || !worker.Serving()) continue;
      total += static_cast<double>(worker.serves.capacity().pages_total());
      free += static_cast<double>(worker.status.pages_free());
    }
    const std::string word(RoleWord(role));
    cache_pages_.Add({{"role", word}, {"state", "free"}}).Set(free);
    cache_pages_.Add({{"role", word}, {"state", "owned"}}).Set(total - free);
  }
}

}  // namespace millrace::router
