// SPDX-License-Identifier: Apache-2.0
// Membership with time as an argument: who is in, who is gone, who is told.
#include "services/router/worker_registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace millrace::router {
namespace {

TimePoint At(int ms) { return TimePoint() + std::chrono::hours(1) + milliseconds(ms); }

struct FakeConnection : WorkerConnection {
  std::vector<v1::RouterMessage> sent;
  std::optional<absl::Status> closed;
  void Send(v1::RouterMessage message) override { sent.push_back(std::move(message)); }
  void Close(absl::Status status) override { closed = std::move(status); }
  // The newest expert list sent: names joined, those that drain in brackets.
  std::string Peers() const {
    std::string names = "none";
    for (const auto& message : sent) {
      if (!message.has_peers()) continue;
      names.clear();
      for (const auto& peer : message.peers().experts()) {
        names += peer.draining() ? "(" + peer.name() + ") " : peer.name() + " ";
      }
    }
    return names;
  }
};

v1::WorkerMessage Hello(v1::Role role, const std::string& name, uint64_t incarnation) {
  v1::WorkerMessage message;
  v1::WorkerHello* hello = message.mutable_hello();
  hello->set_role(role);
  hello->set_name(name);
  hello->mutable_incarnation()->set_low(incarnation);
  hello->set_wire_version(1);
  hello->set_control_address("127.0.0.1:1");
  return message;
}
v1::WorkerMessage Ready(v1::Role role) {
  v1::WorkerMessage message;
  v1::WorkerReady* ready = message.mutable_ready();
  ready->set_expert_compat_hash("e");
  if (role == v1::ROLE_EXPERT) {
    ready->mutable_experts()->add_experts(0);
    ready->mutable_capacity();
    return message;
  }
  ready->set_compat_hash("h");
  ready->mutable_capacity()->set_page_tokens(128);
  ready->mutable_capacity()->set_slots_total(1);
  ready->mutable_capacity()->set_max_context_tokens(1024);
  return message;
}
v1::WorkerMessage Status(uint64_t beat, v1::WorkerState state = v1::WORKER_STATE_READY) {
  v1::WorkerMessage message;
  message.mutable_status()->set_beat(beat);
  message.mutable_status()->set_state(state);
  return message;
}

class WorkerRegistryTest : public ::testing::Test {
 protected:
  WorkerRegistryTest() : registry_({.router = {1, 2}}) {
    registry_.set_on_gone([this](const WorkerView& worker, const std::string&, TimePoint) {
      gone_.push_back(worker.name + "#" + std::to_string(worker.incarnation.low));
    });
  }
  std::shared_ptr<FakeConnection> Join(v1::Role role, const std::string& name, uint64_t incarnation, int ms = 0) {
    auto connection = std::make_shared<FakeConnection>();
    EXPECT_TRUE(registry_.OnMessage(connection, Hello(role, name, incarnation), At(ms)).ok());
    return connection;
  }
  std::shared_ptr<FakeConnection> JoinReady(v1::Role role, const std::string& name, uint64_t incarnation) {
    auto connection = Join(role, name, incarnation);
    EXPECT_TRUE(registry_.OnMessage(connection, Ready(role), At(0)).ok());
    EXPECT_TRUE(registry_.OnMessage(connection, Status(1), At(0)).ok());
    return connection;
  }

