// SPDX-License-Identifier: Apache-2.0
// The conformance suite of transport.h, second part: limits on what is under way, cancelling, connections that end,
// several threads, timers, and what is left behind.
#include <set>

#include "absl/strings/str_cat.h"
#include "kvtransfer/conformance_test.h"

namespace millrace::kvtransfer::testing {
namespace {

TEST_P(Conformance, SendsBeyondTheLimitsWaitAndBeyondTheQueueAreRefused) {
  TransportOptions options;
  options.max_in_flight_bytes_per_peer = 3 << 20;
  options.max_queued_messages_per_peer = 4;
  Make(options, {});
  ASSERT_TRUE(SendAndWait("warm", {}).ok());
  Gate gate;
  b_->RunAfter(absl::ZeroDuration(), [&] { gate.WaitHere(); });
  gate.AwaitSomebody();

  const auto payload = Pattern(1 << 20, 1);
  std::vector<Outcome> outcomes(7);
  int accepted = 0;
  auto send = [&](Outcome& outcome) {
    return a_->SendMessage(to_b_, kChannel, Bytes("m"), {payload.data(), payload.size()}, outcome.Callback()).status();
  };
  // Two go to the wire (each costs its header too), four wait.
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(send(outcomes[accepted++]).ok());
  ASSERT_TRUE(Eventually([&] { return a_->statistics().messages_in_flight == 2; }));
  absl::Status refused;
  for (; accepted < 7; ++accepted) {
    if (refused = send(outcomes[accepted]); !refused.ok()) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  if (refused.ok()) {
    Outcome never;
    refused = send(never);
  }
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_LE(a_->statistics().bytes_in_flight, 3u << 20);
  EXPECT_EQ(a_->statistics().messages_queued, 4u);
  gate.Open();
  for (int i = 0; i < accepted; ++i) EXPECT_TRUE(outcomes[i].Get().ok());
  EXPECT_TRUE(SendAndWait("room again", payload).ok());
}

TEST_P(Conformance, MessageLargerThanTheLimitGoesAlone) {
  TransportOptions options;
  options.max_in_flight_bytes_per_peer = 1000;
  options.max_in_flight_bytes = 1000;
  Make(options, {});
  std::vector<Outcome> outcomes(5);
  const auto payload = Pattern(1 << 20, 1);
  for (Outcome& outcome : outcomes) {
    ASSERT_TRUE(
        a_->SendMessage(to_b_, kChannel, Bytes("m"), {payload.data(), payload.size()}, outcome.Callback()).ok());
  }
  for (Outcome& outcome : outcomes) EXPECT_TRUE(outcome.Get().ok());
  ASSERT_TRUE(Eventually([&] { return done() == outcomes.size(); }));
}

TEST_P(Conformance, CancelledSendThatWaitsNeverArrives) {
  TransportOptions options;
  options.max_in_flight_bytes_per_peer = 1 << 20;
  Make(options, {});
  ASSERT_TRUE(SendAndWait("warm", {}).ok());
  Gate gate;
  b_->RunAfter(absl::ZeroDuration(), [&] { gate.WaitHere(); });
  gate.AwaitSomebody();
  const auto payload = Pattern(1 << 20, 1);
  Outcome first, second;
  auto send = [&](const char* name, Outcome& outcome) {
    return *a_->SendMessage(to_b_, kChannel, Bytes(name), {payload.data(), payload.size()}, outcome.Callback());
  };
  const SendId on_wire = send("first", first);
  const SendId waiting = send("second", second);
  ASSERT_TRUE(Eventually([&] { return a_->statistics().messages_in_flight == 1; }));
  a_->Cancel(waiting);
  a_->Cancel(on_wire);
  a_->Cancel({});
  EXPECT_TRUE(absl::IsCancelled(second.Get()));
  EXPECT_EQ(first.times(), 0) << "what is on the wire is not recalled";
  gate.Open();
  EXPECT_TRUE(first.Get().ok());
  ASSERT_TRUE(SendAndWait("third", {}).ok());
  ASSERT_TRUE(Eventually([&] { return done() == 3; }));
  EXPECT_EQ(second.times(), 1);
}

// The heart of the matter: an arrival is pending because its sender hangs in the middle; the receiver wants its memory
// back.
TEST_P(Conformance, AfterDisconnectIsFencedNothingWritesAnyMore) {
  Gate sender_hangs;
  std::vector<uint8_t> memory(32 << 20, 0xaa);
  Outcome arrival;
  FunctionHandler handler([&](const IncomingMessage& m) {
    from_ = m.from;
    a_->RunAfter(absl::ZeroDuration(), [&] { sender_hangs.WaitHere(); });
    sender_hangs.AwaitSomebody();
    return Placement::Into({memory.data(), memory.size()}, arrival.Callback());
  });
  b_->SetHandler(kChannel, &handler);
  const auto payload = Pattern(memory.size(), 1);
  Outcome sent;
  ASSERT_TRUE(a_->SendMessage(to_b_, kChannel, Bytes("x"), {payload.data(), payload.size()}, sent.Callback()).ok());
  ASSERT_TRUE(Eventually([&] { return b_->statistics().arrivals_in_flight == 1; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  ASSERT_EQ(arrival.times(), 0) << "the sender hangs, so it must be pending";

  Outcome fenced;
  auto fenced_callback = std::make_shared<SendDone>(fenced.Callback());
  b_->Disconnect(from_, [&, fenced_callback] {
    EXPECT_EQ(arrival.times(), 1) << "the arrival is answered before the fence";
    (*fenced_callback)(absl::OkStatus());
  });
  ASSERT_TRUE(fenced.Wait(kFailureBound));
  EXPECT_FALSE(arrival.Get().ok());
  std::fill(memory.begin(), memory.end(), 0xbb);
  sender_hangs.Open();
  EXPECT_TRUE(sent.Wait(kFailureBound)) << "it ends; Ok or not, the sender learns the truth only from Verify";
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_EQ(memory, std::vector<uint8_t>(memory.size(), 0xbb));
  EXPECT_EQ(arrival.times(), 1);
}

TEST_P(Conformance, DisconnectFailsEverySendAndANewConnectionWorks) {
  ASSERT_TRUE(SendAndWait("warm", {}).ok());
  auto failures = std::make_shared<std::atomic<int>>(0);
  b_->OnPeerFailed([failures](PeerId, const absl::Status&) { ++*failures; });
  Gate gate;
  const auto payload = Pattern(1 << 20, 1);
  std::vector<Outcome> outcomes(20);
  SendWhileThePeerHangs(gate, payload, outcomes);
  if (HasFatalFailure()) return;
  Outcome fenced;
  a_->Disconnect(to_b_, [callback = fenced.Callback()]() mutable { callback(absl::OkStatus()); });
  ASSERT_TRUE(fenced.Wait(kFailureBound));
  for (Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.times(), 1);
    EXPECT_FALSE(outcome.Get().ok());
  }
  EXPECT_TRUE(absl::IsNotFound(SendAndWait("x", {}))) << "that peer is gone for good";
  gate.Open();
  EXPECT_TRUE(Eventually([&] { return *failures == 1; }, kFailureBound)) << "the other end is told";
  const size_t before = received_.size();
  auto again = a_->Connect(b_->address());
  ASSERT_TRUE(again.ok());
  EXPECT_NE(*again, to_b_);
  to_b_ = *again;
  EXPECT_TRUE(SendAndWait("new connection", payload).ok());
  EXPECT_GT(received_.size(), before);
  Outcome unknown;
  a_->Disconnect({987654}, [callback = unknown.Callback()]() mutable { callback(absl::OkStatus()); });
  EXPECT_TRUE(unknown.Wait());
}

TEST_P(Conformance, CloseOfThePeerIsReportedAndFailsSends) {
  ASSERT_TRUE(SendAndWait("warm", {}).ok());
  Outcome failure;
  auto failed = std::make_shared<SendDone>(failure.Callback());
  a_->OnPeerFailed([failed, first = to_b_](PeerId peer, const absl::Status& why) {
    if (peer == first) (*failed)(why);
  });
  b_->Close();
  EXPECT_TRUE(absl::IsUnavailable(failure.Get(kFailureBound))) << failure.Get();
  EXPECT_EQ(failure.times(), 1);
  EXPECT_TRUE(absl::IsNotFound(SendAndWait("x", {})));
  auto again = a_->Connect(b_->address());  // nobody there any more
  ASSERT_TRUE(again.ok());
  to_b_ = *again;
  EXPECT_FALSE(SendAndWait("x", {}).ok());
}

TEST_P(Conformance, CloseAnswersEverySendOnce) {
  ASSERT_TRUE(SendAndWait("warm", {}).ok());
  Gate gate;
  const auto payload = Pattern(1 << 20, 1);
  std::vector<Outcome> outcomes(50);
  SendWhileThePeerHangs(gate, payload, outcomes);
  if (HasFatalFailure()) return;
  a_->Close();
  for (Outcome& outcome : outcomes) EXPECT_EQ(outcome.times(), 1);
  EXPECT_FALSE(a_->Connect(b_->address()).ok());
  EXPECT_FALSE(SendAndWait("x", {}).ok());
  Outcome fenced;
  a_->Disconnect(to_b_, [callback = fenced.Callback()]() mutable { callback(absl::OkStatus()); });
  EXPECT_EQ(fenced.times(), 1) << "after Close everything is fenced";
  a_->Close();
  gate.Open();
}

TEST_P(Conformance, ManyThreadsMaySendAndEveryMessageArrivesOnce) {
  constexpr int kThreads = 4, kMessages = 2000;
  std::mutex mu;
  std::multiset<std::string> seen;
  FunctionHandler collect([&](const IncomingMessage& m) {
    std::lock_guard lock(mu);
    seen.emplace(reinterpret_cast<const char*>(m.header.data()), m.header.size());
    return m.payload.size() == m.payload_bytes ? Placement::Consumed() : Placement::Drop("large");
  });
  b_->SetHandler(kChannel, &collect);
  std::atomic<int> completed{0}, refused{0};
  const auto payload = Pattern(3000, 1);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kMessages; ++i) {
        const std::string header = absl::StrCat(t, "/", i);
        while (true) {
          auto sent = a_->SendMessage(to_b_, kChannel, Bytes(header), {payload.data(), payload.size() * (i % 2)},
                                      [&](absl::Status status) { completed += status.ok(); });
          if (sent.ok()) break;
          ASSERT_TRUE(absl::IsResourceExhausted(sent.status())) << sent.status();
          ++refused;
          std::this_thread::yield();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_TRUE(Eventually([&] { return completed == kThreads * kMessages; }));
  ASSERT_TRUE(Eventually([&] {
    std::lock_guard lock(mu);
    return seen.size() == kThreads * kMessages;
  }));
  EXPECT_EQ(std::set<std::string>(seen.begin(), seen.end()).size(), seen.size());
}

TEST_P(Conformance, WaitForSeesCallbacksAndTimesOut) {
  std::atomic<int> rounds{0};
  FunctionHandler pong([&](const IncomingMessage& m) {
    EXPECT_TRUE(b_->SendMessage(m.from, kChannel, m.header, {}, nullptr).ok());
    return Placement::Consumed();
  });
  FunctionHandler count([&](const IncomingMessage&) {
    ++rounds;
    return Placement::Consumed();
  });
  b_->SetHandler(kChannel, &pong);
  a_->SetHandler(kChannel, &count);
  for (int i = 1; i <= 200; ++i) {
    ASSERT_TRUE(a_->SendMessage(to_b_, kChannel, Bytes("ping"), {}, nullptr).ok());
    ASSERT_TRUE(a_->WaitFor([&] { return rounds == i; }, kSoon)) << i;
  }
  const absl::Time start = absl::Now();
  EXPECT_FALSE(a_->WaitFor([] { return false; }, absl::Milliseconds(50)));
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(50));
  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
}

TEST_P(Conformance, SendAtOnceReachesThePeerThoughNobodyWaits) {
  TransportOptions lingering;
  lingering.linger = absl::Hours(1);  // what is merely posted after a wait stays until the next one
  Make(lingering, {});
  std::atomic<int> pings{0};
  FunctionHandler ping([&](const IncomingMessage& m) {
    ++pings;
    if (pings == 1) {
      EXPECT_TRUE(b_->SendMessage(m.from, kChannel, m.header, {}, nullptr).ok());
    }
    return Placement::Consumed();
  });
  std::atomic<bool> answered{false};
  FunctionHandler answer([&](const IncomingMessage&) {
    answered = true;
    return Placement::Consumed();
  });
  b_->SetHandler(kChannel, &ping);
  a_->SetHandler(kChannel, &answer);
  ASSERT_TRUE(a_->SendMessage(to_b_, kChannel, Bytes("ping"), {}, nullptr).ok());
  ASSERT_TRUE(a_->WaitFor([&] { return answered.load(); }, kSoon));
  a_->SendAtOnce([&] {
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(a_->SendMessage(to_b_, kChannel, Bytes("more"), {}, nullptr).ok());
  });
  EXPECT_TRUE(b_->WaitFor([&] { return pings == 4; }, kSoon));
}

TEST_P(Conformance, TimersRunInOrderAndNotEarly) {
  std::mutex mu;
  std::vector<int> order;
  const absl::Time start = absl::Now();
  absl::Time last;
  for (int delay : {60, 20, 40}) {
    a_->RunAfter(absl::Milliseconds(delay), [&, delay] {
      std::lock_guard lock(mu);
      order.push_back(delay);
      last = absl::Now();
    });
  }
  ASSERT_TRUE(Eventually([&] {
    std::lock_guard lock(mu);
    return order.size() == 3;
  }));
  EXPECT_EQ(order, (std::vector<int>{20, 40, 60}));
  EXPECT_GE(last - start, absl::Milliseconds(60));
}

TEST_P(Conformance, LanesAreReported) {
  ASSERT_TRUE(SendAndWait("warm", {}).ok());
  const auto statistics = a_->statistics();
  ASSERT_EQ(statistics.lanes.size(), 1u);
  EXPECT_NE(statistics.lanes[0].find(IsLoopback(GetParam()) ? "loopback" : "tcp"), std::string::npos)
      << statistics.lanes[0];
}

TEST_P(Conformance, ClosedTransportsLeaveNoThreadAndNoDescriptorBehind) {
  ASSERT_TRUE(SendAndWait("warm", Pattern(1 << 20, 1)).ok());
  TearDown();
  a_.reset(), b_.reset();
  const size_t files = OpenFiles(), threads = Threads();
  for (int i = 0; i < 5; ++i) {
    Make({}, {});
    ASSERT_TRUE(SendAndWait("x", Pattern(1 << 20, 1)).ok());
    a_.reset(), b_.reset();
  }
  EXPECT_EQ(OpenFiles(), files);
  EXPECT_TRUE(Eventually([&] { return Threads() <= threads; })) << Threads() << " threads, " << threads << " before";
}

}  // namespace
}  // namespace millrace::kvtransfer::testing
