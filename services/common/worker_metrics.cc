// SPDX-License-Identifier: Apache-2.0
// See worker_metrics.h.
#include "services/common/worker_metrics.h"

#include "services/common/metrics.h"

namespace millrace {
namespace {

using Labels = std::map<std::string, std::string>;

auto& Counters(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}
auto& Gauges(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
}
auto& Histograms(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
}

Labels With(const Labels& labels, const char* key, std::string value) {
  Labels more = labels;
  more[key] = std::move(value);
  return more;
}

// Seconds: a CPU decode step of the demo takes 1 ms, a prefill pass of a large model up to seconds.
const prometheus::Histogram::BucketBoundaries kStepSeconds{.0002, .0005, .001, .002, .005, .01, .02,
                                                           .05,   .1,    .2,   .5,   1,    2,   5};

}  // namespace

WorkerMetrics::WorkerMetrics(prometheus::Registry& registry, const std::string& role, const std::string& name)
    : labels_{{"role", role}, {"worker", name}},
      outcomes_(
          Counters(registry, "millrace_worker_requests_total", "Requests that ended at a worker, by status code.")),
      rejected_(Counters(registry, "millrace_worker_rejected_total", "Requests refused before any work, by reason.")),
      transfer_failures_(Counters(registry, "millrace_transfer_failures_total", "Hand-offs that failed, by reason.")),
      pages_free_(
          Gauges(registry, "millrace_cache_pages", "Cache pages by state.").Add(With(labels_, "state", "free"))),
      pages_owned_(
          Gauges(registry, "millrace_cache_pages", "Cache pages by state.").Add(With(labels_, "state", "owned"))),
      slots_free_(
          Gauges(registry, "millrace_state_slots", "State slots by state.").Add(With(labels_, "state", "free"))),
      slots_owned_(
          Gauges(registry, "millrace_state_slots", "State slots by state.").Add(With(labels_, "state", "owned"))),
      resent_(Counters(registry, "millrace_transfer_resent_extents_total", "Extents sent again after a failed proof.")
                  .Add(labels_)),
      transfer_bytes_(Counters(registry, "millrace_transfer_bytes_total", "Bytes of verified hand-offs.").Add(labels_)),
      tokens_(Counters(registry, "millrace_worker_tokens_total",
                       "Prompt tokens computed (prefill), tokens drawn (decode), rows times experts (expert).")
                  .Add(labels_)),
      steps_(Counters(registry, "millrace_engine_steps_total", "Passes through the model.").Add(labels_)),
      step_seconds_(
          Histograms(registry, "millrace_engine_step_seconds", "Duration of one pass.").Add(labels_, kStepSeconds)),
      step_rows_(
          Histograms(registry, "millrace_engine_step_rows", "Rows of one pass.").Add(labels_, TokenCountBuckets())),
      handoff_(Histograms(registry, "millrace_handoff_seconds", "From the first token to the verified hand-off.")
                   .Add(labels_, TimeToFirstTokenBuckets())),
      queue_(Histograms(registry, "millrace_worker_queue_seconds", "From acceptance to the first pass.")
                 .Add(labels_, TimeToFirstTokenBuckets())),
      queued_(Gauges(registry, "millrace_worker_queued", "Requests accepted and not started.").Add(labels_)),
      running_(Gauges(registry, "millrace_worker_running", "Sequences that a pass may move.").Add(labels_)),
      load_done_(Gauges(registry, "millrace_load_bytes", "Weight bytes prepared.").Add(labels_)),
      load_total_(Gauges(registry, "millrace_load_bytes_total", "Weight bytes to prepare.").Add(labels_)) {}

void WorkerMetrics::CountOutcome(absl::StatusCode code) {
  outcomes_.Add(With(labels_, "code", absl::StatusCodeToString(code))).Increment();
}

void WorkerMetrics::CountRejected(std::string_view reason) {
  rejected_.Add(With(labels_, "reason", std::string(reason))).Increment();
}

void WorkerMetrics::CountTransferFailure(std::string_view reason) {
  transfer_failures_.Add(With(labels_, "reason", std::string(reason))).Increment();
}

void WorkerMetrics::ObserveStep(double seconds, int64_t rows) {
  steps_.Increment();
  step_seconds_.Observe(seconds);
  step_rows_.Observe(static_cast<double>(rows));
}

void WorkerMetrics::SetPages(int64_t free, int64_t owned) {
  pages_free_.Set(static_cast<double>(free));
  pages_owned_.Set(static_cast<double>(owned));
}

void WorkerMetrics::SetSlots(int64_t free, int64_t total) {
  slots_free_.Set(static_cast<double>(free));
  slots_owned_.Set(static_cast<double>(total - free));
}

void WorkerMetrics::SetLoad(int64_t done, int64_t total) {
  load_done_.Set(static_cast<double>(done));
  load_total_.Set(static_cast<double>(total));
}

}  // namespace millrace
