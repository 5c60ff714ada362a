// SPDX-License-Identifier: Apache-2.0
// See process_metrics.h. From /proc/self, whose fields are proc(5)'s.
#include "services/common/process_metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <system_error>

#include "services/common/metric_catalogue.h"

namespace millrace {
namespace {

void Append(const char* name, MetricType type, double value, std::vector<prometheus::MetricFamily>& families) {
  const MetricDescription& description = DescribeMetric(name, type);
  prometheus::ClientMetric metric;
  if (type == MetricType::kCounter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  families.push_back({description.name,
                      description.help,
                      type == MetricType::kCounter ? prometheus::MetricType::Counter : prometheus::MetricType::Gauge,
                      {std::move(metric)}});
}

// Seconds since the epoch at which the machine started; 0: unknown.
double BootTime() {
  std::ifstream stat("/proc/stat");
  for (std::string line; std::getline(stat, line);) {
    if (line.rfind("btime ", 0) == 0) return std::stod(line.substr(6));
  }
  return 0;
}

}  // namespace

void AppendProcessMetrics(std::vector<prometheus::MetricFamily>& families) {
  std::ifstream file("/proc/self/stat");
  std::string line;
  std::getline(file, line);
  // The second field is the command in parentheses and may hold anything: fields are counted behind it.
  const size_t command_end = line.rfind(')');
  if (command_end != std::string::npos) {
    std::istringstream rest(line.substr(command_end + 2));
    std::vector<std::string> fields;  // [0] is field 3 of the manual
    for (std::string field; rest >> field;) fields.push_back(field);
    if (fields.size() > 21) {
      const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
      const double page = static_cast<double>(sysconf(_SC_PAGESIZE));
      Append("process_cpu_seconds_total", MetricType::kCounter, (std::stod(fields[11]) + std::stod(fields[12])) / ticks,
             families);
      Append("process_threads", MetricType::kGauge, std::stod(fields[17]), families);
      static const double boot = BootTime();
      if (boot > 0) {
        Append("process_start_time_seconds", MetricType::kGauge, boot + std::stod(fields[19]) / ticks, families);
      }
      Append("process_virtual_memory_bytes", MetricType::kGauge, std::stod(fields[20]), families);
      Append("process_resident_memory_bytes", MetricType::kGauge, std::stod(fields[21]) * page, families);
    }
  }
  std::error_code error;
  int64_t open = 0;
  for (std::filesystem::directory_iterator entry("/proc/self/fd", error), end; !error && entry != end;
       entry.increment(error)) {
    ++open;
  }
  if (!error) {
    Append("process_open_fds", MetricType::kGauge, static_cast<double>(open - 1), families);  // not the one that looks
  }
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    Append("process_max_fds", MetricType::kGauge, static_cast<double>(limit.rlim_cur), families);
  }
}

}  // namespace millrace
