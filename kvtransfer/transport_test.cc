// SPDX-License-Identifier: Apache-2.0
// The conformance suite of transport.h: one set of promises, run on every transport, both ends in this process.
//
// Ends in two processes, deaths included, are transport_process_test.cc.
#include <set>

#include "absl/strings/str_cat.h"
#include "kvtransfer/status.h"
#include "kvtransfer/transport_test_util.h"

namespace millrace::kvtransfer::testing {
namespace {

constexpr uint16_t kChannel = 7;

// Two transports, b receiving into fresh memory and remembering what came.
class Conformance : public ::testing::TestWithParam<TransportKind> {
 protected:
  struct Received {
    std::string header;
    std::vector<uint8_t> payload;
    absl::Status status;
    bool done = false;
  };

  void SetUp() override { Make({}, {}); }
  void TearDown() override {
    const absl::Time start = absl::Now();
    if (a_) a_->Close();
    if (b_) b_->Close();
    EXPECT_LT(absl::Now() - start, kFailureBound) << "Close is bounded whatever went before";
  }

  void Make(TransportOptions a, TransportOptions b) {
    a_.reset(), b_.reset();
    a_ = factory_.Make(std::move(a));
    b_ = factory_.Make(std::move(b));
    ASSERT_NE(a_, nullptr);
    ASSERT_NE(b_, nullptr);
    b_->SetHandler(kChannel, &sink_);
    auto peer = a_->Connect(b_->address());
    ASSERT_TRUE(peer.ok()) << peer.status();
    to_b_ = *peer;
  }

  Placement Take(const IncomingMessage& message) {
    auto received = std::make_shared<Received>();
    received->header.assign(reinterpret_cast<const char*>(message.header.data()), message.header.size());
    received->payload.resize(message.payload_bytes);
    std::lock_guard lock(mu_);
    from_ = message.from;
    received_.push_back(received);
    return Placement::Into({received->payload.data(), received->payload.size()}, [this, received](absl::Status status) {
      std::lock_guard done_lock(mu_);
      received->status = std::move(status);
      received->done = true;
    });
  }
  size_t done() {
    std::lock_guard lock(mu_);
    size_t count = 0;
    for (const auto& received : received_) count += received->done;
    return count;
  }

  absl::Status SendAndWait(const std::string& header, const std::vector<uint8_t>& payload) {
    Outcome outcome;
    RETURN_IF_ERROR(
        a_->SendMessage(to_b_, kChannel, Bytes(header), {payload.data(), payload.size()}, outcome.Callback()).status());
    return outcome.Get();
  }

