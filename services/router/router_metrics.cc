// SPDX-License-Identifier: Apache-2.0
// Names and buckets of the router's metrics.
#include "services/router/router_metrics.h"

#include <array>
#include <map>
#include <string>
#include <utility>

namespace millrace::router {
namespace {

prometheus::Counter& Counter(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add({});
}
prometheus::Gauge& Gauge(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
}
// Phases last from under a millisecond on a demo to minutes on a full queue.
prometheus::Histogram& Seconds(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(
      {}, prometheus::Histogram::BucketBoundaries{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 60,
                                                  150});
}

std::string_view RoleWord(v1::Role role) {
  return role == v1::ROLE_PREFILL ? "prefill" : role == v1::ROLE_DECODE ? "decode" : "expert";
}

}  // namespace

FlowMetrics::FlowMetrics(prometheus::Registry& registry)
    : ends_(prometheus::BuildCounter()
                .Name("millrace_router_generations_total")
                .Help("Generations ended, by how")
                .Register(registry)),
      refusals_(prometheus::BuildCounter()
                    .Name("millrace_router_refusals_total")
                    .Help("Generations refused before anything was asked of a worker, by code")
                    .Register(registry)),
      workers_(prometheus::BuildGauge()
                   .Name("millrace_router_workers")
                   .Help("Workers whose Join stream is open, by role and state")
                   .Register(registry)),
      handoff_bytes_(Counter(registry, "millrace_router_handoff_bytes_total", "Bytes of state handed from P to D")),
      handoff_resent_(
          Counter(registry, "millrace_router_handoff_resent_extents_total", "Extents sent again to repair a hand-off")),
      handoff_seconds_(Seconds(registry, "millrace_router_handoff_seconds", "First token to verified state")),
      generations_open(Gauge(registry, "millrace_router_generations_open", "Generations not yet ended")),
      generations_queued(Gauge(registry, "millrace_router_generations_queued", "Generations waiting for a place")),
      attempts_open(
          Gauge(registry, "millrace_router_attempts_open", "Attempts not yet confirmed gone at both of their workers")),
      queue_seconds(Seconds(registry, "millrace_router_queue_seconds", "Acceptance to placement")),
      prefill_seconds(Seconds(registry, "millrace_router_prefill_seconds", "Placement to first token")),
      requeues(Counter(registry, "millrace_router_requeues_total", "Placements that a worker refused after all")),
      tokens(Counter(registry, "millrace_router_tokens_total", "Tokens forwarded to fronts")),
      tokens_repeated(Counter(registry, "millrace_router_tokens_repeated_total", "Tokens dropped as forwarded before")),
      aborts_unanswered(
          Counter(registry, "millrace_router_aborts_unanswered_total", "Aborts given up without an answer")),
      worker_joins(Counter(registry, "millrace_router_worker_joins_total", "Workers that joined")),
      worker_deaths(Counter(registry, "millrace_router_worker_deaths_total", "Workers that left or fell silent")) {}

void FlowMetrics::CountEnd(std::string_view outcome) { ends_.Add({{"outcome", std::string(outcome)}}).Increment(); }

void FlowMetrics::CountRefusal(std::string_view code) { refusals_.Add({{"code", std::string(code)}}).Increment(); }

void FlowMetrics::CountHandoff(int64_t bytes, int64_t resent_extents, double seconds) {
  handoff_bytes_.Increment(static_cast<double>(bytes));
  handoff_resent_.Increment(static_cast<double>(resent_extents));
  handoff_seconds_.Observe(seconds);
}

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
}

}  // namespace millrace::router
