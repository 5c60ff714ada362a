// SPDX-License-Identifier: Apache-2.0
// A hand-off as a whole: prefill loop, transport, decode loop, on the demo checkpoint, against one process.
//
// The test plays the router. Tokens and log-probabilities must be the bits of a single engine, whatever the length, the
// chunks and the company; refusals name what is missing; and whatever ends a request, every page and slot comes back.
// What happens when something fails on the way is handoff_fault_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/decode/handoff_pair.h"

namespace millrace {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST_F(Handoff, EveryLengthGivesTheBitsOfOneProcess) {
  Pair pair;
  for (int64_t length : {1, 2, 3, 4, 5, 6, 127, 128, 129, 130, 131, 132, 133, 255, 256, 257, 258, 384, 513}) {
    const auto prompt = MakePrompt(length);
    const auto spec = MakeSpec(12);
    const Outcome outcome = RunOne(pair, absl::StrCat("length-", length), prompt, spec);
    EXPECT_TRUE(outcome.prefill.ok()) << outcome.prefill;
    EXPECT_TRUE(outcome.decode.ok()) << outcome.decode;
    EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens(Reference(prompt, spec))) << "length " << length;
  }
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, DecodeCrossesCompressionBoundariesAsOneProcessDoes) {
  Pair pair;
  const auto prompt = MakePrompt(126);
  const auto spec = MakeSpec(140);
  EXPECT_EQ(DescribeTokens(RunOne(pair, "long", prompt, spec).tokens), DescribeTokens(Reference(prompt, spec)));
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, CompanyChangesNothing) {
  Pair pair;
  std::vector<std::shared_ptr<Flow>> flows;
  std::vector<std::string> expected;
  for (int i = 0; i < 10; ++i) {
    const auto prompt = MakePrompt(1 + 37 * i, static_cast<uint32_t>(i));
    const auto spec = MakeSpec(static_cast<uint32_t>(3 + i));
    expected.push_back(DescribeTokens(Reference(prompt, spec)));
    flows.push_back(MakeFlow(pair, absl::StrCat("together-", i), prompt, spec));
    ASSERT_TRUE(flows.back()->Start().ok());
  }
  for (size_t i = 0; i < flows.size(); ++i) EXPECT_EQ(DescribeTokens(flows[i]->Wait().tokens), expected[i]) << i;
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, ARequestThatEndsWithItsFirstTokenAbortsItsLease) {
  Pair pair;
  const Outcome outcome = RunOne(pair, "one", MakePrompt(20), MakeSpec(1));
  EXPECT_EQ(outcome.tokens.size(), 1u);
  EXPECT_TRUE(outcome.ended_by_first);
  EXPECT_FALSE(outcome.committed);
  EXPECT_EQ(outcome.decode.code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, EndedIsSaidWhenTheAbortOfTheLeaseWasAnswered) {
  Pair pair;
  pair.client.HoldAborts();
  auto flow = MakeFlow(pair, "one", MakePrompt(20), MakeSpec(1));
  ASSERT_TRUE(flow->Start().ok());
  ASSERT_TRUE(flow->WaitForTokens(1));
  for (const absl::Time end = MonotonicNow() + kPatience; !pair.client.Holding() && MonotonicNow() < end;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  // The lease lives: a router that was told "ended" now would book its pages as free.
  EXPECT_FALSE(flow->so_far().ended_by_first);
  EXPECT_FALSE(flow->so_far().prefill_closed);
  pair.client.LetThrough();
  const Outcome outcome = flow->Wait();
  EXPECT_TRUE(outcome.ended_by_first);
  EXPECT_TRUE(outcome.prefill.ok()) << outcome.prefill;
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, CancelAtAnyPointGivesEverythingBack) {
  Pair pair;
  for (int point = 0; point < 4; ++point) {
    auto flow = MakeFlow(pair, absl::StrCat("cancel-", point), MakePrompt(400), MakeSpec(200));
    ASSERT_TRUE(flow->Start().ok());
    if (point > 0) {
      ASSERT_TRUE(flow->WaitForTokens(point == 1 ? 1 : 10));
    }
    flow->CancelPrefill();  // at 2 and 3 it has long ended, and the hand-off stands
    if (point >= 2) flow->CancelDecode();
    const Outcome outcome = flow->Wait();
    // A cancel of prefill can come when the hand-off already stands; then decode goes on to its end.
    EXPECT_TRUE(!outcome.decode.ok() || (point == 1 && outcome.committed)) << point;
    EXPECT_TRUE(pair.BecomesClean()) << point;
  }
}

TEST_F(Handoff, AbortIsAnsweredWhenTheMemoryIsBack) {
  Pair pair;
  auto flow = MakeFlow(pair, "abort", MakePrompt(300), MakeSpec(200));
  ASSERT_TRUE(flow->Start().ok());
  ASSERT_TRUE(flow->WaitForTokens(5));
  v1::AbortLeaseRequest request;
  *request.mutable_lease() = flow->lease();
  std::atomic<int> answer{0};
  pair.decode_loop->Abort(request, [&](absl::StatusOr<v1::AbortLeaseResponse> response) {
    const CacheUsage usage = pair.decode_engine->Usage();
    answer.store(response->was_live() && usage.pages_free == usage.pages_total ? 1 : 2);
  });
  flow->Wait();
  EXPECT_TRUE(pair.BecomesClean());
  EXPECT_EQ(answer.load(), 1);
}

TEST_F(Handoff, ALeaseThatIsNotRenewedEnds) {
  Pair pair;
  auto reserve = pair.MakeReserve("forgotten", MakePrompt(100), MakeSpec(5));
  reserve.set_ttl_ms(1000);
  ASSERT_TRUE(pair.Reserve(reserve).ok());
  EXPECT_FALSE(pair.Clean());
  EXPECT_TRUE(pair.BecomesClean());
}

TEST_F(Handoff, AFullDecodeWorkerRefusesAndSaysWhatIsMissing) {
  Pair::Options options;
  options.decode_pages = 4;
  Pair pair(options);
  ASSERT_TRUE(pair.Reserve(pair.MakeReserve("first", MakePrompt(300), MakeSpec(5))).ok());
  const auto second = pair.Reserve(pair.MakeReserve("second", MakePrompt(300), MakeSpec(5)));
  EXPECT_EQ(second.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("pages"));
}

TEST_F(Handoff, AnotherCompatibilityHashIsRefusedOnBothSides) {
  Pair pair;
  auto reserve = pair.MakeReserve("other", MakePrompt(10), MakeSpec(5));
  reserve.set_compat_hash("different");
  EXPECT_EQ(pair.Reserve(reserve).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(Handoff, AnOlderAttemptIsStale) {
  Pair pair;
  const auto prompt = MakePrompt(50);
  ASSERT_TRUE(pair.Reserve(pair.MakeReserve("again", prompt, MakeSpec(5), 2)).ok());
  EXPECT_EQ(pair.Reserve(pair.MakeReserve("again", prompt, MakeSpec(5), 1)).status().code(),
            absl::StatusCode::kAlreadyExists);
  ASSERT_TRUE(pair.Reserve(pair.MakeReserve("again", prompt, MakeSpec(5), 3)).ok());
  pair.decode_loop->KeepOnlyRouter({}, "test");
  ASSERT_TRUE(pair.BecomesClean());
  EXPECT_EQ(pair.Reserve(pair.MakeReserve("again", prompt, MakeSpec(5), 3)).status().code(),
            absl::StatusCode::kAborted);
}

// Whoever knows an epoch may write into its lease: what anybody can scrape must not say it.
TEST_F(Handoff, AGuessedEpochIsRefusedAndCountedAndMetricsDoNotTellIt) {
  Pair pair;
  const auto reserved = pair.Reserve(pair.MakeReserve("guessed", MakePrompt(50), MakeSpec(5)));
  ASSERT_TRUE(reserved.ok());
  v1::RenewRequest guess;
  *guess.mutable_lease() = reserved->lease();
  guess.mutable_lease()->set_epoch(reserved->lease().epoch() ^ 1);
  std::promise<absl::Status> answer;
  pair.decode_loop->Renew(guess,
                          [&](absl::StatusOr<v1::RenewResponse> response) { answer.set_value(response.status()); });
  EXPECT_EQ(answer.get_future().get().code(), absl::StatusCode::kAborted);
  const std::string text = RenderMetrics(pair.registry);
  EXPECT_THAT(text, HasSubstr("millrace_lease_epoch_mismatches_total{role=\"decode\",worker=\"decode-0\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("millrace_leases_granted_total{role=\"decode\",worker=\"decode-0\"} 1\n"));
  // As an integer, and as a gauge would print it.
  const uint64_t epoch = reserved->lease().epoch();
  EXPECT_THAT(text, Not(HasSubstr(absl::StrCat(epoch).substr(0, 10))));
  EXPECT_THAT(text, Not(HasSubstr(absl::StrFormat("%.15e", static_cast<double>(epoch)).substr(0, 10))));
}

TEST_F(Handoff, ASlowReaderHoldsBackOnlyItsOwnSequence) {
  Pair pair;
  auto slow = MakeFlow(pair, "slow", MakePrompt(30), MakeSpec(300));
  ASSERT_TRUE(slow->Start().ok());
  ASSERT_TRUE(slow->WaitForTokens(3));
  slow->SetCongested(true);
  EXPECT_EQ(RunOne(pair, "quick", MakePrompt(40), MakeSpec(20)).tokens.size(), 20u);
  slow->SetCongested(false);
  const Outcome outcome = slow->Wait();
  EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens(Reference(MakePrompt(30), MakeSpec(300))));
}

TEST_F(Handoff, MigrationContinuesTheSequenceOfOneProcess) {
  Pair pair;
  const auto prompt = MakePrompt(120);
  const auto whole = Reference(prompt, MakeSpec(20));
  // Seven tokens were delivered when the decode worker was lost; a second attempt goes on from there.
  auto longer = prompt;
  for (int i = 0; i < 7; ++i) longer.push_back(static_cast<int32_t>(whole[i].id()));
  auto spec = MakeSpec(20);
  spec.set_prior_tokens(7);
  const Outcome outcome = RunOne(pair, "migrated", longer, spec);
  EXPECT_EQ(DescribeTokens(outcome.tokens), DescribeTokens({whole.begin() + 7, whole.end()}));
}

}  // namespace
}  // namespace millrace
