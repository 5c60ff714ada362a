// SPDX-License-Identifier: Apache-2.0
// A process that was told to drain and does not end is ended; one that ends is not disturbed.
#include "services/common/drain.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "absl/time/clock.h"

namespace millrace {
namespace {

TEST(StopSignalDeathTest, ADrainThatDoesNotEndIsEnded) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        static StopSignal stop;
        stop.LeaveWithin("router", absl::Milliseconds(50));
        stop.Raise();
        absl::SleepFor(absl::Minutes(1));
        _Exit(0);
      },
      ::testing::ExitedWithCode(kExitDrainStuck), "");
}

TEST(StopSignalDeathTest, OneThatEndsInTimeKeepsItsStatus) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        static StopSignal stop;
        stop.LeaveWithin("router", absl::Minutes(1));
        stop.Raise();
        stop.Raise();  // as `millrace drain` after SIGTERM would
        stop.Wait();
        std::exit(3);
      },
      ::testing::ExitedWithCode(3), "");
}

}  // namespace
}  // namespace millrace
