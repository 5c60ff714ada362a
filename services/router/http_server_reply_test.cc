// SPDX-License-Identifier: Apache-2.0
// The HTTP server while it answers: clients that hang up, read slowly or come in crowds, and its own end.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "services/router/http_server_fixture.h"

namespace millrace::router {
namespace {

TEST_F(HttpServerTest, ConnectionsAreLimitedPerAddress) {
  HttpLimits limits = ShortLimits();
  limits.max_connections_per_address = 8;
  limits.header_timeout = std::chrono::seconds(10);
  StartServer(limits);
  std::vector<std::unique_ptr<TestClient>> open;
  for (int i = 0; i < 8; ++i) {
    open.push_back(std::make_unique<TestClient>(port()));
    open.back()->Send(kGet);
    EXPECT_EQ(open.back()->Read().status, 200);
  }
  EXPECT_EQ(CodeOf(Ask(kGet)), "too_many_connections_from_address");
  open.pop_back();
  EXPECT_TRUE(Eventually([&] { return Ask(kGet).status == 200; }));
}

TEST_F(HttpServerTest, AHangUpIsSeenWhileTheReplyIsBeingMade) {
  StartServer();
  TestClient client(port());
  client.Send("GET /hold HTTP/1.1\r\nHost: a\r\n\r\n");
  auto exchange = Held();
  ASSERT_TRUE(exchange);
  EXPECT_EQ(gone_, 0);
  client.Close();
  EXPECT_TRUE(Eventually([&] { return gone_ == 1; }));
  exchange->Post([exchange] { exchange->Write("nobody hears this"); });
  EXPECT_TRUE(Eventually([&] { return server_->num_connections() <= 1; }));
}

TEST_F(HttpServerTest, StreamsKeepTheConnectionUnlessToldToClose) {
  StartServer();
  TestClient client(port());
  for (const bool close : {false, true}) {
    client.Send("GET /hold HTTP/1.1\r\nHost: a\r\n\r\n");
    auto exchange = Held();
    ASSERT_TRUE(exchange);
    exchange->Post([exchange, close] {
      exchange->Write("one ");
      exchange->Write("two");
      exchange->EndStream(close);
    });
    const TestReply reply = client.Read();
    EXPECT_EQ(reply.body, "one two");
    EXPECT_TRUE(reply.complete);
  }
  EXPECT_TRUE(client.WaitForClose());
}

TEST_F(HttpServerTest, SlowReaderPausesThenEndsWithBoundedMemory) {
  HttpLimits limits = ShortLimits();
  limits.soft_write_buffer_bytes = 64 << 10;
  limits.hard_write_buffer_bytes = 100 << 20;
  StartServer(limits);
  TestClient client(port(), 4096);
  const auto exchange = Flood(client);
  ASSERT_TRUE(exchange);
  EXPECT_TRUE(Eventually([&] { return paused_ == 1; }));
  EXPECT_TRUE(Eventually([&] { return slow_ == 1; }));
  EXPECT_EQ(gone_, 0);
  EXPECT_TRUE(client.WaitForClose());
}

TEST_F(HttpServerTest, HardLimitEndsAStreamAtOnce) {
  HttpLimits limits = ShortLimits();
  limits.slow_reader_timeout = std::chrono::seconds(60);
  StartServer(limits);
  TestClient client(port(), 4096);
  const auto exchange = Flood(client);
  ASSERT_TRUE(exchange);
  EXPECT_TRUE(Eventually([&] { return slow_ == 1; }));
}

TEST_F(HttpServerTest, AReaderThatCatchesUpIsResumed) {
  HttpLimits limits = ShortLimits();
  limits.soft_write_buffer_bytes = 64 << 10;
  limits.hard_write_buffer_bytes = 100 << 20;
  limits.slow_reader_timeout = std::chrono::seconds(20);
  StartServer(limits);
  TestClient client(port());
  const auto exchange = Flood(client);
  ASSERT_TRUE(exchange);
  EXPECT_TRUE(Eventually([&] { return paused_ == 1; }));
  std::thread ender([&] {
    EXPECT_TRUE(Eventually([&] { return resumed_ == 1; }));
    exchange->Post([exchange] { exchange->EndStream(false); });
  });
  const TestReply reply = client.Read(20'000);
  ender.join();
  EXPECT_EQ(reply.body.size(), 8'000'000u);
  EXPECT_EQ(slow_, 0);
}

TEST_F(HttpServerTest, DrainClosesIdleConnectionsAndLetsRepliesFinish) {
  StartServer();
  TestClient idle(port()), busy(port());
  idle.Send(kGet);
  EXPECT_EQ(idle.Read().status, 200);
  busy.Send("GET /hold HTTP/1.1\r\nHost: a\r\n\r\n");
  auto exchange = Held();
  ASSERT_TRUE(exchange);
  server_->BeginDrain();
  EXPECT_TRUE(idle.WaitForClose());
  EXPECT_TRUE(Eventually([&] { return !TestClient(port()).connected(); }));
  exchange->Post([exchange] {
    exchange->Write("done");
    exchange->EndStream(false);
  });
  EXPECT_EQ(busy.Read().body, "done");
  EXPECT_TRUE(busy.WaitForClose());
}

TEST_F(HttpServerTest, StoppingEndsOpenExchanges) {
  StartServer();
  TestClient client(port());
  client.Send("GET /hold HTTP/1.1\r\nHost: a\r\n\r\n");
  auto exchange = Held();
  ASSERT_TRUE(exchange);
  server_.reset();
  EXPECT_EQ(gone_, 1);
  EXPECT_TRUE(client.WaitForClose());
  exchange->Post([exchange] { exchange->Write("too late"); });
}

}  // namespace
}  // namespace millrace::router
