// SPDX-License-Identifier: Apache-2.0
// Every metric there is: name, type, unit, labels, who exposes it, and what it says. One table; docs/metrics.md is
// written from it, and a metric that is not in it cannot be made.
//
// Base units, prefix millrace_ (process_ where every program has the same), few labels: a label takes values from a
// fixed set (roles, routes, codes, reasons, phases, a model's experts, the cluster's workers), never from a client.
// Counters end in _total and gauges do not. Thread: any.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <string_view>

#include "absl/types/span.h"

namespace millrace {

enum class MetricType { kCounter, kGauge, kHistogram };

struct MetricDescription {
  const char* name;
  MetricType type;
  const char* unit;  // "seconds", "bytes", "tokens", "requests" ...; "1" for a gauge that is only there for its labels
  const char* labels;  // names, separated by spaces, in alphabetical order
  const char* where;   // roles that expose it, separated by spaces; "all"; "reserved": a name kept free, nobody does
  const char* help;    // one sentence
};

absl::Span<const MetricDescription> MetricCatalogue();

// CHECK-fails for a name that the catalogue lacks or has as another type: a metric nobody could read about.
const MetricDescription& DescribeMetric(std::string_view name, MetricType type);

prometheus::Family<prometheus::Counter>& CounterFamily(prometheus::Registry& registry, std::string_view name);
prometheus::Family<prometheus::Gauge>& GaugeFamily(prometheus::Registry& registry, std::string_view name);
prometheus::Family<prometheus::Histogram>& HistogramFamily(prometheus::Registry& registry, std::string_view name);

}  // namespace millrace
