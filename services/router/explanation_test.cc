// SPDX-License-Identifier: Apache-2.0
// What is made of a record: a request that was tried twice, one that runs, and that nothing is invented.
#include "services/router/explanation.h"

#include <gtest/gtest.h>

#include <string>

namespace millrace::router {
namespace {

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);
absl::Time At(double ms) { return kStart + absl::Milliseconds(ms); }

// Records as the router does: wait and decision with the number of attempts so far, the rest with its own.
std::shared_ptr<RequestTrace> TriedTwice(TraceLog& log) {
  auto trace = log.Begin("req-1", "POST /v1/completions", "", kStart);
  const uint64_t generation = trace->Begin(Phase::kGeneration, At(1), {});
  const auto begin = [&](Phase phase, double ms, uint32_t attempt, const char* worker = "") {
    return trace->Begin(phase, At(ms), {.attempt = attempt, .worker = worker, .parent = generation});
  };
  trace->End(begin(Phase::kQueue, 1, 0), At(3));
  trace->End(begin(Phase::kPlacement, 3, 0), At(3), absl::StatusCode::kOk,
             {{"prefill_fit", 2}, {"prefill_waiting_tokens", 0}, {"decode_fit", 1}, {"decode_use_percent", 12}});
  trace->End(begin(Phase::kReserve, 3, 1, "decode-0"), At(4));
  trace->End(begin(Phase::kPrefill, 4, 1, "prefill-0"), At(20), absl::StatusCode::kUnavailable);
  trace->End(begin(Phase::kQueue, 20, 1), At(21));
  trace->End(begin(Phase::kReserve, 21, 2, "decode-0"), At(22));
  trace->End(begin(Phase::kPrefill, 22, 2, "prefill-1"), At(52), absl::StatusCode::kOk,
             {{"tokens", 600}, {"cached_tokens", 0}, {"queue_us", 2000}, {"compute_us", 27500}});
  trace->End(begin(Phase::kHandoff, 52, 2, "prefill-1"), At(60), absl::StatusCode::kOk,
             {{"bytes", 3 << 20}, {"extents", 34}, {"resent", 1}, {"transfer_us", 4000}});
  trace->End(begin(Phase::kDecode, 52, 2, "decode-0"), At(152));
  trace->End(generation, At(152), absl::StatusCode::kOk, {{"tokens", 12}});
  trace->AddNumber(0, "input_tokens", 600);
  trace->AddNumber(0, "output_tokens", 12);
  return trace;
}

const Json* Find(const Json& explanation, const std::string& name, int attempt) {
  for (const Json& phase : explanation["phases"]) {
    if (phase["name"] == name && phase["attempt"] == attempt) return &phase;
  }
  return nullptr;
}

TEST(Explanation, SaysWhyWhereHowLongAndWhatMoved) {
  TraceLog log({});
  TriedTwice(log)->Close(At(153), absl::StatusCode::kOk, 200);
  const Json json = ExplanationJson(*log.Find("req-1"), At(1000));
  EXPECT_EQ(json["state"], "ended");
  EXPECT_EQ(json["outcome"], "ok");
  EXPECT_EQ(json["http_status"], 200);
  EXPECT_DOUBLE_EQ(json["total_ms"], 153);
  EXPECT_DOUBLE_EQ(json["age_ms"], 1000);
  EXPECT_EQ(json["input_tokens"], 600);
  EXPECT_EQ(json["output_tokens"], 12);
  EXPECT_EQ(json["attempts"], 2);
  EXPECT_EQ(json["bytes_moved"], 3 << 20);
  EXPECT_EQ(json["extents_resent"], 1);
  ASSERT_EQ(json["phases"].size(), 10u);
  for (size_t i = 1; i < json["phases"].size(); ++i) {
    EXPECT_GE(json["phases"][i]["start_ms"], json["phases"][i - 1]["start_ms"]);
  }
  EXPECT_EQ(
      (*Find(json, "placement", 1))["detail"],
      "of 2 prefill workers with room it had the fewest prompt tokens waiting (0); of 1 decode worker with room it "
      "was the least used (12 %)");
  EXPECT_EQ((*Find(json, "prefill", 1))["outcome"], "unavailable");
  EXPECT_EQ((*Find(json, "prefill", 1))["detail"], "");
  EXPECT_EQ((*Find(json, "queue", 1))["detail"], "waiting for a place");
  EXPECT_EQ((*Find(json, "queue", 2))["detail"], "waiting for another pair, after the one before failed");
  EXPECT_EQ((*Find(json, "prefill", 2))["detail"], "2.0 ms in its queue, 27.5 ms computing 600 tokens");
  EXPECT_DOUBLE_EQ((*Find(json, "prefill", 2))["ms"], 30);
  EXPECT_EQ((*Find(json, "handoff", 2))["detail"], "3.0 MiB in 34 extents, 1 sent again");
  EXPECT_EQ((*Find(json, "decode", 2))["worker"], "decode-0");
}

TEST(Explanation, WhatRunsIsShownAsFarAsItIs) {
  TraceLog log({});
  auto trace = log.Begin("req-2", "POST /v1/chat/completions", "", kStart);
  trace->Begin(Phase::kQueue, At(1));
  const Json json = ExplanationJson(*log.Find("req-2"), At(11));
  EXPECT_EQ(json["state"], "running");
  EXPECT_EQ(json["outcome"], "");
  EXPECT_DOUBLE_EQ(json["total_ms"], 11);
  EXPECT_EQ(json["phases"][0]["outcome"], "running");
  EXPECT_DOUBLE_EQ(json["phases"][0]["ms"], 10);
  EXPECT_FALSE(ExplanationSummaryJson(*log.Find("req-2"), At(11)).contains("phases"));
  trace->Close(At(12), absl::StatusCode::kCancelled, 499);
}

}  // namespace
}  // namespace millrace::router
