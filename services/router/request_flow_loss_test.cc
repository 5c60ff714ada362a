// SPDX-License-Identifier: Apache-2.0
// The life of a request whose workers die, drain, refuse or fail: what is tried again, what its client hears, and that
// nothing is left behind.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "services/common/error.h"
#include "services/router/request_flow_fixture.h"

namespace millrace::router {
namespace {

using ::testing::ElementsAre;

TEST_F(RequestFlowTest, ADeadDecodeWorkerEndsItsRequestsAtOnceAndAbortsPrefill) {
  auto running = OpenAndStart([](Script& s) { s.hold_commit = true; });
  ASSERT_TRUE(running.sink->WaitTokens(1));
  Die(decode_connection_);
  ASSERT_TRUE(running.sink->WaitEnd(absl::Seconds(1)));
  EXPECT_EQ(running.sink->code(), "worker_lost");
  EXPECT_TRUE(ToPublicError(running.sink->error()).error.retry_after_s.has_value());
  EXPECT_TRUE(Eventually([&] { return prefill_->live_prompts() == 0 && flow_->open_attempts() == 0; }));
}

TEST_F(RequestFlowTest, BeforeItsFirstTokenARequestOutlivesItsPrefillWorker) {
  auto running = OpenAndStart([](Script& s) { s.hold_prefill = true; });
  ASSERT_TRUE(Eventually([&] { return prefill_->live_prompts() == 1; }));
  Die(prefill_connection_);
  ASSERT_TRUE(Eventually([&] { return decode_->live_leases() == 0; }));  // of the attempt that is over
  Set([](Script& s) { s.hold_prefill = false; });
  JoinOne(v1::ROLE_PREFILL, "p1", {1, 7}, prefill_server_->address(), prefill_connection_);
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_TRUE(running.sink->error().ok()) << running.sink->error();
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101, 102, 103, 104));
  running.sink->CheckContract();
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ARequestThatTwoWorkersDiedOfIsNotGivenToAThird) {
  auto running = OpenAndStart([](Script& s) { s.hold_prefill = true; });
  ASSERT_TRUE(Eventually([&] { return prefill_->live_prompts() == 1; }));
  Die(prefill_connection_);
  ASSERT_TRUE(Eventually([&] { return prefill_->live_prompts() == 0; }));
  JoinOne(v1::ROLE_PREFILL, "p1", {1, 7}, prefill_server_->address(), prefill_connection_);
  ASSERT_TRUE(Eventually([&] { return prefill_->live_prompts() == 1; }));
  Die(prefill_connection_);
  ASSERT_TRUE(running.sink->WaitEnd(absl::Seconds(1)));
  EXPECT_EQ(running.sink->code(), "worker_lost");
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, WhenNobodyComesItsPatienceEndsWithTheReason) {
  auto running = OpenAndStart([](Script& s) { s.hold_prefill = true; }, {.queue_timeout = milliseconds(300)});
  ASSERT_TRUE(Eventually([&] { return prefill_->live_prompts() == 1; }));
  Die(prefill_connection_);
  ASSERT_TRUE(running.sink->WaitEnd(absl::Seconds(5)));
  EXPECT_EQ(running.sink->code(), "worker_lost");
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ADrainingPrefillWorkersRefusalIsTriedElsewhere) {
  auto running = OpenAndStart([](Script& s) { s.prefill_refusal = absl::UnavailableError("draining"); });
  ASSERT_TRUE(Eventually([&] { return metrics_.requeues.Value() >= 1; }));
  Set([](Script& s) { s.prefill_refusal = absl::OkStatus(); });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_TRUE(running.sink->error().ok()) << running.sink->error();
  running.sink->CheckContract();
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ADrainedWorkersLastWordsAreHeardAfterItHasLeft) {
  auto running = OpenAndStart([](Script& s) { s.hold_decode = true, s.decode_error_at = 2; });
  ASSERT_TRUE(running.sink->WaitTokens(2));
  loop_.Call([&](TimePoint now) {
    v1::WorkerMessage message;
    message.mutable_status()->set_state(v1::WORKER_STATE_DRAINING);
    ASSERT_TRUE(registry_.OnMessage(decode_connection_, message, now).ok());
    joined_.erase(decode_connection_.get());
    registry_.OnDisconnected(decode_connection_, now);  // its other streams still have something in them
  });
  Set([](Script& s) { s.hold_decode = false; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_TRUE(running.sink->error().ok()) << running.sink->error();
  EXPECT_EQ(running.sink->ids().size(), 5u);
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, PrefillsDeathAfterTheHandoffCostsNothing) {
  auto running = OpenAndStart([](Script& s) { s.hold_decode = true, s.decode_error_at = 2; });
  ASSERT_TRUE(running.sink->WaitTokens(2));
  Die(prefill_connection_);
  Set([](Script& s) { s.hold_decode = false; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_EQ(running.sink->ids().size(), 5u);
  EXPECT_TRUE(running.sink->error().ok());
}

TEST_F(RequestFlowTest, WorkersErrorsBecomeTheClientsWithoutTheirWords) {
  OpenWithWorkers();
  const struct {
    absl::Status error;
    const char* code;
  } kCases[] = {
      {absl::UnavailableError("expert-1 at 10.0.0.7:99"), "worker_lost"},
      {absl::DataLossError("extent 7 of lease 12"), "handoff_failed"},
      {absl::InternalError("logits of /models/x"), "internal_error"},
      {absl::AbortedError("stale epoch"), "lease_lost"},
      // Late without the request's deadline having passed: a stage of ours, which is named and not its fault.
      {absl::DeadlineExceededError("Commit to 10.0.0.7"), "worker_late"},
      {MakeError(absl::StatusCode::kUnavailable, "expert-1, layer 3", {.code = "experts_late"}), "experts_late"},
      {MakeError(absl::StatusCode::kUnavailable, "decode-0", {.code = "handoff_late"}), "handoff_late"}};
  for (const auto& c : kCases) {
    Set([&](Script& s) { s.prefill_error_after_first = c.error; });
    auto running = Start(Request());
    ASSERT_TRUE(running.sink->WaitEnd());
    EXPECT_EQ(running.sink->code(), c.code);
    EXPECT_EQ(running.sink->error().message().find(c.error.message()), absl::string_view::npos);
    if (c.error.code() != absl::StatusCode::kInternal) {
      EXPECT_EQ(running.sink->error().code(), absl::StatusCode::kUnavailable) << c.code;
    }
    ExpectNothingLeft();
  }
}

TEST_F(RequestFlowTest, ADecodeErrorMidStreamEndsTheRequestAfterItsTokens) {
  auto running =
      OpenAndStart([](Script& s) { s.decode_error = absl::UnavailableError("gone"), s.decode_error_at = 3; });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_THAT(running.sink->ids(), ElementsAre(100, 101, 102));
  EXPECT_EQ(running.sink->code(), "worker_lost");
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, ARefusedReservationWaitsItsTurnAndIsServed) {
  auto running = OpenAndStart([](Script& s) {
    s.reserve_refusals = {absl::ResourceExhaustedError("full"), absl::ResourceExhaustedError("full")};
  });
  ASSERT_TRUE(running.sink->WaitEnd());
  EXPECT_TRUE(running.sink->error().ok()) << running.sink->error();
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, AFullClusterIs429AfterTheQueuesPatience) {
  Set([](Script& s) { s.hold_decode = true, s.decode_error_at = 2; });
  OpenWithWorkers({.queue_timeout = milliseconds(200)});
  std::vector<Running> all;
  for (int i = 0; i < 8; ++i) all.push_back(Start(Request()));  // every slot of the decode worker
  for (auto& one : all) ASSERT_TRUE(one.sink->WaitTokens(2));
  auto late = Start(Request());
  ASSERT_TRUE(late.sink->WaitEnd());
  EXPECT_EQ(late.sink->code(), "overloaded");
  EXPECT_EQ(late.sink->error().code(), absl::StatusCode::kResourceExhausted);
  auto patient = Start(Request());
  Set([](Script& s) { s.hold_decode = false; });
  for (auto& one : all) ASSERT_TRUE(one.sink->WaitEnd());
  ASSERT_TRUE(patient.sink->WaitEnd());
  EXPECT_TRUE(patient.sink->error().ok());
  ExpectNothingLeft();
}

TEST_F(RequestFlowTest, AWorkerThatCameBackIsUsedWithoutRestartingAnything) {
  OpenWithWorkers();
  auto before = Start(Request());
  ASSERT_TRUE(before.sink->WaitEnd());
  ExpectNothingLeft();  // the fake keeps its leases over its death
  Die(decode_connection_);
  EXPECT_FALSE(flow_->Ready().ok());
  JoinOne(v1::ROLE_DECODE, "d0", kDecode, decode_server_->address(), decode_connection_);
  auto after = Start(Request());
  ASSERT_TRUE(after.sink->WaitEnd());
  EXPECT_TRUE(after.sink->error().ok());
  ExpectNothingLeft();
}

}  // namespace
}  // namespace millrace::router
