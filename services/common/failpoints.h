// SPDX-License-Identifier: Apache-2.0
// Named places where a test can make a worker fail, wait or do the wrong thing.
//
// Off unless Arm was called, which only the command line does (MILLRACE_FAILPOINTS) and tests. A specification is a
// list "name=action" with ';' between: crash (SIGKILL to ourselves), exit(CODE), error(CODE_NAME), sleep(MS), hang, on.
// An action may be followed by @N: only the N-th hit, counting from 1. Names beginning with "bug." switch on a seeded
// bug at the place where it would live; the suites must then fail, or they prove nothing.
//
// Thread: any. Arm before threads start.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace millrace::failpoints {

// The places there are. Arm refuses a name that is not one of them, so that a typing error cannot make a test pass.
const std::vector<std::string_view>& Names();

// Replaces what was armed before; "" disarms everything. InvalidArgument names the entry.
absl::Status Arm(std::string_view specification);

// How often a place was passed since Arm; counted only while anything is armed. A fault that did not happen is a test
// that proved nothing.
uint64_t Hits(std::string_view name);

namespace internal {
extern std::atomic<bool> any_armed;
absl::Status HitSlow(std::string_view name);
bool BugSlow(std::string_view name);
}  // namespace internal

// Passes a place: dies, waits, or returns the error armed; OK otherwise.
inline absl::Status Hit(std::string_view name) {
  if (!internal::any_armed.load(std::memory_order_relaxed)) [[likely]]
    return absl::OkStatus();
  return internal::HitSlow(name);
}

// Whether a seeded bug is on.
inline bool Bug(std::string_view name) {
  if (!internal::any_armed.load(std::memory_order_relaxed)) [[likely]]
    return false;
  return internal::BugSlow(name);
}

}  // namespace millrace::failpoints
