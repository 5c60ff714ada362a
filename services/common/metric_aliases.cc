// SPDX-License-Identifier: Apache-2.0
// See metric_aliases.h.
#include "services/common/metric_aliases.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace millrace {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using How = MetricAlias::How;

constexpr int kPageTokens = 128;

constexpr MetricAlias kAliases[] = {
    {"vllm gateway", "vllm:num_requests_running", "millrace_router_generations_open", How::kRunning},
    {"vllm gateway", "vllm:num_requests_waiting", "millrace_router_generations_queued", How::kSame},
    {"vllm gateway", "vllm:kv_cache_usage_perc", "millrace_router_cache_pages", How::kUsage},
    {"vllm gateway", "vllm:cache_config_info", "millrace_router_cache_pages", How::kCacheConfig},
    {"vllm", "vllm:prompt_tokens_total", "millrace_prompt_tokens_total", How::kSame},
    {"vllm", "vllm:generation_tokens_total", "millrace_generation_tokens_total", How::kSame},
    {"vllm", "vllm:time_to_first_token_seconds", "millrace_time_to_first_token_seconds", How::kSame},
    {"vllm", "vllm:inter_token_latency_seconds", "millrace_inter_token_seconds", How::kSame},
    {"vllm", "vllm:request_time_per_output_token_seconds", "millrace_time_per_output_token_seconds", How::kSame},
    {"vllm", "vllm:e2e_request_latency_seconds", "millrace_router_generation_seconds", How::kSame},
    {"vllm", "vllm:request_queue_time_seconds", "millrace_router_queue_seconds", How::kSame},
    {"vllm", "vllm:request_prompt_tokens", "millrace_prompt_tokens", How::kSame},
    {"vllm", "vllm:request_generation_tokens", "millrace_generation_tokens", How::kSame},
    {"sglang", "sglang:num_running_reqs", "millrace_router_generations_open", How::kRunning},
    {"sglang", "sglang:num_queue_reqs", "millrace_router_generations_queued", How::kSame},
    {"sglang", "sglang:token_usage", "millrace_router_cache_pages", How::kUsage},
    {"sglang", "sglang:prompt_tokens_total", "millrace_prompt_tokens_total", How::kSame},
    {"sglang", "sglang:generation_tokens_total", "millrace_generation_tokens_total", How::kSame},
    {"sglang", "sglang:time_to_first_token_seconds", "millrace_time_to_first_token_seconds", How::kSame},
    {"sglang", "sglang:inter_token_latency_seconds", "millrace_inter_token_seconds", How::kSame},
    {"sglang", "sglang:e2e_request_latency_seconds", "millrace_router_generation_seconds", How::kSame},
};

const MetricFamily* Find(const std::vector<MetricFamily>& families, std::string_view name) {
  const auto found =
      std::find_if(families.begin(), families.end(), [&](const MetricFamily& family) { return family.name == name; });
  return found == families.end() ? nullptr : &*found;
}

std::string Label(const ClientMetric& metric, std::string_view name) {
  for (const auto& label : metric.label) {
    if (label.name == name) return label.value;
  }
  return "";
}

// Which model this router serves; the names of others all carry it.
std::string Model(const std::vector<MetricFamily>& families) {
  const MetricFamily* info = Find(families, "millrace_model_info");
  return info == nullptr || info->metric.empty() ? "" : Label(info->metric.front(), "model");
}

// The decode workers' pages, by state.
std::map<std::string, double> DecodePages(const MetricFamily& pages) {
  std::map<std::string, double> by_state;
  for (const ClientMetric& metric : pages.metric) {
    if (Label(metric, "role") == "decode") by_state[Label(metric, "state")] += metric.gauge.value;
  }
  return by_state;
}

std::optional<MetricFamily> Make(const MetricAlias& alias, const std::vector<MetricFamily>& families) {
  const MetricFamily* const source = Find(families, alias.name);
  if (source == nullptr || source->metric.empty()) return std::nullopt;
  MetricFamily family{alias.alias, absl::StrCat("Alias of ", alias.name, "."), source->type, {}};
  const std::vector<ClientMetric::Label> labels{{"model_name", Model(families)}};
  ClientMetric metric = source->metric.front();
  metric.label = labels;
  switch (alias.how) {
    case How::kSame:
      break;
    case How::kRunning: {
      const MetricFamily* queued = Find(families, "millrace_router_generations_queued");
      if (queued != nullptr && !queued->metric.empty()) {
        metric.gauge.value = std::max(0.0, metric.gauge.value - queued->metric.front().gauge.value);
      }
      break;
    }
    case How::kUsage: {
      auto pages = DecodePages(*source);
      const double total = pages["owned"] + pages["free"];
      metric.gauge.value = total > 0 ? pages["owned"] / total : 0;
      break;
    }
    case How::kCacheConfig: {
      auto pages = DecodePages(*source);
      metric.gauge.value = 1;
      metric.label.push_back({"block_size", absl::StrCat(kPageTokens)});
      metric.label.push_back({"num_gpu_blocks", absl::StrCat(static_cast<int64_t>(pages["owned"] + pages["free"]))});
      break;
    }
  }
  family.metric.push_back(std::move(metric));
  return family;
}

bool Belongs(const MetricAlias& alias, const std::vector<std::string>& sets) {
  for (const absl::string_view set : absl::StrSplit(alias.sets, ' ')) {
    if (std::find(sets.begin(), sets.end(), set) != sets.end()) return true;
  }
  return false;
}

}  // namespace

absl::Span<const MetricAlias> MetricAliases() { return kAliases; }

bool IsMetricCompatibility(std::string_view set) { return set == "vllm" || set == "sglang" || set == "gateway"; }

void AppendAliases(const std::vector<std::string>& sets, std::vector<MetricFamily>& families) {
  if (sets.empty()) return;
  std::vector<MetricFamily> added;
  for (const MetricAlias& alias : kAliases) {
    if (!Belongs(alias, sets)) continue;
    if (auto family = Make(alias, families)) added.push_back(*std::move(family));
  }
  families.insert(families.end(), std::make_move_iterator(added.begin()), std::make_move_iterator(added.end()));
}

}  // namespace millrace
