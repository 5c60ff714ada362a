// SPDX-License-Identifier: Apache-2.0
// Planners: who moves in the next pass, and who is ended.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/sched/decode_planner.h"
#include "engine/sched/prefill_planner.h"

namespace millrace::sched {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ChunkPlan = PrefillPlan::ChunkPlan;

constexpr int64_t kLater = 1'000'000;

PrefillCandidate Running(uint64_t id, int64_t left) { return {id, left, kLater, true, 0}; }
PrefillCandidate Waiting(uint64_t id, int64_t left, int64_t pages) { return {id, left, kLater, false, pages}; }

TEST(PrefillPlanner, OnePromptTakesTheWholePass) {
  EXPECT_THAT(PlanPrefill({Running(1, 5000)}, {512, 0, 0}, 0).chunks, ElementsAre(ChunkPlan{1, 512}));
  EXPECT_THAT(PlanPrefill({Running(1, 5)}, {512, 0, 0}, 0).chunks, ElementsAre(ChunkPlan{1, 5}));
}

TEST(PrefillPlanner, AShortQuestionDoesNotWaitForALongDocument) {
  EXPECT_THAT(PlanPrefill({Running(1, 5000), Running(2, 900), Running(3, 20)}, {512, 0, 0}, 0).chunks,
              ElementsAre(ChunkPlan{1, 256}, ChunkPlan{2, 236}, ChunkPlan{3, 20}));
}

TEST(PrefillPlanner, TheOldestIsNotStarvedByShortOnes) {
  std::vector<PrefillCandidate> candidates{Running(1, 5000)};
  for (uint64_t id = 2; id < 100; ++id) candidates.push_back(Running(id, 10));
  const PrefillPlan plan = PlanPrefill(candidates, {512, 0, 0}, 0);
  EXPECT_EQ(plan.chunks.front(), (ChunkPlan{1, 256}));
}

TEST(PrefillPlanner, RowsNeverExceedThePassAndOneRowIsEnoughForProgress) {
  for (int64_t room : {1, 2, 3, 511}) {
    const PrefillPlan plan = PlanPrefill({Running(1, 300), Running(2, 300), Running(3, 1)}, {room, 0, 0}, 0);
    int64_t rows = 0;
    for (const ChunkPlan& chunk : plan.chunks) {
      EXPECT_GE(chunk.num_tokens, 1);
      rows += chunk.num_tokens;
    }
    EXPECT_EQ(rows, room);
  }
}

TEST(PrefillPlanner, AdmissionIsInOrderSoALargePromptIsNotPassedForEver) {
  const PrefillPlan plan = PlanPrefill({Waiting(1, 300, 3), Waiting(2, 2000, 20), Waiting(3, 10, 1)}, {512, 10, 4}, 0);
  EXPECT_THAT(plan.admit, ElementsAre(1));
  EXPECT_THAT(plan.chunks, ElementsAre(ChunkPlan{1, 300}));
}

TEST(PrefillPlanner, WithoutASlotNothingIsAdmitted) {
  EXPECT_THAT(PlanPrefill({Waiting(1, 300, 3)}, {512, 10, 0}, 0).admit, IsEmpty());
}

TEST(PrefillPlanner, APassedDeadlineEndsAPromptWhereverItIs) {
  PrefillCandidate late = Waiting(2, 10, 1);
  late.deadline_us = 100;
  const PrefillPlan plan = PlanPrefill({Running(1, 5), late}, {512, 10, 1}, 100);
  EXPECT_THAT(plan.expired, ElementsAre(2));
  EXPECT_THAT(plan.admit, IsEmpty());
}

DecodeCandidate Sequence(uint64_t id, uint64_t last_step = 0, bool runnable = true) {
  return {id, kLater, kLater, runnable, last_step};
}

TEST(DecodePlanner, EverybodyWhoCanMovesMoves) {
  EXPECT_THAT(PlanDecode({Sequence(3), Sequence(1), Sequence(2, 0, false)}, 8, 0).batch, ElementsAre(1, 3));
}

TEST(DecodePlanner, WhenTheBatchIsFullTheLongestWaitingGoFirst) {
  EXPECT_THAT(PlanDecode({Sequence(1, 7), Sequence(2, 7), Sequence(3, 6), Sequence(4, 0)}, 2, 0).batch,
              ElementsAre(3, 4));
}

TEST(DecodePlanner, EveryLeaseIsSweptWhateverTheOrderOfTheirEnds) {
  DecodeCandidate a = Sequence(1), b = Sequence(2), c = Sequence(3), d = Sequence(4);
  b.lease_us = 10;
  d.lease_us = 5;
  c.deadline_us = 10;
  const DecodePlan plan = PlanDecode({a, d, c, b}, 8, 10);
  EXPECT_THAT(plan.lease_ended, ElementsAre(2, 4));
  EXPECT_THAT(plan.deadline_passed, ElementsAre(3));
  EXPECT_THAT(plan.batch, ElementsAre(1));
}

}  // namespace
}  // namespace millrace::sched
