// SPDX-License-Identifier: Apache-2.0
// The entry point that libFuzzer calls: one executable per target, which MILLRACE_FUZZ_TARGET names.
#include <cstddef>
#include <cstdint>

#include "engine/status.h"
#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const millrace::fuzz::Target target = [] {
    for (const auto& candidate : millrace::fuzz::AllTargets()) {
      if (candidate.name == MILLRACE_FUZZ_TARGET) return candidate;
    }
    CHECK(false, MILLRACE_FUZZ_TARGET);
    return millrace::fuzz::Target{};
  }();
  target.run({reinterpret_cast<const char*>(data), size});
  return 0;
}
