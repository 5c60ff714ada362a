// SPDX-License-Identifier: Apache-2.0
// Translation between what fronts say (generation.h) and what workers are told (types.proto), errors included.
//
// `millrace run` uses ToSpec too, so that one process and a cluster are told the same. Thread: pure functions.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "millrace/v1/types.pb.h"
#include "services/router/generation.h"

namespace millrace::router {

v1::GenerationSpec ToSpec(const GenerationRequest& request, const std::vector<int32_t>& end_ids);

// XXH3-64 of the ids as little-endian int32: what the manifest of the hand-off must name.
uint64_t TokenHash(const std::vector<int32_t>& ids);

// What is left until `deadline`, as messages carry it: at least 1 ms, at most an hour.
uint64_t LeftMs(std::chrono::steady_clock::time_point deadline, std::chrono::steady_clock::time_point now);

GeneratedToken FromProto(const v1::Token& token);

// Unavailable, with a code word, to be sent again after a second.
absl::Status Retryable(const std::string& code, const std::string& message);
absl::Status DeadlineError();
// What the client is told when a worker ends its part with `status`. The worker's own words name addresses and ids:
// they go to the log. DEADLINE_EXCEEDED from a worker is the client's own only if its deadline has passed; before that
// a stage of ours was late, and the request is worth another try.
absl::Status ClientError(const absl::Status& status, bool deadline_passed = false);

}  // namespace millrace::router
