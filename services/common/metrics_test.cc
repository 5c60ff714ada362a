// SPDX-License-Identifier: Apache-2.0
// The catalogue's own rules, process metrics, and aliases.
#include "services/common/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "services/common/metric_aliases.h"

namespace millrace {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(MetricCatalogue, NamesFollowTheRules) {
  std::set<std::string> seen;
  for (const MetricDescription& metric : MetricCatalogue()) {
    const absl::string_view name = metric.name;
    SCOPED_TRACE(metric.name);
    EXPECT_TRUE(seen.insert(metric.name).second) << "twice";
    EXPECT_TRUE(absl::StartsWith(name, "millrace_") || absl::StartsWith(name, "process_"));
    EXPECT_TRUE(std::all_of(name.begin(), name.end(), [](char c) { return std::islower(c) || c == '_'; }));
    EXPECT_EQ(metric.type == MetricType::kCounter, absl::EndsWith(name, "_total"));
    const absl::string_view unit = metric.unit;
    EXPECT_TRUE((unit != "seconds" && unit != "bytes") || absl::StrContains(name, unit));
    EXPECT_EQ(metric.help[std::string(metric.help).size() - 1], '.');
    const std::vector<std::string> labels = absl::StrSplit(metric.labels, ' ', absl::SkipEmpty());
    EXPECT_TRUE(std::is_sorted(labels.begin(), labels.end()));
  }
}

TEST(MetricCatalogue, WhatIsNotInItCannotBeMade) {
  prometheus::Registry registry;
  EXPECT_DEATH(CounterFamily(registry, "millrace_invented_total"), "not in the catalogue");
  EXPECT_DEATH(CounterFamily(registry, "millrace_leases"), "another type");
}

TEST(RenderMetrics, SaysWhatTheProcessUses) {
  prometheus::Registry registry;
  SetBuildInfo(registry);
  const std::string text = RenderMetrics(registry);
  for (const char* name : {"process_cpu_seconds_total ", "process_resident_memory_bytes ", "process_open_fds ",
                           "process_threads ", "process_start_time_seconds ", "millrace_build_info{"}) {
    EXPECT_THAT(text, HasSubstr(std::string("\n") + name));
  }
  const size_t at = text.find("\nprocess_resident_memory_bytes ");
  EXPECT_GT(std::stod(text.substr(at + std::string("\nprocess_resident_memory_bytes ").size())), 1e6);
}

class Aliases : public ::testing::Test {
 protected:
  Aliases() {
    SetModelInfo(
        registry_,
        {.role = "router", .model = "demo", .device = {}, .numerics = {}, .kernel_set = {}, .compat_hash = {}});
    GaugeFamily(registry_, "millrace_router_generations_open").Add({}).Set(7);
    GaugeFamily(registry_, "millrace_router_generations_queued").Add({}).Set(3);
    auto& pages = GaugeFamily(registry_, "millrace_router_cache_pages");
    pages.Add({{"role", "decode"}, {"state", "free"}}).Set(30);
    pages.Add({{"role", "decode"}, {"state", "owned"}}).Set(10);
    pages.Add({{"role", "prefill"}, {"state", "owned"}}).Set(1000);
    HistogramFamily(registry_, "millrace_router_generation_seconds").Add({}, RequestDurationBuckets()).Observe(0.5);
  }
  prometheus::Registry registry_;
};

TEST_F(Aliases, AreThereOnlyWhenAskedFor) {
  EXPECT_THAT(RenderMetrics(registry_), Not(HasSubstr("vllm:")));
  EXPECT_THAT(RenderMetrics(registry_, {"sglang"}), Not(HasSubstr("vllm:")));
}

TEST_F(Aliases, AreTheClustersNumbersUnderOtherNames) {
  const std::string vllm = RenderMetrics(registry_, {"vllm"});
  EXPECT_THAT(vllm, HasSubstr("\nvllm:num_requests_running{model_name=\"demo\"} 4\n"));
  EXPECT_THAT(vllm, HasSubstr("\nvllm:num_requests_waiting{model_name=\"demo\"} 3\n"));
  EXPECT_THAT(vllm, HasSubstr("\nvllm:kv_cache_usage_perc{model_name=\"demo\"} 0.25\n"));
  EXPECT_THAT(vllm, HasSubstr("block_size=\"128\",num_gpu_blocks=\"40\"} 1\n"));
  EXPECT_THAT(vllm, HasSubstr("\nvllm:e2e_request_latency_seconds_count{model_name=\"demo\"} 1\n"));
  const std::string sglang = RenderMetrics(registry_, {"sglang"});
  EXPECT_THAT(sglang, HasSubstr("\nsglang:token_usage{model_name=\"demo\"} 0.25\n"));
  EXPECT_THAT(sglang, HasSubstr("\nsglang:num_queue_reqs{model_name=\"demo\"} 3\n"));
}

TEST_F(Aliases, TheGatewaysAreTheGaugesThatItsPickerReads) {
  const std::string text = RenderMetrics(registry_, {"gateway"});
  EXPECT_THAT(text, HasSubstr("vllm:num_requests_waiting{"));
  EXPECT_THAT(text, HasSubstr("vllm:kv_cache_usage_perc{"));
  EXPECT_THAT(text, Not(HasSubstr("vllm:e2e_request_latency_seconds")));
}

TEST_F(Aliases, EachSourceIsInTheCatalogueAndEachSetIsKnown) {
  for (const MetricAlias& alias : MetricAliases()) {
    EXPECT_TRUE(std::any_of(MetricCatalogue().begin(), MetricCatalogue().end(), [&](const MetricDescription& metric) {
      return std::string(metric.name) == alias.name;
    })) << alias.name;
    for (const absl::string_view set : absl::StrSplit(alias.sets, ' ')) {
      EXPECT_TRUE(IsMetricCompatibility({set.data(), set.size()})) << set;
    }
  }
}

}  // namespace
}  // namespace millrace
