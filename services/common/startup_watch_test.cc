// SPDX-License-Identifier: Apache-2.0
// A start-up that stands still is ended with its reason; one that works, however slowly, is not.
#include "services/common/startup_watch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>

#include "absl/synchronization/notification.h"
#include "services/common/clock.h"

namespace millrace {
namespace {

using ::testing::HasSubstr;

struct Watched {
  explicit Watched(absl::Duration limit)
      : watch("prefill-0", limit, [this](const std::string& sentence) {
          why = sentence;
          expired.Notify();
        }) {}
  std::string why;
  absl::Notification expired;
  StartupWatch watch;
};

TEST(StartupWatch, StandingStillIsSaidWithStageAndProgress) {
  Watched watched(absl::Milliseconds(400));
  watched.watch.Waiting("the weights in /models/flash");
  watched.watch.Moved(12, 100);
  ASSERT_TRUE(watched.expired.WaitForNotificationWithTimeout(absl::Seconds(60)));
  EXPECT_THAT(watched.why, HasSubstr("prefill-0: start-up waits for the weights in /models/flash, 12 of 100 bytes"));
  EXPECT_THAT(watched.why, HasSubstr("timers.startup_timeout_ms"));
}

TEST(StartupWatch, ProgressStartsTheClockAnew) {
  Watched watched(absl::Seconds(2));
  for (int i = 0; i < 12; ++i) {
    watched.watch.Moved(i, 100);
    EXPECT_FALSE(watched.expired.WaitForNotificationWithTimeout(absl::Milliseconds(250)));
  }
}

TEST(StartupWatch, ComputingWithoutReportsIsNotStandingStill) {
  Watched watched(absl::Seconds(1));
  const absl::Time until = MonotonicNow() + absl::Seconds(2);
  std::atomic<uint64_t> sum{0};
  while (MonotonicNow() < until) sum.fetch_add(1);
  EXPECT_FALSE(watched.expired.HasBeenNotified());
}

TEST(StartupWatch, NothingIsSaidOnceItIsOver) {
  Watched watched(absl::Milliseconds(200));
  watched.watch.Done();
  EXPECT_FALSE(watched.expired.WaitForNotificationWithTimeout(absl::Seconds(1)));
}

}  // namespace
}  // namespace millrace