  TransportFactory factory_{GetParam()};
  std::mutex mu_;
  std::vector<std::shared_ptr<Received>> received_;
  PeerId from_;
  FunctionHandler sink_{[this](const IncomingMessage& m) { return Take(m); }};
  std::unique_ptr<Transport> a_, b_;
  PeerId to_b_;
};

INSTANTIATE_TEST_SUITE_P(All, Conformance, ::testing::ValuesIn(AllKinds()),
                         [](const auto& kind) { return KindName(kind.param); });

TEST_P(Conformance, PayloadsOfEverySizeArriveIntactWhereTheReceiverPutThem) {
  size_t count = 0;
  uint64_t bytes = 0;
  for (size_t size : {0ul, 1ul, 7ul, 64ul, 4095ul, 4096ul, 8191ul, 8192ul, 8193ul, 65535ul, 65536ul, 262144ul,
                      (1ul << 20) + 3, 4ul << 20, 64ul << 20}) {
    const auto payload = Pattern(size, size);
    ASSERT_TRUE(SendAndWait(absl::StrCat("size ", size), payload).ok()) << size;
    ASSERT_TRUE(Eventually([&] { return done() == count + 1; })) << size;
    EXPECT_EQ(received_[count]->header, absl::StrCat("size ", size));
    EXPECT_TRUE(received_[count]->status.ok()) << received_[count]->status;
    EXPECT_TRUE(received_[count]->payload == payload) << size;
    ++count, bytes += size;
  }
  EXPECT_EQ(a_->statistics().messages_sent, count);
  EXPECT_EQ(a_->statistics().bytes_sent, bytes);
  EXPECT_EQ(b_->statistics().messages_received, count);
  EXPECT_EQ(b_->statistics().bytes_received, bytes);
  EXPECT_EQ(a_->statistics().bytes_in_flight, 0u);
  EXPECT_EQ(b_->statistics().arrivals_in_flight, 0u);
}

TEST_P(Conformance, HeaderUpToItsLimitTravelsAndOneByteMoreIsRefused) {
  const std::string longest(kMaxHeaderBytes, 'h');
  size_t count = 0;
  for (size_t payload_bytes : {0, 1000, 1 << 20}) {
    ASSERT_TRUE(SendAndWait(longest, Pattern(payload_bytes, 1)).ok());
    ++count;
    ASSERT_TRUE(Eventually([&] { return done() == count; }));
    EXPECT_EQ(received_.back()->header, longest);
  }
  EXPECT_TRUE(absl::IsInvalidArgument(SendAndWait(longest + "h", {})));
  EXPECT_TRUE(SendAndWait("", {}).ok()) << "an empty header is a header";
}

TEST_P(Conformance, ReceiverMayDropAndTheSenderStillCompletes) {
  FunctionHandler dropper([](const IncomingMessage&) { return Placement::Drop("not_today"); });
  b_->SetHandler(kChannel, &dropper);
  for (size_t size : {0, 100, 1 << 20}) EXPECT_TRUE(SendAndWait("x", Pattern(size, 1)).ok()) << size;
  ASSERT_TRUE(Eventually([&] { return b_->statistics().drops["not_today"] == 3; }));
  EXPECT_EQ(b_->statistics().messages_received, 0u);
}

TEST_P(Conformance, MessageOfAChannelWithoutHandlerIsDroppedAndCounted) {
  b_->SetHandler(kChannel, nullptr);
  EXPECT_TRUE(SendAndWait("x", Pattern(10, 1)).ok());
  ASSERT_TRUE(Eventually([&] { return b_->statistics().drops["no_handler"] == 1; }));
}

TEST_P(Conformance, PayloadIsNeverWrittenPastASmallDestination) {
  for (size_t size : {100, 1 << 20}) {
    std::vector<uint8_t> memory(size, 0xee);
    Outcome arrival;
    FunctionHandler small([&](const IncomingMessage& m) {
      return Placement::Into({memory.data(), m.payload_bytes - 1}, arrival.Callback());
    });
    b_->SetHandler(kChannel, &small);
    EXPECT_TRUE(SendAndWait("x", Pattern(size, 1)).ok());
    EXPECT_TRUE(absl::IsInvalidArgument(arrival.Get())) << arrival.Get();
    EXPECT_EQ(memory, std::vector<uint8_t>(size, 0xee));
    b_->SetHandler(kChannel, &sink_);
  }
  EXPECT_TRUE(SendAndWait("afterwards all is well", Pattern(10, 1)).ok());
}

TEST_P(Conformance, WhoReceivesCanAnswerWithoutConnecting) {
  FunctionHandler echo([&](const IncomingMessage& m) {
    auto copy = std::make_shared<std::vector<uint8_t>>(m.payload_bytes);
    return Placement::Into({copy->data(), copy->size()}, [this, copy, from = m.from](absl::Status status) {
      ASSERT_TRUE(status.ok());
      auto sent = b_->SendMessage(from, kChannel, Bytes("back"), {copy->data(), copy->size()}, [copy](absl::Status) {});
      EXPECT_TRUE(sent.ok()) << sent.status();
    });
  });
  b_->SetHandler(kChannel, &echo);
  a_->SetHandler(kChannel, &sink_);
  for (size_t size : {0, 5000, 1 << 20}) {
    const size_t before = done();
    const auto payload = Pattern(size, 3);
    ASSERT_TRUE(SendAndWait("there", payload).ok());
    ASSERT_TRUE(Eventually([&] { return done() == before + 1; }));
    EXPECT_EQ(received_.back()->header, "back");
    EXPECT_TRUE(received_.back()->payload == payload);
  }
}

TEST_P(Conformance, OneConnectionPerPairHoweverOftenAndFromWhicheverSideItIsMade) {
  EXPECT_EQ(*a_->Connect(b_->address()), to_b_);
  auto to_a = b_->Connect(a_->address());  // at the same moment as a's
  ASSERT_TRUE(to_a.ok());
  a_->SetHandler(kChannel, &sink_);
  ASSERT_TRUE(SendAndWait("a to b", Pattern(1 << 20, 1)).ok());
  Outcome back;
  const auto payload = Pattern(1 << 20, 2);
  ASSERT_TRUE(
      b_->SendMessage(*to_a, kChannel, Bytes("b to a"), {payload.data(), payload.size()}, back.Callback()).ok());
  EXPECT_TRUE(back.Get().ok()) << back.Get();
  ASSERT_TRUE(Eventually([&] { return done() == 2; }));
  EXPECT_EQ(a_->statistics().peers_connected, 1u);
  EXPECT_EQ(b_->statistics().peers_connected, 1u);
  EXPECT_EQ(*a_->Connect(b_->address()), to_b_);
  EXPECT_EQ(*b_->Connect(a_->address()), *to_a);
}

TEST_P(Conformance, EndpointMayConnectToItself) {
  a_->SetHandler(kChannel, &sink_);
  auto self = a_->Connect(a_->address());
  ASSERT_TRUE(self.ok()) << self.status();
  size_t count = 0;
  for (size_t size : {0, 100, 1 << 20}) {
    const auto payload = Pattern(size, 9);
    Outcome sent;
    ASSERT_TRUE(
        a_->SendMessage(*self, kChannel, Bytes("self"), {payload.data(), payload.size()}, sent.Callback()).ok());
    EXPECT_TRUE(sent.Get().ok()) << sent.Get();
    ++count;
    ASSERT_TRUE(Eventually([&] { return done() == count; }));
    EXPECT_TRUE(received_.back()->payload == payload);
  }
}

TEST_P(Conformance, MalformedAddressIsRefusedAndHurtsNothing) {
  const std::string good = b_->address();
  std::vector<std::string> bad = {"", "x", std::string(40, '\0'), std::string(1 << 20, 'a'), good + "x"};
  for (size_t cut = 0; cut < good.size(); cut += 1 + good.size() / 64) bad.push_back(good.substr(0, cut));
  if (GetParam() !=
      TransportKind::kLoopback) {  // loopback's text has no room for a digest: a flip names another endpoint
    for (size_t bit = 0; bit < good.size() * 8; ++bit) {
      bad.push_back(good);
      bad.back()[bit / 8] ^= static_cast<char>(1 << (bit % 8));
    }
  }
  for (const std::string& address : bad) {
    auto peer = a_->Connect(address);
    EXPECT_TRUE(absl::IsInvalidArgument(peer.status())) << peer.status();
  }
  EXPECT_TRUE(SendAndWait("still alive", Pattern(100, 1)).ok());
}

TEST_P(Conformance, UnknownPeerAndChannelAreRefused) {
  EXPECT_TRUE(absl::IsNotFound(a_->SendMessage({12345}, kChannel, {}, {}, nullptr).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(a_->SendMessage(to_b_, kMaxChannels, {}, {}, nullptr).status()));
}

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
  b_->RunAfter(absl::ZeroDuration(), [&] { gate.WaitHere(); });
  gate.AwaitSomebody();
  std::vector<Outcome> outcomes(20);
  const auto payload = Pattern(1 << 20, 1);
  for (Outcome& outcome : outcomes) {
    ASSERT_TRUE(
        a_->SendMessage(to_b_, kChannel, Bytes("m"), {payload.data(), payload.size()}, outcome.Callback()).ok());
  }
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
  b_->RunAfter(absl::ZeroDuration(), [&] { gate.WaitHere(); });
  gate.AwaitSomebody();
  std::vector<Outcome> outcomes(50);
  const auto payload = Pattern(1 << 20, 1);
  for (Outcome& outcome : outcomes) {
    ASSERT_TRUE(
        a_->SendMessage(to_b_, kChannel, Bytes("m"), {payload.data(), payload.size()}, outcome.Callback()).ok());
  }
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
  EXPECT_NE(statistics.lanes[0].find(GetParam() == TransportKind::kLoopback ? "loopback" : "tcp"), std::string::npos)
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
