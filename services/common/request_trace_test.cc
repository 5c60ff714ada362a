// SPDX-License-Identifier: Apache-2.0
// Trace context on the wire, what a record holds, and what is kept of it.
#include "services/common/request_trace.h"

#include <gtest/gtest.h>

namespace millrace {
namespace {

constexpr char kParent[] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

TEST(TraceContext, IsReadAndWrittenAsW3CHasIt) {
  const auto context = TraceContext::Parse(kParent);
  ASSERT_TRUE(context.has_value());
  EXPECT_TRUE(context->sampled);
  EXPECT_EQ(context->TraceId(), "0af7651916cd43dd8448eb211c80319c");
  EXPECT_EQ(context->Traceparent(), kParent);
  EXPECT_FALSE(TraceContext::Parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")->sampled);
  // A later version may carry more.
  EXPECT_TRUE(TraceContext::Parse("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what"));
}

TEST(TraceContext, WhatIsMalformedIsNoContext) {
  for (const char* bad : {"", "00", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0", "banana-split",
                          "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                          "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
                          "00-00000000000000000000000000000000-b7ad6b7169203331-01",
                          "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
                          "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
                          "00_0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}) {
    EXPECT_FALSE(TraceContext::Parse(bad).has_value()) << bad;
  }
}

TEST(RequestTrace, AClientsTraceGoesOnAndItsDecisionIsKept) {
  TraceLog log({.sample_ratio = 0});
  const auto trace = log.Begin("r1", "chat", kParent, kStart);
  EXPECT_EQ(trace->trace_id(), "0af7651916cd43dd8448eb211c80319c");
  EXPECT_TRUE(trace->ContextOf(0).sampled);
  const TraceView view = trace->View();
  EXPECT_EQ(view.phases[0].parent, 0xb7ad6b7169203331u);
  EXPECT_NE(view.phases[0].span, view.phases[0].parent);
  TraceLog all({.sample_ratio = 1});
  EXPECT_FALSE(
      all.Begin("r2", "chat", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", kStart)->ContextOf(0).sampled);
}

TEST(RequestTrace, TheRatioIsKeptOverManyTraces) {
  TraceLog log({.sample_ratio = 0.25, .max_closed = 0});
  int sampled = 0;
  for (int i = 0; i < 4000; ++i) sampled += log.Begin("r", "chat", "", kStart)->ContextOf(0).sampled;
  EXPECT_GT(sampled, 800);  // seven standard deviations below 1000
  EXPECT_LT(sampled, 1200);
}

TEST(RequestTrace, PhasesHaveParentsTimesAndNumbers) {
  TraceLog log({});
  const auto trace = log.Begin("r1", "chat", "", kStart);
  const uint64_t whole = trace->Begin(Phase::kGeneration, kStart);
  const uint64_t queue =
      trace->Begin(Phase::kQueue, kStart, {.choice = 1, .attempt = 2, .worker = "w", .parent = whole});
  trace->End(queue, kStart + absl::Milliseconds(5), absl::StatusCode::kUnavailable, {{"tokens", 7}});
  trace->End(queue, kStart + absl::Hours(1));  // ended already
  const TraceView view = trace->View();
  ASSERT_EQ(view.phases.size(), 3u);
  EXPECT_EQ(view.phases[1].parent, view.phases[0].span);
  EXPECT_TRUE(view.phases[1].open());
  const PhaseRecord& record = view.phases[2];
  EXPECT_EQ(record.parent, whole);
  EXPECT_EQ(record.end - record.begin, absl::Milliseconds(5));
  EXPECT_EQ(record.code, absl::StatusCode::kUnavailable);
  EXPECT_EQ(record.numbers, (std::vector<std::pair<const char*, int64_t>>{{"tokens", 7}}));
  EXPECT_EQ(record.worker, "w");
  EXPECT_EQ(record.attempt, 2u);
}

TEST(RequestTrace, ClosingEndsWhatIsOpenAndIsToldOnce) {
  int told = 0;
  TraceLog log({.sample_ratio = 1, .on_sampled = [&](const TraceView& view) {
                  ++told;
                  EXPECT_TRUE(view.closed);
                  for (const PhaseRecord& phase : view.phases) EXPECT_FALSE(phase.open());
                }});
  const auto trace = log.Begin("r1", "chat", "", kStart);
  trace->Begin(Phase::kDecode, kStart);
  trace->Close(kStart + absl::Seconds(1), absl::StatusCode::kCancelled, 499);
  trace->Close(kStart + absl::Seconds(2), absl::StatusCode::kOk, 200);
  EXPECT_EQ(told, 1);
  EXPECT_EQ(log.Find("r1")->http_status, 499);
}

TEST(RequestTrace, IsBounded) {
  TraceLog log({.max_closed = 2});
  const auto trace = log.Begin("r0", "chat", "", kStart);
  for (size_t i = 0; i < 2 * RequestTrace::kMaxPhases; ++i) trace->Begin(Phase::kQueue, kStart);
  EXPECT_EQ(trace->View().phases.size(), RequestTrace::kMaxPhases);
  EXPECT_EQ(trace->View().phases_dropped, static_cast<int64_t>(RequestTrace::kMaxPhases) + 1);
  for (const char* id : {"r1", "r2", "r3"}) log.Begin(id, "chat", "", kStart)->Close(kStart, absl::StatusCode::kOk);
  EXPECT_FALSE(log.Find("r1").has_value());
  EXPECT_TRUE(log.Find("r2").has_value());
  EXPECT_TRUE(log.Find("r0").has_value());  // still running
  EXPECT_EQ(log.RequestIds(10), (std::vector<std::string>{"r0", "r3", "r2"}));
}

}  // namespace
}  // namespace millrace
