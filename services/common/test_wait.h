// SPDX-License-Identifier: Apache-2.0
// Waiting in tests for what other threads and processes bring about: never a fixed sleep, never without a bound.
//
// Thread: any, blocking.
#pragma once

#include <chrono>
#include <functional>
#include <thread>

namespace millrace {

// Whether `condition` holds within `patience`, which is long because test machines are loaded.
inline bool Eventually(const std::function<bool()>& condition,
                       std::chrono::milliseconds patience = std::chrono::seconds(20)) {
  const auto end = std::chrono::steady_clock::now() + patience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() >= end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

}  // namespace millrace
