// SPDX-License-Identifier: Apache-2.0
// See metrics.h.
#include "services/common/metrics.h"

#include <prometheus/text_serializer.h>

#include "services/common/metric_aliases.h"
#include "services/common/process_metrics.h"

// Only for the build that it is compiled into; the version is the project's.
#ifndef MILLRACE_VERSION
#define MILLRACE_VERSION "0.0.0"
#endif
#ifndef MILLRACE_TRANSPORTS
#define MILLRACE_TRANSPORTS "tcp"
#endif

namespace millrace {

prometheus::Histogram::BucketBoundaries RequestDurationBuckets() {
  return {.01, .02, .04, .08, .16, .32, .64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 160, 320, 640};
}

prometheus::Histogram::BucketBoundaries TimeToFirstTokenBuckets() {
  return {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160};
}

prometheus::Histogram::BucketBoundaries InterTokenBuckets() {
  return {.002, .005, .01, .015, .02, .025, .03, .04, .05, .075, .1, .15, .2, .3, .5, 1, 2.5};
}

prometheus::Histogram::BucketBoundaries TokenCountBuckets() {
  return {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000};
}

prometheus::Histogram::BucketBoundaries PhaseBuckets() {
  return {.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 60, 150};
}

prometheus::Histogram::BucketBoundaries DecisionBuckets() {
  return {.000001, .0000025, .000005, .00001, .000025, .00005, .0001, .00025, .0005, .001, .0025, .01};
}

const char* const kVersion = MILLRACE_VERSION;

void SetBuildInfo(prometheus::Registry& registry) {
  GaugeFamily(registry, "millrace_build_info")
      .Add({{"version", kVersion}, {"transports", MILLRACE_TRANSPORTS}, {"compiler", __VERSION__}})
      .Set(1);
}

void SetModelInfo(prometheus::Registry& registry, const ModelInfo& info) {
  GaugeFamily(registry, "millrace_model_info")
      .Add({{"role", info.role},
            {"model", info.model},
            {"device", info.device},
            {"numerics", info.numerics},
            {"kernel_set", info.kernel_set},
            {"compat_hash", info.compat_hash}})
      .Set(1);
}

std::string RenderMetrics(const prometheus::Registry& registry, const std::vector<std::string>& compatibility) {
  std::vector<prometheus::MetricFamily> families = registry.Collect();
  AppendProcessMetrics(families);
  AppendAliases(compatibility, families);
  return prometheus::TextSerializer().Serialize(families);
}

HttpMetrics::HttpMetrics(prometheus::Registry& registry, const std::string& model)
    : model_(model),
      requests_(CounterFamily(registry, "millrace_http_requests_total")),
      connections_refused_(CounterFamily(registry, "millrace_http_connections_refused_total")),
      refusals_(CounterFamily(registry, "millrace_router_refusals_total")),
      duration_(HistogramFamily(registry, "millrace_request_duration_seconds")),
      time_to_first_token_(HistogramFamily(registry, "millrace_time_to_first_token_seconds")
                               .Add({{"model", model}}, TimeToFirstTokenBuckets())),
      inter_token_(
          HistogramFamily(registry, "millrace_inter_token_seconds").Add({{"model", model}}, InterTokenBuckets())),
      time_per_output_token_(HistogramFamily(registry, "millrace_time_per_output_token_seconds")
                                 .Add({{"model", model}}, InterTokenBuckets())),
      prompt_tokens_(HistogramFamily(registry, "millrace_prompt_tokens").Add({{"model", model}}, TokenCountBuckets())),
      generation_tokens_(
          HistogramFamily(registry, "millrace_generation_tokens").Add({{"model", model}}, TokenCountBuckets())),
      prompt_tokens_total_(CounterFamily(registry, "millrace_prompt_tokens_total").Add({{"model", model}})),
      generation_tokens_total_(CounterFamily(registry, "millrace_generation_tokens_total").Add({{"model", model}})),
      slow_consumers_(CounterFamily(registry, "millrace_slow_consumers_total").Add({})),
      unreadable_tool_calls_(CounterFamily(registry, "millrace_unreadable_tool_calls_total").Add({})),
      requests_running_(GaugeFamily(registry, "millrace_requests_running").Add({{"role", "router"}})),
      requests_waiting_(GaugeFamily(registry, "millrace_requests_waiting").Add({{"role", "router"}})),
      connections_(GaugeFamily(registry, "millrace_http_connections").Add({})) {}

void HttpMetrics::CountRequest(std::string_view route, int code) {
  requests_.Add({{"route", std::string(route)}, {"code", std::to_string(code)}}).Increment();
}

void HttpMetrics::CountConnectionRefused(std::string_view reason) {
  connections_refused_.Add({{"reason", std::string(reason)}}).Increment();
}

void HttpMetrics::ObserveDuration(int code, double seconds) {
  duration_.Add({{"model", model_}, {"code", std::to_string(code)}}, RequestDurationBuckets()).Observe(seconds);
}

void HttpMetrics::ObservePromptTokens(int64_t tokens) {
  prompt_tokens_.Observe(static_cast<double>(tokens));
  prompt_tokens_total_.Increment(static_cast<double>(tokens));
}

void HttpMetrics::ObserveCompletionTokens(int64_t tokens) {
  generation_tokens_.Observe(static_cast<double>(tokens));
  generation_tokens_total_.Increment(static_cast<double>(tokens));
}

}  // namespace millrace
