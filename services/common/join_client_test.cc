// SPDX-License-Identifier: Apache-2.0
// Membership from the worker's side, against a router that can be replaced and silenced.
#include "services/common/join_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "engine/status.h"
#include "services/common/clock.h"
#include "services/common/rpc.h"
#include "services/common/test_wait.h"

namespace millrace {
namespace {

// A router that says what the test wants. Synchronous: one thread per stream is fine here.
class FakeRouter final : public v1::Cluster::Service {
 public:
  grpc::Status Join(grpc::ServerContext* context,
                    grpc::ServerReaderWriter<v1::RouterMessage, v1::WorkerMessage>* stream) override {
    v1::RouterMessage welcome;
    id.To(welcome.mutable_welcome()->mutable_router());
    welcome.mutable_welcome()->set_heartbeat_ms(50);
    welcome.mutable_welcome()->set_dead_after_ms(dead_after_ms.load());
    stream->Write(welcome);
    v1::RouterMessage peers;
    peers.mutable_peers()->set_version(1);
    peers.mutable_peers()->add_experts()->set_name("expert-0");
    stream->Write(peers);
    v1::WorkerMessage message;
    while (stream->Read(&message)) {
      if (message.has_hello()) ++hellos;
      if (message.has_ready()) ++readies;
      if (!message.has_status()) continue;
      last_beat.store(message.status().beat());
      v1::RouterMessage echo;
      echo.set_echo(message.status().beat());
      if (!silent.load()) stream->Write(echo);
      if (drain.exchange(false)) {
        v1::RouterMessage directive;
        directive.mutable_drain()->set_reason("test");
        stream->Write(directive);
      }
    }
    (void)context;
    return grpc::Status::OK;
  }

  const IncarnationId id = IncarnationId::Random();
  std::atomic<int> hellos{0}, readies{0};
  std::atomic<uint64_t> last_beat{0};
  // A loaded machine is silent for hundreds of milliseconds by itself: only who tests silence makes it short.
  std::atomic<uint32_t> dead_after_ms{20000};
  std::atomic<bool> silent{false}, drain{false};
};

std::unique_ptr<RpcServer> Serve(FakeRouter& router, const std::string& listen) {
  auto server = RpcServer::Start({listen}, {&router});
  CHECK(server.ok(), std::string(server.status().message()));
  return *std::move(server);
}

struct Worker {
  explicit Worker(const std::string& address) {
    JoinOptions options;
    options.router_address = address;
    options.hello.set_role(v1::ROLE_DECODE);
    options.hello.set_name("decode-0");
    JoinCallbacks callbacks;
    callbacks.fill_status = [](v1::WorkerStatus& status) { status.set_state(v1::WORKER_STATE_READY); };
    callbacks.on_router = [this](const IncarnationId& id) {
      std::lock_guard<std::mutex> lock(mutex);
      routers.push_back(id);
    };
    callbacks.on_router_lost = [this](const std::string&) { ++lost; };
    callbacks.on_peers = [this](const v1::PeerList& list) { peers.store(list.experts_size()); };
    callbacks.on_drain = [this](const v1::Drain&) { drained.store(true); };
    client = std::make_unique<JoinClient>(std::move(options), std::move(callbacks));
  }
  std::vector<IncarnationId> seen() {
    std::lock_guard<std::mutex> lock(mutex);
    return routers;
  }

  std::mutex mutex;
  std::vector<IncarnationId> routers;
  std::atomic<int> lost{0}, peers{0};
  std::atomic<bool> drained{false};
  std::unique_ptr<JoinClient> client;
};

TEST(JoinClient, SaysHelloThenReadyThenBeatsAndHearsDirectives) {
  FakeRouter router;
  const auto server = Serve(router, "127.0.0.1:0");
  Worker worker(server->address());
  ASSERT_TRUE(Eventually([&] { return router.last_beat.load() >= 2; }));
  EXPECT_EQ(router.hellos.load(), 1);
  EXPECT_EQ(router.readies.load(), 0);
  worker.client->SetReady({});
  EXPECT_TRUE(Eventually([&] { return router.readies.load() == 1; }));
  EXPECT_TRUE(Eventually([&] { return worker.peers.load() == 1; }));
  router.drain.store(true);
  EXPECT_TRUE(Eventually([&] { return worker.drained.load(); }));
  EXPECT_TRUE(worker.client->connected());
  EXPECT_EQ(worker.lost.load(), 0);
  worker.client->Stop();
}

TEST(JoinClient, WhatItWantsHeardIsHeardBeforeItGoesOn) {
  FakeRouter router;
  const auto server = Serve(router, "127.0.0.1:0");
  Worker worker(server->address());
  ASSERT_TRUE(Eventually([&] { return worker.client->connected(); }));
  const uint64_t before = router.last_beat.load();
  EXPECT_TRUE(worker.client->AwaitHeard(absl::Seconds(10)));
  EXPECT_GT(router.last_beat.load(), before);
  worker.client->Stop();
  EXPECT_FALSE(worker.client->AwaitHeard(absl::Seconds(10)));  // nobody is there: it does not wait for them
}

TEST(JoinClient, ARestartedRouterIsJoinedAgainAndRecognisedAsAnother) {
  auto first = std::make_unique<FakeRouter>();
  auto server = Serve(*first, "127.0.0.1:0");
  const std::string address = server->address();
  Worker worker(address);
  worker.client->SetReady({});
  ASSERT_TRUE(Eventually([&] { return first->readies.load() == 1 && !worker.seen().empty(); }));
  server->Shutdown(absl::ZeroDuration());
  FakeRouter second;
  const auto again = Serve(second, address);
  ASSERT_TRUE(Eventually([&] { return second.readies.load() == 1; }));
  // It says ready without waiting for the welcome, which is how it learns whose stream this is.
  EXPECT_TRUE(Eventually([&] { return worker.seen().back() == second.id; }));
  EXPECT_EQ(worker.seen().front(), first->id);
  worker.client->Stop();
}

TEST(JoinClient, ASilentRouterIsLostAndFoundAgain) {
  FakeRouter router;
  router.dead_after_ms.store(300);
  const auto server = Serve(router, "127.0.0.1:0");
  Worker worker(server->address());
  ASSERT_TRUE(Eventually([&] { return router.last_beat.load() >= 2; }));
  router.silent.store(true);
  ASSERT_TRUE(Eventually([&] { return worker.lost.load() >= 1; }));
  router.silent.store(false);
  ASSERT_TRUE(Eventually([&] { return worker.seen().size() >= 2; }));
  worker.client->Stop();
}

TEST(JoinClient, WithoutARouterItKeepsDiallingAndStopsAtOnce) {
  Worker worker("127.0.0.1:1");
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_FALSE(worker.client->connected());
  const absl::Time began = MonotonicNow();
  worker.client->Stop();
  EXPECT_LT(MonotonicNow() - began, absl::Seconds(5));
  EXPECT_EQ(worker.lost.load(), 0);
}

}  // namespace
}  // namespace millrace
