// SPDX-License-Identifier: Apache-2.0
// What an operator is told about the cluster, as JSON: the page, `millrace top`, `up` and scripts read the same object.
//
// Keys are stable: one is added rather than changed. Times in milliseconds, sizes in bytes, counters since the
// process started. Thread: pure functions.
#pragma once

#include <chrono>
#include <cstdint>

#include "engine/cache/cache_layout.h"
#include "services/router/cluster_snapshot.h"
#include "services/router/json_reader.h"

namespace millrace::router {

// What a page and a slot of this model consist of: {"page_tokens", "page_bytes", "slot_bytes", "families": [{"name",
// "bytes"}]}; the families of a page add up to its bytes.
Json CacheJson(const CacheLayout& layout);

// Everybody, by role, then name.
Json WorkersJson(const ClusterSnapshot& snapshot, std::chrono::steady_clock::time_point now);

}  // namespace millrace::router
