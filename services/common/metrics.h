// SPDX-License-Identifier: Apache-2.0
// Buckets, the text format, and what the HTTP front counts; one registry per process, owned by its main. Names and
// meanings are metric_catalogue.h; what a worker counts is worker_metrics.h, what the router's flow counts
// router/router_metrics.h.
//
// Prometheus' types are thread-safe, and so is everything here.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <string>
#include <string_view>
#include <vector>

#include "services/common/metric_catalogue.h"

namespace millrace {

// Seconds. Denser where users feel the difference: inter-token below 50 ms.
prometheus::Histogram::BucketBoundaries RequestDurationBuckets();
prometheus::Histogram::BucketBoundaries TimeToFirstTokenBuckets();
prometheus::Histogram::BucketBoundaries InterTokenBuckets();
// Tokens: 1-2-5 up to a million.
prometheus::Histogram::BucketBoundaries TokenCountBuckets();
// Parts of a request inside the cluster: from a tenth of a millisecond on a demo to minutes on a full queue.
prometheus::Histogram::BucketBoundaries PhaseBuckets();
// Decisions of microseconds.
prometheus::Histogram::BucketBoundaries DecisionBuckets();

// Raises a counter to a total that something else has counted; a total that is lower changes nothing.
inline void RaiseTo(prometheus::Counter& counter, double total) {
  if (const double value = counter.Value(); total > value) counter.Increment(total - value);
}

extern const char* const kVersion;  // of this program

// What every process says of itself beside process_*. Once, at start.
void SetBuildInfo(prometheus::Registry& registry);
struct ModelInfo {
  std::string role, model, device, numerics, kernel_set, compat_hash;  // empty: not applicable
};
void SetModelInfo(prometheus::Registry& registry, const ModelInfo& info);

// The registry and process_* in Prometheus' text format, version 0.0.4. `compatibility` are sets of names of other
// servers that are added (metric_aliases.h).
std::string RenderMetrics(const prometheus::Registry& registry, const std::vector<std::string>& compatibility = {});
inline constexpr std::string_view kMetricsContentType = "text/plain; version=0.0.4; charset=utf-8";

// What the HTTP front counts.
class HttpMetrics {
 public:
  // The registry must outlive this object. `model` labels the latency histograms.
  HttpMetrics(prometheus::Registry& registry, const std::string& model);

  // One answered request. `route` is one of the server's own route names ("unmatched" for others), `code` the HTTP
  // status, or 499 for a client that left.
  void CountRequest(std::string_view route, int code);
  void CountConnectionRefused(std::string_view reason);
  void CountSlowConsumer() { slow_consumers_.Increment(); }
  void ObserveDuration(int code, double seconds);
  void ObserveTimeToFirstToken(double seconds) { time_to_first_token_.Observe(seconds); }
  void ObserveInterToken(double seconds) { inter_token_.Observe(seconds); }
  // Of a choice with at least two tokens, from its first to its last.
  void ObserveTimePerOutputToken(double seconds) { time_per_output_token_.Observe(seconds); }
  // A 429 that the front answered itself, without asking the flow, which counts its own.
  void CountRefusal(std::string_view code) { refusals_.Add({{"code", std::string(code)}}).Increment(); }
  void ObservePromptTokens(int64_t tokens);      // of a request
  void ObserveCompletionTokens(int64_t tokens);  // of a choice
  void CountUnreadableToolCall() { unreadable_tool_calls_.Increment(); }

  prometheus::Gauge& requests_running() { return requests_running_; }
  prometheus::Gauge& requests_waiting() { return requests_waiting_; }  // sent to the cluster, no token yet
  prometheus::Gauge& connections() { return connections_; }

 private:
  const std::string model_;
  prometheus::Family<prometheus::Counter>& requests_;
  prometheus::Family<prometheus::Counter>& connections_refused_;
  prometheus::Family<prometheus::Counter>& refusals_;
  prometheus::Family<prometheus::Histogram>& duration_;
  prometheus::Histogram& time_to_first_token_;
  prometheus::Histogram& inter_token_;
  prometheus::Histogram& time_per_output_token_;
  prometheus::Histogram& prompt_tokens_;
  prometheus::Histogram& generation_tokens_;
  prometheus::Counter& prompt_tokens_total_;
  prometheus::Counter& generation_tokens_total_;
  prometheus::Counter& slow_consumers_;
  prometheus::Counter& unreadable_tool_calls_;
  prometheus::Gauge& requests_running_;
  prometheus::Gauge& requests_waiting_;
  prometheus::Gauge& connections_;
};

}  // namespace millrace