  WorkerRegistry registry_;
  std::vector<std::string> gone_;
};

TEST_F(WorkerRegistryTest, AHelloIsWelcomedAndEachBeatEchoed) {
  auto connection = JoinReady(v1::ROLE_DECODE, "d0", 7);
  ASSERT_EQ(connection->sent.size(), 3u);
  EXPECT_EQ(connection->sent[0].welcome().heartbeat_ms(), 500u);
  EXPECT_TRUE(connection->sent[1].has_peers());
  EXPECT_EQ(connection->sent[2].echo(), 1u);
  EXPECT_TRUE(registry_.Snapshot().workers[0].Serving());
}

TEST_F(WorkerRegistryTest, AWorkerIsNotServingBeforeItSaidWhatItServes) {
  auto connection = Join(v1::ROLE_DECODE, "d0", 7);
  ASSERT_TRUE(registry_.OnMessage(connection, Status(1), At(0)).ok());
  EXPECT_FALSE(registry_.Snapshot().workers[0].Serving());
}

TEST_F(WorkerRegistryTest, SilenceIsDeathAfterThreeSecondsAndNotBefore) {
  auto connection = JoinReady(v1::ROLE_DECODE, "d0", 7);
  registry_.Sweep(At(3000));
  EXPECT_EQ(registry_.size(), 1u);
  registry_.Sweep(At(3001));
  EXPECT_EQ(registry_.size(), 0u);
  EXPECT_TRUE(connection->closed.has_value());
  EXPECT_THAT(gone_, ::testing::ElementsAre("d0#7"));
}

TEST_F(WorkerRegistryTest, ABrokenStreamIsDeathAtOnce) {
  auto connection = JoinReady(v1::ROLE_PREFILL, "p0", 7);
  registry_.OnDisconnected(connection, At(1));
  registry_.OnDisconnected(connection, At(2));  // OnCancel and OnDone both report it
  EXPECT_THAT(gone_, ::testing::ElementsAre("p0#7"));
}

TEST_F(WorkerRegistryTest, ANewIncarnationReplacesTheOldWhichIsTold) {
  auto old = JoinReady(v1::ROLE_DECODE, "d0", 7);
  auto fresh = JoinReady(v1::ROLE_DECODE, "d0", 8);
  ASSERT_TRUE(old->closed.has_value());
  EXPECT_TRUE(absl::IsAborted(*old->closed));
  EXPECT_THAT(gone_, ::testing::ElementsAre("d0#7"));
  registry_.OnDisconnected(old, At(1));  // its death, noticed later, is not the new one's
  EXPECT_EQ(registry_.size(), 1u);
  EXPECT_NE(registry_.Find({0, 8}), nullptr);
  EXPECT_EQ(registry_.Find({0, 7}), nullptr);
}

TEST_F(WorkerRegistryTest, EveryChangeOfTheExpertPoolReachesPrefillAndDecode) {
  auto decode = JoinReady(v1::ROLE_DECODE, "d0", 1);
  auto e0 = JoinReady(v1::ROLE_EXPERT, "e0", 2);
  EXPECT_EQ(decode->Peers(), "e0 ");
  auto prefill = JoinReady(v1::ROLE_PREFILL, "p0", 3);
  EXPECT_EQ(prefill->Peers(), "e0 ");
  auto loading = Join(v1::ROLE_EXPERT, "e1", 4);
  EXPECT_EQ(decode->Peers(), "e0 ");  // not ready: nobody may call it
  ASSERT_TRUE(registry_.OnMessage(loading, Ready(v1::ROLE_EXPERT), At(0)).ok());
  EXPECT_EQ(decode->Peers(), "e0 e1 ");
  ASSERT_TRUE(registry_.OnMessage(e0, Status(2, v1::WORKER_STATE_DRAINING), At(0)).ok());
  EXPECT_EQ(prefill->Peers(), "(e0) e1 ");  // it finishes what it has
  registry_.OnDisconnected(e0, At(0));
  EXPECT_EQ(prefill->Peers(), "e1 ");
  registry_.OnDisconnected(loading, At(0));
  EXPECT_EQ(decode->Peers(), "");
}

TEST_F(WorkerRegistryTest, ADrainReachesTheWorkerThatWasNamed) {
  const auto first = JoinReady(v1::ROLE_DECODE, "d0", 1), second = JoinReady(v1::ROLE_DECODE, "d1", 2);
  ASSERT_TRUE(registry_.Drain("d1", "maintenance").ok());
  const auto asked = [](const FakeConnection& connection) {
    return std::count_if(connection.sent.begin(), connection.sent.end(),
                         [](const auto& message) { return message.drain().reason() == "maintenance"; });
  };
  EXPECT_EQ(asked(*first), 0);
  EXPECT_EQ(asked(*second), 1);
  EXPECT_EQ(registry_.Drain("d2", "maintenance").code(), absl::StatusCode::kNotFound);
}

TEST_F(WorkerRegistryTest, WhatIsNotAWorkerIsRefused) {
  const auto refused = [&](const v1::WorkerMessage& message) {
    return registry_.OnMessage(std::make_shared<FakeConnection>(), message, At(0)).code();
  };
  EXPECT_EQ(refused(Status(1)), absl::StatusCode::kInvalidArgument);
  auto version = Hello(v1::ROLE_DECODE, "d0", 1);
  version.mutable_hello()->set_wire_version(2);
  EXPECT_EQ(refused(version), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(refused(Hello(v1::ROLE_UNSPECIFIED, "d0", 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(refused(Hello(static_cast<v1::Role>(99), "d0", 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(refused(Hello(v1::ROLE_DECODE, "", 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(refused(Hello(v1::ROLE_DECODE, "a/b", 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(refused(Hello(v1::ROLE_DECODE, std::string(129, 'a'), 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(refused(Hello(v1::ROLE_DECODE, "d0", 0)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(registry_.size(), 0u);
}

TEST_F(WorkerRegistryTest, WhatAWorkerMayNotSayTwiceOrHalfEndsItsStream) {
  auto connection = JoinReady(v1::ROLE_DECODE, "d0", 7);
  EXPECT_FALSE(registry_.OnMessage(connection, Hello(v1::ROLE_DECODE, "d0", 7), At(0)).ok());
  EXPECT_FALSE(registry_.OnMessage(connection, Ready(v1::ROLE_DECODE), At(0)).ok());
  EXPECT_FALSE(registry_.OnMessage(connection, v1::WorkerMessage(), At(0)).ok());
  auto other = Join(v1::ROLE_DECODE, "d1", 8);
  auto ready = Ready(v1::ROLE_DECODE);
  ready.mutable_ready()->mutable_capacity()->set_page_tokens(0);
  EXPECT_FALSE(registry_.OnMessage(other, ready, At(0)).ok());
}

}  // namespace
}  // namespace millrace::router
