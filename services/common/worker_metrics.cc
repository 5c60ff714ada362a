// SPDX-License-Identifier: Apache-2.0
// See worker_metrics.h.
#include "services/common/worker_metrics.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/metrics.h"
#include "services/common/role.h"

namespace millrace {
namespace {

// Seconds: a CPU decode step of the demo takes 1 ms, a prefill pass of a large model up to seconds.
const prometheus::Histogram::BucketBoundaries kStepSeconds{.0002, .0005, .001, .002, .005, .01, .02,
                                                           .05,   .1,    .2,   .5,   1,    2,   5};

struct Wait {
  v1::Role role;
  WaitReason reason;
  const char* stage;
  const char* word;
};
constexpr Wait kWaits[] = {
    {v1::ROLE_PREFILL, WaitReason::kPages, "prefill", "pages"},
    {v1::ROLE_PREFILL, WaitReason::kSlots, "prefill", "slots"},
    {v1::ROLE_PREFILL, WaitReason::kTurn, "prefill", "turn"},
    {v1::ROLE_PREFILL, WaitReason::kDecode, "handoff", "decode"},
    {v1::ROLE_DECODE, WaitReason::kHandoff, "decode", "handoff"},
    {v1::ROLE_DECODE, WaitReason::kStream, "decode", "stream"},
    {v1::ROLE_DECODE, WaitReason::kReader, "decode", "reader"},
    {v1::ROLE_DECODE, WaitReason::kBatch, "decode", "batch"},
    {v1::ROLE_EXPERT, WaitReason::kTurn, "expert", "turn"},
};

}  // namespace

WorkerMetrics::WorkerMetrics(prometheus::Registry& registry, v1::Role role, const std::string& name)
    : registry_(registry),
      role_(role),
      labels_{{"role", RoleWord(role)}, {"worker", name}},
      outcomes_(CounterFamily(registry, "millrace_worker_requests_total")),
      rejected_(CounterFamily(registry, "millrace_worker_rejected_total")),
      tokens_(CounterFamily(registry, "millrace_worker_tokens_total").Add(labels_)),
      steps_(CounterFamily(registry, "millrace_engine_steps_total").Add(labels_)),
      step_seconds_(HistogramFamily(registry, "millrace_engine_step_seconds").Add(labels_, kStepSeconds)),
      step_rows_(HistogramFamily(registry, "millrace_engine_step_rows").Add(labels_, TokenCountBuckets())),
      queued_(GaugeFamily(registry, "millrace_worker_queued").Add(labels_)),
      running_(GaugeFamily(registry, "millrace_worker_running").Add(labels_)),
      load_done_(GaugeFamily(registry, "millrace_load_bytes").Add(labels_)),
      load_total_(GaugeFamily(registry, "millrace_load_target_bytes").Add(labels_)) {
  for (const Wait& wait : kWaits) {
    if (wait.role != role) continue;
    Labels labels = With("stage", wait.stage);
    labels["reason"] = wait.word;
    waiting_[wait.reason] = &GaugeFamily(registry, "millrace_queue_requests").Add(labels);
  }
  if (role == v1::ROLE_EXPERT) {
    expert_tokens_ = &CounterFamily(registry, "millrace_expert_tokens_total");
    waves_ = &CounterFamily(registry, "millrace_expert_wave_messages_total");
    return;
  }
  pages_free_ = &Gauge("millrace_cache_pages", "state", "free");
  pages_owned_ = &Gauge("millrace_cache_pages", "state", "owned");
  slots_free_ = &Gauge("millrace_state_slots", "state", "free");
  slots_owned_ = &Gauge("millrace_state_slots", "state", "owned");
  transfer_bytes_ = &CounterFamily(registry, "millrace_transfer_bytes_total").Add(labels_);
  handoff_phases_ = &HistogramFamily(registry, "millrace_handoff_phase_seconds");
  const auto phase = [&](const char* word) { handoff_phases_->Add(With("phase", word), PhaseBuckets()); };
  if (role == v1::ROLE_DECODE) {
    phase("verify");
    leases_granted_ = &CounterFamily(registry, "millrace_leases_granted_total").Add(labels_);
    epoch_mismatches_ = &CounterFamily(registry, "millrace_lease_epoch_mismatches_total").Add(labels_);
    SetLeases({});
    return;
  }
  for (const char* word : {"stream", "tail", "commit"}) phase(word);
  transfer_failures_ = &CounterFamily(registry, "millrace_transfer_failures_total");
  repairs_ = &CounterFamily(registry, "millrace_transfer_repairs_total").Add(labels_);
  resent_ = &CounterFamily(registry, "millrace_transfer_resent_extents_total").Add(labels_);
  handoff_ = &HistogramFamily(registry, "millrace_handoff_seconds").Add(labels_, TimeToFirstTokenBuckets());
  queue_ = &HistogramFamily(registry, "millrace_worker_queue_seconds").Add(labels_, TimeToFirstTokenBuckets());
  SetHandoffsInFlight(0, 0, 0);
}

WorkerMetrics::Labels WorkerMetrics::With(const char* key, std::string value) const {
  Labels more = labels_;
  more[key] = std::move(value);
  return more;
}

prometheus::Gauge& WorkerMetrics::Gauge(const char* name, const char* key, const char* value) {
  return GaugeFamily(registry_, name).Add(With(key, value));
}

void WorkerMetrics::CountOutcome(absl::StatusCode code) {
  outcomes_.Add(With("code", absl::StatusCodeToString(code))).Increment();
}

void WorkerMetrics::CountRejected(std::string_view reason) {
  rejected_.Add(With("reason", std::string(reason))).Increment();
}

void WorkerMetrics::CountResent(uint64_t extents) {
  repairs_->Increment();
  resent_->Increment(static_cast<double>(extents));
}

void WorkerMetrics::CountTransferFailure(std::string_view reason) {
  transfer_failures_->Add(With("reason", std::string(reason))).Increment();
}

void WorkerMetrics::CountExpert(int expert, int64_t rows) {
  expert_tokens_->Add(With("expert", absl::StrCat(expert))).Increment(static_cast<double>(rows));
}

void WorkerMetrics::CountWave(uint32_t wave) { waves_->Add(With("wave", absl::StrCat(wave))).Increment(); }

void WorkerMetrics::ObserveStep(double seconds, int64_t rows) {
  steps_.Increment();
  step_seconds_.Observe(seconds);
  step_rows_.Observe(static_cast<double>(rows));
}

void WorkerMetrics::ObserveHandoffPhase(std::string_view phase, double seconds) {
  handoff_phases_->Add(With("phase", std::string(phase)), PhaseBuckets()).Observe(seconds);
}

void WorkerMetrics::SetWaiting(const std::array<int, kWaitReasons>& by_reason) {
  for (const auto& [reason, gauge] : waiting_) gauge->Set(by_reason[static_cast<size_t>(reason)]);
}

void WorkerMetrics::SetLeases(const LeaseCounts& leases) {
  Gauge("millrace_leases", "state", "receiving").Set(leases.receiving);
  Gauge("millrace_leases", "state", "committed").Set(leases.committed);
  Gauge("millrace_leases", "state", "running").Set(leases.running);
  Gauge("millrace_leases", "state", "ending").Set(leases.ending);
}

void WorkerMetrics::SetHandoffsInFlight(int stream, int tail, int commit) {
  Gauge("millrace_handoffs_in_flight", "phase", "stream").Set(stream);
  Gauge("millrace_handoffs_in_flight", "phase", "tail").Set(tail);
  Gauge("millrace_handoffs_in_flight", "phase", "commit").Set(commit);
}

void WorkerMetrics::SetPages(int64_t free, int64_t owned) {
  pages_free_->Set(static_cast<double>(free));
  pages_owned_->Set(static_cast<double>(owned));
}

void WorkerMetrics::SetSlots(int64_t free, int64_t total) {
  slots_free_->Set(static_cast<double>(free));
  slots_owned_->Set(static_cast<double>(total - free));
}

void WorkerMetrics::SetLoad(int64_t done, int64_t total) {
  load_done_.Set(static_cast<double>(done));
  load_total_.Set(static_cast<double>(total));
}

void WorkerMetrics::SetDeviceMemory(int64_t free, int64_t total) {
  Gauge("millrace_device_memory_bytes", "state", "free").Set(static_cast<double>(free));
  Gauge("millrace_device_memory_bytes", "state", "used").Set(static_cast<double>(total - free));
}

void WorkerMetrics::SetTransport(const kvtransfer::TransportStatistics& statistics) {
  const auto raise = [&](const char* name, const Labels& labels, uint64_t total) {
    RaiseTo(CounterFamily(registry_, name).Add(labels), static_cast<double>(total));
  };
  const auto set = [&](const char* name, uint64_t value) {
    GaugeFamily(registry_, name).Add(labels_).Set(static_cast<double>(value));
  };
  raise("millrace_transport_messages_total", With("direction", "sent"), statistics.messages_sent);
  raise("millrace_transport_messages_total", With("direction", "received"), statistics.messages_received);
  raise("millrace_transport_bytes_total", With("direction", "sent"), statistics.bytes_sent);
  raise("millrace_transport_bytes_total", With("direction", "received"), statistics.bytes_received);
  set("millrace_transport_messages_in_flight", statistics.messages_in_flight);
  set("millrace_transport_bytes_in_flight", statistics.bytes_in_flight);
  set("millrace_transport_messages_queued", statistics.messages_queued);
  set("millrace_transport_peers", statistics.peers_connected);
  raise("millrace_transport_peers_failed_total", labels_, statistics.peers_failed);
  for (const auto& [code, count] : statistics.errors)
    raise("millrace_transport_errors_total", With("code", code), count);
  for (const auto& [reason, count] : statistics.drops) {
    raise("millrace_transport_drops_total", With("reason", reason), count);
  }
}

void WorkerMetrics::SetReceiver(const kvtransfer::ReceiverStatistics& statistics) {
  for (const auto& [reason, count] : statistics.rejected) {
    RaiseTo(CounterFamily(registry_, "millrace_transfer_rejected_extents_total").Add(With("reason", reason)),
            static_cast<double>(count));
  }
}

void WorkerMetrics::SetExchange(const Exchange& exchange) {
  const auto raise = [&](const char* name, const Labels& labels, double total) {
    RaiseTo(CounterFamily(registry_, name).Add(labels), total);
  };
  raise("millrace_expert_exchange_batches_total", labels_, static_cast<double>(exchange.batches));
  raise("millrace_expert_exchange_failed_batches_total", labels_, static_cast<double>(exchange.failed_batches));
  raise("millrace_expert_exchange_messages_total", labels_, static_cast<double>(exchange.messages));
  raise("millrace_expert_exchange_dropped_replies_total", labels_, static_cast<double>(exchange.dropped_replies));
  raise("millrace_expert_exchange_bytes_total", With("direction", "sent"), static_cast<double>(exchange.bytes_sent));
  raise("millrace_expert_exchange_bytes_total", With("direction", "received"),
        static_cast<double>(exchange.bytes_received));
  raise("millrace_expert_exchange_wait_seconds_total", labels_, exchange.wait_seconds);
}

}  // namespace millrace
