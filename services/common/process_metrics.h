// SPDX-License-Identifier: Apache-2.0
// process_*: what the kernel knows of this process, read when somebody asks. Names are those of Prometheus' own client
// libraries. Thread: any.
#pragma once

#include <prometheus/metric_family.h>

#include <vector>

namespace millrace {

// What cannot be read is left out.
void AppendProcessMetrics(std::vector<prometheus::MetricFamily>& families);

}  // namespace millrace
