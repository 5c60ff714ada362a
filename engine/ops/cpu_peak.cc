// SPDX-License-Identifier: Apache-2.0
// See cpu_peak.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/ops/cpu_peak.cc"
#include <hwy/foreach_target.h>
// Highway's per-target sections follow.
#include <hwy/highway.h>

#include <algorithm>
#include <chrono>

#include "engine/ops/cpu_peak.h"

HWY_BEFORE_NAMESPACE();
namespace millrace {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Twelve sums hide the latency of two fused multiply-adds a cycle. Returns lanes times rounds; `sink` keeps the work.
double Spin(int rounds, float* sink) {
  const hn::CappedTag<float, 16> d;
  constexpr int kSums = 12;
  hn::Vec<decltype(d)> sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = hn::Set(d, 1.0f + static_cast<float>(i));
  const auto a = hn::Set(d, *sink), b = hn::Set(d, 1e-3f);
  for (int r = 0; r < rounds; ++r) {
    for (int i = 0; i < kSums; ++i) sum[i] = hn::MulAdd(sum[i], a, b);
  }
  for (int i = 1; i < kSums; ++i) sum[0] = hn::Add(sum[0], sum[i]);
  *sink = hn::GetLane(sum[0]) > 1e30f ? 0.0f : 0.999f;
  return static_cast<double>(rounds) * kSums * static_cast<double>(hn::Lanes(d));
}

}  // namespace HWY_NAMESPACE
}  // namespace millrace
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace millrace {
HWY_EXPORT(Spin);

double PeakMultiplyAdds() {
  static const double peak = [] {
    float sink = 0.999f;
    double best = 0;
    for (int i = 0; i < 20; ++i) {
      const auto start = std::chrono::steady_clock::now();
      const double done = HWY_DYNAMIC_DISPATCH(Spin)(1'000'000, &sink);
      best = std::max(best, done / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
  }();
  return peak;
}

}  // namespace millrace
#endif  // HWY_ONCE
