// SPDX-License-Identifier: Apache-2.0
// The life of a request between good workers: its tokens, its record, and every way that it or its client can end it.
#include "services/router/request_flow.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "services/common/error.h"
#include "services/common/metric_catalogue.h"
#include "services/router/request_flow_fixture.h"

namespace millrace::router {
namespace {

using ::testing::ElementsAre;

TEST_F(RequestFlowTest, TokensArriveOnceInOrderAndEverythingIsGivenBack) {
  OpenWithWorkers();
  auto running = Start(Request(5));
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101, 102, 103, 104));
  EXPECT_EQ(running.sink->end(), GenerationEnd::kLength);
  EXPECT_EQ(running.sink->usage().completion_tokens, 5);
  EXPECT_EQ(running.sink->usage().prompt_tokens, 3);
  running.sink->CheckContract();
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, TheRecordSaysWhereTheTimeWent) {
  OpenWithWorkers();
  TraceLog log({});
  GenerationRequest request = Request(5);
  request.trace = log.Begin("mine", "test", "", absl::UnixEpoch());
  const auto trace = request.trace;
  auto running = Start(std::move(request));
  ASSERT_TRUE(running.sink->WaitEnd());
  ExpectNothingLeft();
  std::map<Phase, PhaseRecord> phases;
  for (const PhaseRecord& phase : trace->View().phases) {
    EXPECT_TRUE(phases.emplace(phase.phase, phase).second) << PhaseName(phase.phase) << " twice";
  }
  const uint64_t whole = phases[Phase::kGeneration].span;
  for (const Phase phase :
       {Phase::kQueue, Phase::kPlacement, Phase::kReserve, Phase::kPrefill, Phase::kHandoff, Phase::kDecode}) {
    SCOPED_TRACE(PhaseName(phase));
    ASSERT_TRUE(phases.contains(phase));
    EXPECT_FALSE(phases[phase].open());
    EXPECT_EQ(phases[phase].parent, whole);
    EXPECT_EQ(phases[phase].code, absl::StatusCode::kOk);
  }
  EXPECT_EQ(phases[Phase::kReserve].worker, "d0");
  EXPECT_EQ(phases[Phase::kPrefill].worker, "p0");
  EXPECT_LE(phases[Phase::kQueue].end, phases[Phase::kReserve].end);
  EXPECT_LE(phases[Phase::kReserve].end, phases[Phase::kPrefill].begin);
  EXPECT_LE(phases[Phase::kPrefill].end, phases[Phase::kDecode].begin);
}

TEST_F(RequestFlowTest, AFailureIsInTheRecordByItsStatus) {
  Set([](Script& s) { s.hold_commit = true; });
  OpenWithWorkers();
  TraceLog log({});
  GenerationRequest request = Request(5);
  request.trace = log.Begin("mine", "test", "", absl::UnixEpoch());
  const auto trace = request.trace;
  auto running = Start(std::move(request));
  ASSERT_TRUE(running.sink->WaitTokens(1));
  Die(decode_connection_);
  ASSERT_TRUE(running.sink->WaitEnd());
  for (const PhaseRecord& phase : trace->View().phases) {
    if (phase.phase == Phase::kRequest) continue;  // the front's to close
    EXPECT_FALSE(phase.open()) << PhaseName(phase.phase);
    const bool failed = phase.phase == Phase::kGeneration || phase.phase == Phase::kDecode;
    EXPECT_EQ(phase.code, failed ? absl::StatusCode::kUnavailable : phase.code) << PhaseName(phase.phase);
  }
}

TEST_F(RequestFlowTest, JoinsAreCounted) {
  OpenWithWorkers();
  std::this_thread::sleep_for(milliseconds(250));  // two sweeps
  EXPECT_EQ(CounterFamily(prometheus_, "millrace_router_worker_joins_total").Add({}).Value(), 2);
}

