// SPDX-License-Identifier: Apache-2.0
// Placement as a function: capacity, load, health and compatibility in, a pair or the reason out.
#include "services/router/placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "services/common/error.h"

namespace millrace::router {
namespace {

const TimePoint kNow = TimePoint() + std::chrono::hours(1);

WorkerView Worker(v1::Role role, const std::string& name, const std::string& hash = "h1") {
  WorkerView worker;
  worker.role = role;
  worker.name = name;
  worker.ready = true;
  worker.serves.set_compat_hash(hash);
  v1::Capacity* capacity = worker.serves.mutable_capacity();
  capacity->set_pages_total(16);
  capacity->set_page_tokens(128);
  capacity->set_slots_total(4);
  capacity->set_max_context_tokens(4096);
  capacity->set_max_queue(2);
  worker.status.set_state(v1::WORKER_STATE_READY);
  worker.last_heard = kNow;
  return worker;
}
WorkerView P(const std::string& name, const std::string& hash = "h1") { return Worker(v1::ROLE_PREFILL, name, hash); }
WorkerView D(const std::string& name, const std::string& hash = "h1") { return Worker(v1::ROLE_DECODE, name, hash); }

ClusterSnapshot Cluster(std::vector<WorkerView> workers) {
  ClusterSnapshot snapshot;
  snapshot.workers = std::move(workers);
  return snapshot;
}

// "p0/d1", or the error's code.
std::string Choose(const ClusterSnapshot& snapshot, int64_t prompt = 100, int64_t max_tokens = 28) {
  const auto pair = ChoosePair(snapshot, {prompt, max_tokens}, kNow);
  if (!pair.ok()) return ToPublicError(pair.status()).error.code;
  return snapshot.workers[pair->prefill].name + "/" + snapshot.workers[pair->decode].name;
}

TEST(Placement, EqualWorkersGoToTheLowerName) {
  EXPECT_EQ(Choose(Cluster({P("p0"), P("p1"), D("d0"), D("d1")})), "p0/d0");
}

TEST(Placement, TheLeastLoadedIsTaken) {
  auto p0 = P("p0"), p1 = P("p1"), d0 = D("d0"), d1 = D("d1");
  p0.assigned = {.requests = 1, .prompt_tokens = 500};
  p1.assigned = {.requests = 1, .prompt_tokens = 20};
  d0.assigned = {.requests = 1, .pages = 9};
  d1.assigned = {.requests = 2, .pages = 2};
  EXPECT_EQ(Choose(Cluster({p0, p1, d0, d1})), "p1/d1");
  const Pair why = *ChoosePair(Cluster({p0, p1, d0, d1}), {100, 28}, kNow);
  EXPECT_EQ(why.prefill_fit, 2);
  EXPECT_EQ(why.decode_fit, 2);
  EXPECT_EQ(why.prefill_waiting_tokens, 20);
  EXPECT_EQ(why.decode_use, 0.5);  // two of four slots, which is more than two of sixteen pages
}

TEST(Placement, OnlyEqualHashesPair) {
  auto p1 = P("p1", "h2");
  p1.assigned = {.requests = 3, .prompt_tokens = 9999};
  EXPECT_EQ(Choose(Cluster({P("p0", "h1"), p1, D("d0", "h2")})), "p1/d0");
  EXPECT_EQ(Choose(Cluster({P("p0", "h1"), D("d0", "h2")})), "no_compatible_pair");
}

TEST(Placement, MissingRolesAreNamed) {
  EXPECT_EQ(Choose(Cluster({})), "no_capacity");
  EXPECT_EQ(Choose(Cluster({P("p0")})), "no_capacity");
  EXPECT_EQ(Choose(Cluster({D("d0")})), "no_capacity");
}

TEST(Placement, WorkersThatLoadDrainWaitOrFallSilentGetNothing) {
  for (v1::WorkerState state : {v1::WORKER_STATE_LOADING, v1::WORKER_STATE_DRAINING, v1::WORKER_STATE_WAITING}) {
    auto d0 = D("d0");
    d0.status.set_state(state);
    EXPECT_EQ(Choose(Cluster({P("p0"), d0, D("d1")})), "p0/d1");
    EXPECT_EQ(Choose(Cluster({P("p0"), d0})), "no_capacity");
  }
  auto silent = D("d0");
  silent.last_heard = kNow - milliseconds(1501);
  EXPECT_EQ(Choose(Cluster({P("p0"), silent})), "no_capacity");
  silent.last_heard = kNow - milliseconds(1500);
  EXPECT_EQ(Choose(Cluster({P("p0"), silent})), "p0/d0");
}

TEST(Placement, RoomIsCountedToTheLastPageAndSlot) {
  auto d0 = D("d0");
  d0.assigned.pages = 15;
  EXPECT_EQ(Choose(Cluster({P("p0"), d0}), 100, 28), "p0/d0");       // one page of 128
  EXPECT_EQ(Choose(Cluster({P("p0"), d0}), 100, 29), "overloaded");  // two
  d0.assigned = {.requests = 4, .pages = 4};
  EXPECT_EQ(Choose(Cluster({P("p0"), d0}), 100, 28), "overloaded");
}

TEST(Placement, PrefillTakesItsSlotsAndItsQueueAndNoMore) {
  auto p0 = P("p0");
  p0.assigned.requests = 5;
  EXPECT_EQ(Choose(Cluster({p0, D("d0")})), "p0/d0");
  p0.assigned.requests = 6;
  EXPECT_EQ(Choose(Cluster({p0, D("d0")})), "overloaded");
}

TEST(Placement, AWorkerThatRefusedIsFullUntilItIsHeardAgain) {
  auto d0 = D("d0");
  d0.saturated = true;
  EXPECT_EQ(Choose(Cluster({P("p0"), d0, D("d1")})), "p0/d1");
  EXPECT_EQ(Choose(Cluster({P("p0"), d0})), "overloaded");
}

TEST(Placement, WhatCanNeverFitIsTheCallersFault) {
  EXPECT_EQ(Choose(Cluster({P("p0"), D("d0")}), 2000, 48), "p0/d0");  // 16 pages exactly
  EXPECT_EQ(Choose(Cluster({P("p0"), D("d0")}), 2000, 49), "context_length_exceeded");
  EXPECT_EQ(Choose(Cluster({P("p0"), D("d0")}), 5000, 1), "context_length_exceeded");
  auto large = D("d1");
  large.serves.mutable_capacity()->set_pages_total(64);
  large.assigned.requests = 4;  // full now, but it could
  EXPECT_EQ(Choose(Cluster({P("p0"), D("d0"), large}), 2000, 49), "overloaded");
}

TEST(Placement, ExpertsAreNobodysPair) {
  EXPECT_EQ(Choose(Cluster({P("p0"), D("d0"), Worker(v1::ROLE_EXPERT, "e0")})), "p0/d0");
}

}  // namespace
}  // namespace millrace::router
