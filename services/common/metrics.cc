// SPDX-License-Identifier: Apache-2.0
// See metrics.h.
#include "services/common/metrics.h"

#include <prometheus/text_serializer.h>

namespace millrace {
namespace {

template <typename Builder>
auto& Family(Builder builder, const char* name, const char* help, prometheus::Registry& registry) {
  return builder.Name(name).Help(help).Register(registry);
}

}  // namespace

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

std::string RenderMetrics(const prometheus::Registry& registry) {
  return prometheus::TextSerializer().Serialize(registry.Collect());
}

HttpMetrics::HttpMetrics(prometheus::Registry& registry, const std::string& model)
    : model_(model),
      requests_(Family(prometheus::BuildCounter(), "millrace_http_requests_total",
                       "HTTP requests answered, by route and status (499: the client left first).", registry)),
      connections_refused_(Family(prometheus::BuildCounter(), "millrace_http_connections_refused_total",
                                  "Connections closed at accept, by reason.", registry)),
      duration_(Family(prometheus::BuildHistogram(), "millrace_request_duration_seconds",
                       "Generation requests from the last byte of the request to the last byte queued.", registry)),
      time_to_first_token_(Family(prometheus::BuildHistogram(), "millrace_time_to_first_token_seconds",
                                  "From the last byte of the request to its first token.", registry)
                               .Add({{"model", model}}, TimeToFirstTokenBuckets())),
      inter_token_(Family(prometheus::BuildHistogram(), "millrace_inter_token_seconds",
                          "Between two tokens of one choice, as they reach the router.", registry)
                       .Add({{"model", model}}, InterTokenBuckets())),
      prompt_tokens_(Family(prometheus::BuildHistogram(), "millrace_prompt_tokens", "Prompt length.", registry)
                         .Add({{"model", model}}, TokenCountBuckets())),
      generation_tokens_(
          Family(prometheus::BuildHistogram(), "millrace_generation_tokens", "Tokens generated per choice.", registry)
              .Add({{"model", model}}, TokenCountBuckets())),
      prompt_tokens_total_(
          Family(prometheus::BuildCounter(), "millrace_prompt_tokens_total", "Prompt tokens accepted.", registry)
              .Add({{"model", model}})),
      generation_tokens_total_(
          Family(prometheus::BuildCounter(), "millrace_generation_tokens_total", "Tokens generated.", registry)
              .Add({{"model", model}})),
      slow_consumers_(Family(prometheus::BuildCounter(), "millrace_slow_consumers_total",
                             "Streams ended because the client read too slowly.", registry)
                          .Add({})),
      unreadable_tool_calls_(Family(prometheus::BuildCounter(), "millrace_unreadable_tool_calls_total",
                                    "Tool calls the model wrote that could not be parsed and were dropped.", registry)
                                 .Add({})),
      requests_running_(
          Family(prometheus::BuildGauge(), "millrace_requests_running", "Generation requests in flight.", registry)
              .Add({{"role", "router"}})),
      requests_waiting_(Family(prometheus::BuildGauge(), "millrace_requests_waiting",
                               "Generation requests in flight without a first token.", registry)
                            .Add({{"role", "router"}})),
      connections_(
          Family(prometheus::BuildGauge(), "millrace_http_connections", "Open HTTP connections.", registry).Add({})) {}

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
