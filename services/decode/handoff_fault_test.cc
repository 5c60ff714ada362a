// SPDX-License-Identifier: Apache-2.0
// Hand-offs on which something fails: blocks damaged or lost, a peer that dies, an error at every named point; and the
// bugs that the suite must catch to be worth anything.
//
// Either the tokens are the bits of one process or the request ends with an error, and every page and slot comes back.
// The hand-off that goes well is handoff_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "services/common/error.h"
#include "services/common/failpoints.h"
#include "services/decode/handoff_pair.h"

namespace millrace {
namespace {

using ::testing::HasSubstr;

TEST_F(Handoff, ALateHandoffIsNotTheRequestsDeadline) {
  Pair::Options options;
  options.faults.drop = 1;
  options.transfer_timeout = absl::Milliseconds(200);
  Pair pair(options);
  const Outcome outcome = RunOne(pair, "late", MakePrompt(300), MakeSpec(4));
  EXPECT_EQ(outcome.prefill.code(), absl::StatusCode::kUnavailable) << outcome.prefill;
  ASSERT_TRUE(GetApiError(outcome.prefill).has_value()) << outcome.prefill;
  EXPECT_EQ(GetApiError(outcome.prefill)->code, "handoff_late");
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, DamagedAndLostBlocksAreSentAgainAndOnlyThose) {
  Pair::Options options;
  options.faults.seed = 7;
  options.faults.flip_payload = 0.3;
  options.faults.drop = 0.2;
  options.faults.max_faults = 3;
  Pair pair(options);
  for (uint32_t i = 0; i < 4; ++i) {
    const auto prompt = MakePrompt(500, i);
    pair.faults->SetPlan(options.faults);
    const Outcome outcome = RunOne(pair, absl::StrCat("damaged-", i), prompt, MakeSpec(5));
    EXPECT_TRUE(outcome.committed) << outcome.prefill;
    EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens(Reference(prompt, MakeSpec(5))));
    if (pair.faults->counts().total() > 0) {
      EXPECT_GT(outcome.resent, 0u);
    }
  }
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, WhatCannotBeRepairedNeverDecodes) {
  Pair::Options options;
  options.faults.flip_payload = 1;
  Pair pair(options);
  const Outcome outcome = RunOne(pair, "hopeless", MakePrompt(200), MakeSpec(5));
  EXPECT_EQ(outcome.prefill.code(), absl::StatusCode::kDataLoss) << outcome.prefill;
  EXPECT_THAT(std::string(outcome.prefill.message()), HasSubstr("decode-0"));
  EXPECT_EQ(outcome.tokens.size(), 1u);  // prefill's own; it was never wrong
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, AnErrorAtAnyNamedPointEndsTheRequestAndLeaksNothing) {
  Pair pair;
  for (const char* place : {"p.before_prefill", "p.during_prefill", "p.after_prefill", "p.before_transfer",
                            "p.during_transfer", "p.after_transfer", "p.before_commit", "p.after_commit",
                            "d.before_commit", "d.after_commit", "d.before_step", "d.after_step", "d.before_send"}) {
    ASSERT_TRUE(failpoints::Arm(absl::StrCat(place, "=error(UNAVAILABLE)")).ok());
    const Outcome outcome = RunOne(pair, absl::StrCat("at-", place), MakePrompt(300), MakeSpec(6));
    EXPECT_GE(failpoints::Hits(place), 1u) << place;
    EXPECT_FALSE(outcome.prefill.ok() && outcome.decode.ok()) << place;
    ASSERT_TRUE(failpoints::Arm("").ok());
    EXPECT_TRUE(pair.BecomesClean()) << place;
  }
}

// The oracle's own test: a suite that misses one of these proves nothing.
TEST_F(Handoff, EverySeededBugIsCaught) {
  const auto prompt = MakePrompt(391);
  auto spec = MakeSpec(40);
  spec.mutable_sampling()->set_temperature(0);
  const std::string expected = DescribeTokens(Reference(prompt, spec));
  Pair pair;
  for (const char* bug : {"bug.drop_frontier", "bug.off_by_one_row", "bug.swap_two_blocks", "bug.n_minus_1",
                          "bug.rope_position", "bug.double_token"}) {
    ASSERT_TRUE(failpoints::Arm(absl::StrCat(bug, "=on")).ok());
    const Outcome outcome = RunOne(pair, absl::StrCat("with-", bug), prompt, spec);
    EXPECT_GE(failpoints::Hits(bug), 1u) << bug;
    EXPECT_NE(DescribeTokens(outcome.tokens), expected) << bug;
    ASSERT_TRUE(failpoints::Arm("").ok());
    EXPECT_TRUE(pair.BecomesClean()) << bug;
  }
  EXPECT_EQ(DescribeTokens(RunOne(pair, "without", prompt, spec).tokens), expected);
}

TEST_F(Handoff, ASeededStaleAttemptWouldBeSeen) {
  Pair pair;
  ASSERT_TRUE(failpoints::Arm("bug.stale_attempt=on").ok());
  ASSERT_TRUE(pair.Reserve(pair.MakeReserve("again", MakePrompt(50), MakeSpec(5), 2)).ok());
  // What AnOlderAttemptIsStale insists on does not hold with the bug.
  EXPECT_TRUE(pair.Reserve(pair.MakeReserve("again", MakePrompt(50), MakeSpec(5), 1)).ok());
}

TEST_F(Handoff, PagesAreKeptUntilTheAnswerAndReusingThemEarlierIsCaught) {
  for (bool bug : {false, true}) {
    Pair::Options options;
    options.prefill_sequences = 1;  // whoever comes next gets the very same memory
    options.faults.drop = 1;
    options.faults.max_faults = 3;  // two pages and the slot: everything has to be sent again
    Pair pair(options);
    ASSERT_TRUE(failpoints::Arm(bug ? "bug.reuse_before_ack=on@1" : "").ok());
    auto first = MakeFlow(pair, "first", MakePrompt(200), MakeSpec(4));
    auto next = MakeFlow(pair, "next", MakePrompt(210, 9), MakeSpec(4));
    ASSERT_TRUE(first->Start().ok());
    ASSERT_TRUE(next->Start().ok());
    const Outcome outcome = first->Wait();
    EXPECT_EQ(DescribeTokens(next->Wait().tokens), DescribeTokens(Reference(MakePrompt(210, 9), MakeSpec(4))));
    if (bug) {
      EXPECT_FALSE(outcome.committed);
    } else {
      EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens(Reference(MakePrompt(200), MakeSpec(4))))
          << outcome.prefill;
    }
    ASSERT_TRUE(failpoints::Arm("").ok());
    EXPECT_TRUE(pair.BecomesClean());
  }
}

TEST_F(Handoff, TheDecodeWorkerDyingMidTransferEndsTheRequestAtOnce) {
  Pair pair;
  ASSERT_TRUE(failpoints::Arm("p.before_transfer=sleep(50)").ok());
  auto flow = MakeFlow(pair, "dying", MakePrompt(300), MakeSpec(6));
  ASSERT_TRUE(flow->Start().ok());
  ASSERT_TRUE(flow->WaitForTokens(1));
  pair.hub_->Fail(pair.decode_transport->address());
  pair.decode_loop->KeepOnlyRouter({}, "its router is gone");
  const Outcome outcome = flow->Wait();
  EXPECT_FALSE(outcome.prefill.ok());
  EXPECT_LE(outcome.tokens.size(), 1u);
  EXPECT_TRUE(pair.BecomesClean());
}

}  // namespace
}  // namespace millrace
