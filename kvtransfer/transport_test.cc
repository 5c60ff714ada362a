// SPDX-License-Identifier: Apache-2.0
// The conformance suite of transport.h: one set of promises, run on every transport, both ends in this process. Here:
// messages and connections; transport_limits_test.cc has limits, ends and threads.
//
// Ends in two processes, deaths included, are transport_process_test.cc.
#include "absl/strings/str_cat.h"
#include "kvtransfer/conformance_test.h"

namespace millrace::kvtransfer::testing {
namespace {

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
  const std::string longest(a_->max_header_bytes(), 'h');
  ASSERT_GE(longest.size(), kMaxHeaderBytes - 128) << "decorators leave room";
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

}  // namespace
}  // namespace millrace::kvtransfer::testing
