// SPDX-License-Identifier: Apache-2.0
// Our metrics under other servers' names, for tools that know those: dashboards, autoscalers, endpoint pickers.
//
// The same numbers under a second name, made when somebody asks: nothing is counted twice. Sets: "vllm", "sglang", and
// "gateway", the gauges that the Gateway API inference extension's endpoint picker reads by default (vLLM's names).
// Only what the router knows has an alias, because that is what speaks for the cluster. Thread: any.
#pragma once

#include <prometheus/metric_family.h>

#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"

namespace millrace {

struct MetricAlias {
  const char* sets;   // that it belongs to, separated by spaces
  const char* alias;  // the other server's name
  const char* name;   // ours
  enum How : uint8_t {
    kSame,        // value for value
    kUsage,       // owned / (owned + free) of the decode workers' pages
    kRunning,     // open generations less queued ones
    kCacheConfig  // 1, with block_size and num_gpu_blocks as labels
  } how;
};
absl::Span<const MetricAlias> MetricAliases();

bool IsMetricCompatibility(std::string_view set);
void AppendAliases(const std::vector<std::string>& sets, std::vector<prometheus::MetricFamily>& families);

}  // namespace millrace
