// SPDX-License-Identifier: Apache-2.0
// The only clock behaviour may depend on: it never jumps, and means nothing outside this process.
//
// absl::Time is used for its types; its epoch here is some instant before the process began. Planners and state
// machines take the time as an argument; only threads call this.
#pragma once

#include <chrono>
#include <cstdint>

#include "absl/time/time.h"

namespace millrace {

inline absl::Time FromSteady(std::chrono::steady_clock::time_point time) {
  return absl::UnixEpoch() + absl::FromChrono(time.time_since_epoch());
}

inline absl::Time MonotonicNow() { return FromSteady(std::chrono::steady_clock::now()); }

inline int64_t ToMicros(absl::Time time) {
  // InfiniteFuture stays later than everything.
  return absl::ToInt64Microseconds(time - absl::UnixEpoch());
}

}  // namespace millrace
