// SPDX-License-Identifier: Apache-2.0
// See metric_catalogue.h. By subject, in the order of a request's life.
#include "services/common/metric_catalogue.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace millrace {
namespace {

constexpr auto kC = MetricType::kCounter;
constexpr auto kG = MetricType::kGauge;
constexpr auto kH = MetricType::kHistogram;

constexpr MetricDescription kCatalogue[] = {
    // Process.
    {"millrace_build_info", kG, "1", "compiler transports version", "all", "What was built; always 1."},
    {"millrace_model_info", kG, "1", "compat_hash device kernel_set model numerics role", "all",
     "What is served; always 1. Workers of one model agree on compat_hash; the router has none."},
    {"process_cpu_seconds_total", kC, "seconds", "", "all", "Processor time, user and system."},
    {"process_resident_memory_bytes", kG, "bytes", "", "all", "Resident memory, mapped checkpoint pages included."},
    {"process_virtual_memory_bytes", kG, "bytes", "", "all", "Address space."},
    {"process_open_fds", kG, "files", "", "all", "Open file descriptors."},
    {"process_max_fds", kG, "files", "", "all", "Most file descriptors that may be open."},
    {"process_threads", kG, "threads", "", "all", "Threads."},
    {"process_start_time_seconds", kG, "seconds", "", "all", "Start of the process, since the Unix epoch."},
    {"millrace_device_memory_bytes", kG, "bytes", "role state worker", "worker",
     "Memory of the card, free and used by anybody; only where the worker computes on one. As of the last heartbeat."},
    // Requests, as clients see them.
    {"millrace_http_requests_total", kC, "requests", "code route", "router",
     "HTTP requests answered, by route and status (499: the client left first)."},
    {"millrace_http_connections", kG, "connections", "", "router", "Open HTTP connections."},
    {"millrace_http_connections_refused_total", kC, "connections", "reason", "router",
     "Connections closed at accept, by reason."},
    {"millrace_request_duration_seconds", kH, "seconds", "code model", "router",
     "HTTP generation requests from the last byte of the request to the last byte queued."},
    {"millrace_time_to_first_token_seconds", kH, "seconds", "model", "router",
     "From the last byte of a request to its first token."},
    {"millrace_inter_token_seconds", kH, "seconds", "model", "router",
     "Between two tokens of one choice, as they reach the router."},
    {"millrace_time_per_output_token_seconds", kH, "seconds", "model", "router",
     "Of a choice: its first token to its last, divided by the tokens after the first."},
    {"millrace_prompt_tokens", kH, "tokens", "model", "router", "Prompt length."},
    {"millrace_generation_tokens", kH, "tokens", "model", "router", "Tokens generated per choice."},
    {"millrace_prompt_tokens_total", kC, "tokens", "model", "router", "Prompt tokens accepted."},
    {"millrace_generation_tokens_total", kC, "tokens", "model", "router", "Tokens generated."},
    {"millrace_requests_running", kG, "requests", "role", "router", "Generation requests in flight."},
    {"millrace_requests_waiting", kG, "requests", "role", "router",
     "Generation requests in flight without a first token."},
    {"millrace_slow_consumers_total", kC, "requests", "", "router",
     "Streams ended because the client read too slowly."},
    {"millrace_unreadable_tool_calls_total", kC, "calls", "", "router",
     "Tool calls the model wrote that could not be parsed and were dropped."},
    // The router's flow.
    {"millrace_router_generations_open", kG, "generations", "", "router", "Generations not yet ended."},
    {"millrace_router_generations_queued", kG, "generations", "", "router", "Generations waiting for a place."},
    {"millrace_router_generations_total", kC, "generations", "outcome", "router", "Generations ended, by how."},
    {"millrace_router_generation_seconds", kH, "seconds", "", "router",
     "Generations that ended well, through any front: acceptance to last token."},
    {"millrace_router_refusals_total", kC, "requests", "code", "router",
     "Requests refused before anything was asked of a worker, by code: by the flow, and 429s of the HTTP front."},
    {"millrace_router_attempts_open", kG, "attempts", "", "router",
     "Attempts not yet confirmed gone at both of their workers."},
    {"millrace_router_queue_seconds", kH, "seconds", "", "router", "Acceptance to placement."},
    {"millrace_router_decision_seconds", kH, "seconds", "", "router", "One decision of placement, found or not."},
    {"millrace_router_prefill_seconds", kH, "seconds", "", "router", "Placement to first token."},
    {"millrace_router_requeues_total", kC, "placements", "", "router", "Placements that a worker refused after all."},
    {"millrace_router_tokens_total", kC, "tokens", "", "router", "Tokens forwarded to fronts."},
    {"millrace_router_tokens_repeated_total", kC, "tokens", "", "router", "Tokens dropped as forwarded before."},
    {"millrace_router_handoff_seconds", kH, "seconds", "", "router", "First token to verified state."},
    {"millrace_router_handoff_bytes_total", kC, "bytes", "", "router", "Bytes of state handed from prefill to decode."},
    {"millrace_router_handoff_resent_extents_total", kC, "extents", "", "router",
     "Extents sent again to repair a hand-off."},
    {"millrace_router_aborts_unanswered_total", kC, "aborts", "", "router", "Aborts given up without an answer."},
    {"millrace_router_workers", kG, "workers", "role state", "router",
     "Workers whose Join stream is open, by role and state."},
    {"millrace_router_worker_joins_total", kC, "workers", "", "router", "Workers that joined."},
    {"millrace_router_worker_deaths_total", kC, "workers", "", "router", "Workers that left or fell silent."},
    {"millrace_router_cache_pages", kG, "pages", "role state", "router",
     "Cache pages of all serving workers of a role, as they last said: the cluster's room in one place."},
    // Queues.
    {"millrace_queue_requests", kG, "requests", "reason role stage worker", "all",
     "Requests that wait, by where and for what. Stage placement (router): capacity, workers. Stage prefill: pages, "
     "slots, turn. Stage handoff (prefill): decode. Stage decode: handoff, stream, reader, batch. Stage expert: turn. "
     "The router has no worker label."},
    // Workers.
    {"millrace_worker_queued", kG, "requests", "role worker", "worker", "Requests accepted and not started."},
    {"millrace_worker_running", kG, "sequences", "role worker", "worker",
     "Sequences that a pass may move; at an expert worker the message being computed."},
    {"millrace_worker_requests_total", kC, "requests", "code role worker", "worker",
     "What ended at a worker, by status: requests (prefill), leases (decode), messages (expert)."},
    {"millrace_worker_rejected_total", kC, "requests", "reason role worker", "worker",
     "Refused before any work, by reason."},
    {"millrace_worker_queue_seconds", kH, "seconds", "role worker", "prefill", "From acceptance to the first pass."},
    {"millrace_worker_tokens_total", kC, "tokens", "role worker", "worker",
     "Prompt tokens computed (prefill), tokens drawn (decode), rows times experts (expert)."},
    {"millrace_engine_steps_total", kC, "passes", "role worker", "worker", "Passes through the model."},
    {"millrace_engine_step_seconds", kH, "seconds", "role worker", "worker", "Duration of one pass."},
    {"millrace_engine_step_rows", kH, "rows", "role worker", "worker", "Rows of one pass."},
    {"millrace_cache_pages", kG, "pages", "role state worker", "prefill decode", "Cache pages by state: free, owned."},
    {"millrace_state_slots", kG, "slots", "role state worker", "prefill decode", "State slots by state: free, owned."},
    {"millrace_load_bytes", kG, "bytes", "role worker", "worker", "Weight bytes prepared."},
    {"millrace_load_target_bytes", kG, "bytes", "role worker", "worker", "Weight bytes to prepare."},
    // Leases and hand-offs.
    {"millrace_leases", kG, "leases", "role state worker", "decode",
     "Leases by state: receiving, committed, running, ending."},
    {"millrace_leases_granted_total", kC, "leases", "role worker", "decode", "Leases granted."},
    // The epochs themselves are secrets: who knows one may write into its lease.
    {"millrace_lease_epoch_mismatches_total", kC, "calls", "role worker", "decode",
     "Calls that named a live lease with another epoch than its own: of an attempt that has been replaced. Extents of "
     "such are millrace_transfer_rejected_extents_total, reason stale_epoch."},
    {"millrace_handoffs_in_flight", kG, "requests", "phase role worker", "prefill",
     "Prompts whose state is leaving: phase stream (while it is computed), tail, commit."},
    {"millrace_handoff_seconds", kH, "seconds", "role worker", "prefill",
     "From the first token to the verified hand-off."},
    {"millrace_handoff_phase_seconds", kH, "seconds", "phase role worker", "router prefill decode",
     "A hand-off's phases. reserve (router): the call that takes a lease. stream (prefill): first extent sent to first "
     "token. tail: the rest, until the wire has taken it. commit: the call with its proof, repairs apart. verify "
     "(decode): manifest in hand to state accepted. The router has no worker label."},
    {"millrace_transfer_bytes_total", kC, "bytes", "role worker", "prefill decode", "Bytes of verified hand-offs."},
    {"millrace_transfer_failures_total", kC, "requests", "reason role worker", "prefill",
     "Hand-offs that failed, by reason."},
    {"millrace_transfer_repairs_total", kC, "repairs", "role worker", "prefill",
     "Times a decode worker asked for extents again."},
    {"millrace_transfer_resent_extents_total", kC, "extents", "role worker", "prefill",
     "Extents sent again after a failed proof."},
    {"millrace_transfer_rejected_extents_total", kC, "extents", "reason role worker", "decode",
     "Extents that arrived and were not taken, by reason. As of the last heartbeat."},
    {"millrace_transport_messages_total", kC, "messages", "direction role worker", "worker",
     "Messages the transport has sent and received. As of the last heartbeat, like all of millrace_transport_."},
    {"millrace_transport_bytes_total", kC, "bytes", "direction role worker", "worker", "Their payloads."},
    {"millrace_transport_messages_in_flight", kG, "messages", "role worker", "worker",
     "Sends given to the wire and not completed."},
    {"millrace_transport_bytes_in_flight", kG, "bytes", "role worker", "worker", "Their payloads."},
    {"millrace_transport_messages_queued", kG, "messages", "role worker", "worker", "Sends that wait for room."},
    {"millrace_transport_peers", kG, "peers", "role worker", "worker", "Connections that are open."},
    {"millrace_transport_peers_failed_total", kC, "peers", "role worker", "worker",
     "Connections that ended other than by our own word."},
    {"millrace_transport_errors_total", kC, "messages", "code role worker", "worker",
     "Sends and arrivals that failed, by status."},
    {"millrace_transport_drops_total", kC, "messages", "reason role worker", "worker",
     "Messages dropped on arrival, by reason."},
    // Experts.
    {"millrace_expert_tokens_total", kC, "tokens", "expert role worker", "expert",
     "Rows computed by each expert of this member, all layers together."},
    {"millrace_expert_wave_messages_total", kC, "messages", "role wave worker", "expert",
     "Requests computed, by the wave they belong to."},
    {"millrace_expert_exchange_batches_total", kC, "batches", "role worker", "prefill decode",
     "Layers whose rows went to the pool. As of the last heartbeat, like all of millrace_expert_exchange_."},
    {"millrace_expert_exchange_failed_batches_total", kC, "batches", "role worker", "prefill decode",
     "Those that failed: a member lost or late."},
    {"millrace_expert_exchange_messages_total", kC, "messages", "role worker", "prefill decode",
     "Messages to members; several waves and members make several of one batch."},
    {"millrace_expert_exchange_dropped_replies_total", kC, "messages", "role worker", "prefill decode",
     "Replies that came late, twice or for another batch."},
    {"millrace_expert_exchange_bytes_total", kC, "bytes", "direction role worker", "prefill decode",
     "Payloads to and from members."},
    {"millrace_expert_exchange_wait_seconds_total", kC, "seconds", "role worker", "prefill decode",
     "Time that passes stood still for the pool's rows."},
    // Traces.
    {"millrace_trace_spans_total", kC, "spans", "outcome", "all",
     "Spans of sampled requests: exported, dropped (the queue was full), failed (the collector refused or was away)."},
    // Kept free for what is to come, so that it need not be renamed then.
    {"millrace_prefix_cache_queried_tokens_total", kC, "tokens", "role worker", "reserved",
     "Prompt tokens that were looked up in the prefix cache."},
    {"millrace_prefix_cache_hit_tokens_total", kC, "tokens", "role worker", "reserved",
     "Prompt tokens that were found and not computed again."},
    {"millrace_prefix_cache_pages", kG, "pages", "role state worker", "reserved",
     "Pages of the prefix cache by state."},
    {"millrace_spec_drafted_tokens_total", kC, "tokens", "role worker", "reserved", "Tokens drafted by speculation."},
    {"millrace_spec_accepted_tokens_total", kC, "tokens", "role worker", "reserved", "Drafted tokens that stood."},
    {"millrace_migrations_total", kC, "requests", "outcome role", "reserved",
     "Running requests moved to another worker, by how that ended."},
    {"millrace_migration_seconds", kH, "seconds", "role", "reserved", "Decision to move until the next token."},
};

template <typename Builder>
auto& Family(Builder builder, const MetricDescription& metric, prometheus::Registry& registry) {
  return builder.Name(metric.name).Help(metric.help).Register(registry);
}

}  // namespace

absl::Span<const MetricDescription> MetricCatalogue() { return kCatalogue; }

const MetricDescription& DescribeMetric(std::string_view name, MetricType type) {
  for (const MetricDescription& metric : kCatalogue) {
    if (name == metric.name && type == metric.type) return metric;
  }
  CHECK(false, absl::StrCat("metric ", std::string(name), " is not in the catalogue, or there as another type"));
  return kCatalogue[0];
}

prometheus::Family<prometheus::Counter>& CounterFamily(prometheus::Registry& registry, std::string_view name) {
  return Family(prometheus::BuildCounter(), DescribeMetric(name, kC), registry);
}
prometheus::Family<prometheus::Gauge>& GaugeFamily(prometheus::Registry& registry, std::string_view name) {
  return Family(prometheus::BuildGauge(), DescribeMetric(name, kG), registry);
}
prometheus::Family<prometheus::Histogram>& HistogramFamily(prometheus::Registry& registry, std::string_view name) {
  return Family(prometheus::BuildHistogram(), DescribeMetric(name, kH), registry);
}

}  // namespace millrace