TEST_F(RequestFlowTest, FirstTokenDoesNotWaitForTheHandoff) {
  auto running = OpenAndStart([](Script& s) { s.hold_commit = true; });
  ASSERT_TRUE(running.sink->WaitTokens(1));
  EXPECT_THAT(running.sink->ids(), ElementsAre(100));
  Set([](Script& s) { s.hold_commit = false; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_EQ(running.sink->ids().size(), 5u);
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, FirstTokenMayBeTheLast) {
  auto running = OpenAndStart([](Script& s) { s.ends_at_prefill = true; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100));
  EXPECT_EQ(running.sink->end(), GenerationEnd::kEndOfSequence);
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ARepeatedTokenIsForwardedOnce) {
  auto running = OpenAndStart([](Script& s) { s.repeat_index = 2; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101, 102, 103, 104));
  running.sink->CheckContract();
}

TEST_F(RequestFlowTest, AGapEndsTheRequestInsteadOfBeingForwarded) {
  auto running = OpenAndStart([](Script& s) { s.skip_index = 2; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101));
  EXPECT_EQ(running.sink->error().code(), absl::StatusCode::kInternal);
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, CancelReachesBothWorkersInEveryPhase) {
  OpenWithWorkers();
  const std::vector<std::function<void(Script&)>> phases = {
      [](Script& s) { s.hold_prefill = true; }, [](Script& s) { s.hold_commit = true; },
      [](Script& s) { s.hold_decode = true, s.decode_error_at = 3; }};
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    Set(phases[phase]);
    auto running = Start(Request(8));
    if (phase > 0) {
      ASSERT_TRUE(running.sink->WaitTokens(phase == 1 ? 1 : 3));
    } else {
      std::this_thread::sleep_for(milliseconds(50));
    }
    running.generation->Cancel();
    ASSERT_TRUE(running.sink->WaitEnd());
    EXPECT_EQ(running.sink->error().code(), absl::StatusCode::kCancelled);
    running.sink->CheckContract();
    ExpectNothingLeft();
    Set([](Script& s) { s.hold_prefill = s.hold_commit = s.hold_decode = false, s.decode_error_at = 0; });
  }
}

TEST_F(RequestFlowTest, DroppingTheGenerationCancelsIt) {
  auto running = OpenAndStart([](Script& s) { s.hold_commit = true; });
  ASSERT_TRUE(running.sink->WaitTokens(1));
  running.generation.reset();
  ASSERT_TRUE(running.sink->WaitEnd());
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, WhatIsKnownAtOnceIsRefusedAtOnce) {
  Open({.max_requests = 1});
  auto sink = std::make_shared<RecordingSink>();
  EXPECT_EQ(ToPublicError(flow_->Start(Request(), sink).status()).error.code, "no_capacity");
  EXPECT_FALSE(flow_->Ready().ok());
  Join();
  EXPECT_TRUE(flow_->Ready().ok());
  EXPECT_EQ(ToPublicError(flow_->Start(Request(5000), sink).status()).error.code, "context_length_exceeded");
  GenerationRequest late = Request();
  late.deadline = std::chrono::steady_clock::now() - milliseconds(1);
  EXPECT_EQ(ToPublicError(flow_->Start(std::move(late), sink).status()).error.code, "deadline_unreachable");
  Set([](Script& s) { s.hold_prefill = true; });
  auto first = Start(Request());
  EXPECT_EQ(ToPublicError(flow_->Start(Request(), sink).status()).error.code, "overloaded");
  flow_->StopAccepting();
  EXPECT_EQ(ToPublicError(flow_->Start(Request(), sink).status()).error.code, "draining");
  EXPECT_FALSE(flow_->Ready().ok());
  first.generation->Cancel();
  ASSERT_TRUE(first.sink->WaitEnd());
}

TEST_F(RequestFlowTest, TheDeadlineEndsItWhereverItIs) {
  Set([](Script& s) { s.hold_prefill = true; });
  OpenWithWorkers();
  GenerationRequest request = Request();
  request.deadline = std::chrono::steady_clock::now() + milliseconds(200);
  auto running = Start(std::move(request));
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_EQ(running.sink->code(), "deadline_exceeded");
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, AnAbortIsRepeatedUntilItIsAnswered) {
  auto running = OpenAndStart([](Script& s) { s.hold_commit = true, s.abort_failures = 3; });
  ASSERT_TRUE(running.sink->WaitTokens(1));
  running.generation->Cancel();
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_GT(flow_->open_attempts(), 0);  // the client has its answer; the workers have not given theirs
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ALeaseIsRenewedWhileItLives) {
  auto running = OpenAndStart([](Script& s) { s.hold_commit = true; }, {.lease_ttl = milliseconds(300)});
  ASSERT_TRUE(running.sink->WaitTokens(1));
  EXPECT_TRUE(Eventually([&] { return decode_->renewals() >= 3; }));
  Set([](Script& s) { s.hold_commit = false; });
  ASSERT_TRUE(running.sink->WaitEnd());
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ManyMixedEndsLeaveNothing) {
  OpenWithWorkers();
  std::mt19937 random(4711);
  std::vector<Running> all;
  for (int i = 0; i < 300; ++i) {
    Set([&](Script& s) {
      s.hold_prefill = random() % 8 == 0;
      s.hold_commit = random() % 8 == 0;
      s.ends_at_prefill = random() % 8 == 0;
      s.abort_failures = random() % 4 == 0 ? 1 : 0;
      s.prefill_error_after_first = random() % 10 == 0 ? absl::DataLossError("x") : absl::OkStatus();
      if (random() % 10 == 0) s.reserve_refusals.push_back(absl::ResourceExhaustedError("full"));
    });
    auto sink = std::make_shared<RecordingSink>();
    auto started = flow_->Start(Request(1 + random() % 20), sink);
    if (started.ok()) all.push_back({sink, *std::move(started)});
    if (!all.empty() && random() % 3 == 0) all[random() % all.size()].generation->Cancel();
    if (random() % 4 == 0) std::this_thread::sleep_for(milliseconds(random() % 10));
  }
  Set([](Script& s) {
    s.hold_prefill = s.hold_commit = s.ends_at_prefill = false;
    s.prefill_error_after_first = absl::OkStatus();
    s.reserve_refusals.clear();
  });
  for (auto& one : all) {
    ASSERT_TRUE(one.sink->WaitEnd(absl::Seconds(30)));
    one.sink->CheckContract();
  }
  ExpectNothingLeft();
}

}  // namespace
}  // namespace millrace::router
