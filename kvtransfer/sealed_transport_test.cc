// SPDX-License-Identifier: Apache-2.0
// The seal against somebody on the wire: reads, flips, cuts, repeats, moves, and speaks without having been admitted.
//
// A tap between the seal and the transport beneath shows what travels and sends what the test made of it. That sealed
// transports keep the contract of transport.h is the conformance suite's business.
#include "kvtransfer/sealed_transport.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kvtransfer/fault_transport.h"
#include "kvtransfer/forwarding_transport.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/seal.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/transport_test_util.h"

namespace millrace::kvtransfer::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr uint16_t kChannel = 7, kOtherChannel = 8;

struct Heard {
  uint16_t channel = 0;
  std::string header, payload;
};

// Hears every message that leaves; lets it pass or keeps it.
class Tap final : public ForwardingTransport<Transport> {
 public:
  explicit Tap(std::unique_ptr<Transport> inner) : ForwardingTransport(std::move(inner)) {}
  ~Tap() override { inner()->Close(); }
  bool Supports(MemoryKind kind) const override { return inner()->Supports(kind); }
  absl::StatusOr<SendId> SendMessage(PeerId peer, uint16_t channel, absl::Span<const uint8_t> header,
                                     ConstMemory payload, SendDone done) override {
    heard.push_back({channel, std::string(reinterpret_cast<const char*>(header.data()), header.size()),
                     std::string(static_cast<const char*>(payload.data), payload.bytes)});
    if (!keep) return inner()->SendMessage(peer, channel, header, payload, std::move(done));
    inner()->RunAfter(absl::ZeroDuration(), [done = std::move(done)]() mutable { done(absl::OkStatus()); });
    return SendId{};
  }
  absl::Status Say(PeerId peer, const Heard& message) {
    Outcome outcome;
    auto sent = inner()->SendMessage(peer, message.channel, Bytes(message.header),
                                     {message.payload.data(), message.payload.size()}, outcome.Callback());
    return sent.ok() ? outcome.Get() : sent.status();
  }

  bool keep = false;
  std::vector<Heard> heard;
};

class Sealed : public ::testing::TestWithParam<TransportKind> {
 protected:
  void SetUp() override {
    auto tap = std::make_unique<Tap>(factory_.MakePlain());
    tap_ = tap.get();
    a_ = SealTransport(std::move(tap), HostMemoryFunctions());
    b_ = factory_.Make();
    for (uint16_t channel : {kChannel, kOtherChannel}) b_->SetHandler(channel, &sink_);
    to_b_ = *a_->Connect(b_->address());
  }
  void TearDown() override {
    a_->Close();
    b_->Close();
  }

  absl::Status Send(const std::string& header, const std::string& payload) {
    Outcome outcome;
    auto sent = a_->SendMessage(to_b_, kChannel, Bytes(header), {payload.data(), payload.size()}, outcome.Callback());
    return sent.ok() ? outcome.Get() : sent.status();
  }
  // A message sealed for b that has not reached it.
  Heard Keep(const std::string& header, const std::string& payload) {
    tap_->keep = true;
    EXPECT_TRUE(Send(header, payload).ok());
    tap_->keep = false;
    return tap_->heard.back();
  }
  uint64_t Drops(const char* reason) { return b_->statistics().drops[reason]; }
  size_t arrived() {
    std::lock_guard lock(mu_);
    return arrived_;
  }
  std::vector<absl::Status> failed() {
    std::lock_guard lock(mu_);
    return failed_;
  }

  TransportFactory factory_{GetParam()};
  std::mutex mu_;
  size_t arrived_ = 0;
  std::vector<absl::Status> failed_;
  std::string last_;
  FunctionHandler sink_{[this](const IncomingMessage& m) {
    auto payload = std::make_shared<std::string>(m.payload_bytes, '\0');
    return Placement::Into({payload->data(), payload->size()}, [this, payload](absl::Status status) {
      std::lock_guard lock(mu_);
      last_ = *payload;
      status.ok() ? void(++arrived_) : failed_.push_back(status);
    });
  }};
  std::unique_ptr<Transport> a_, b_;
  Tap* tap_ = nullptr;
  PeerId to_b_;
};

std::vector<TransportKind> SealedKinds() {
  std::vector<TransportKind> kinds = {TransportKind::kSealedLoopback};
  if (UcxAvailable()) kinds.push_back(TransportKind::kSealedUcx);
  return kinds;
}
INSTANTIATE_TEST_SUITE_P(All, Sealed, ::testing::ValuesIn(SealedKinds()),
                         [](const auto& kind) { return KindName(kind.param); });

// Small ones come with their header, large ones are placed first: both ways of opening.
const std::vector<size_t> kSizes = {100, 1 << 20};

TEST_P(Sealed, NothingOfHeaderOrPayloadIsReadable) {
  for (size_t size : kSizes) {
    std::string payload;
    while (payload.size() < size) payload += "the secret of the day ";
    ASSERT_TRUE(Send("about a lease", payload).ok());
    ASSERT_TRUE(Eventually([&] { return arrived() != 0; }));
    EXPECT_EQ(last_, payload);
    arrived_ = 0;
    EXPECT_THAT(tap_->heard.back().header, Not(HasSubstr("lease")));
    EXPECT_THAT(tap_->heard.back().payload, Not(HasSubstr("secret")));
    EXPECT_EQ(tap_->heard.back().payload.size(), payload.size());
  }
  ASSERT_TRUE(Send("about a lease", "twice the same").ok() && Send("about a lease", "twice the same").ok());
  EXPECT_NE(tap_->heard.back().payload, tap_->heard[tap_->heard.size() - 2].payload);
}

TEST_P(Sealed, EveryFlippedBitOfAHeaderIsRefused) {
  const Heard kept = Keep("header", "payload");
  for (size_t bit = 0; bit < kept.header.size() * 8; ++bit) {
    Heard flipped = kept;
    flipped.header[bit / 8] ^= static_cast<char>(1 << (bit % 8));
    ASSERT_TRUE(tap_->Say(to_b_, flipped).ok());
  }
  // A flip in the payload's tag leaves the header's whole, whose counter is then used up.
  const auto refused = [&] { return Drops("seal_broken") + Drops("not_sealed") + Drops("seal_replayed"); };
  EXPECT_TRUE(Eventually([&] { return refused() == kept.header.size() * 8; })) << refused();
  EXPECT_EQ(arrived(), 0u);
}

TEST_P(Sealed, AFlippedPayloadEndsItsArrivalWithDataLoss) {
  for (size_t size : kSizes) {
    Heard kept = Keep("header", std::string(size, 'x'));
    kept.payload[size / 2] ^= 1;
    const size_t before = failed().size();
    ASSERT_TRUE(tap_->Say(to_b_, kept).ok());
    ASSERT_TRUE(Eventually([&] { return failed().size() == before + 1; }));
    EXPECT_TRUE(absl::IsDataLoss(failed().back())) << failed().back();
    EXPECT_THAT(std::string(failed().back().message()), HasSubstr("seal broken"));
  }
  EXPECT_EQ(Drops("seal_broken"), kSizes.size());
  EXPECT_EQ(arrived(), 0u);
}

TEST_P(Sealed, WhatIsRepeatedIsRefused) {
  for (size_t size : kSizes) {
    const size_t before = arrived();
    ASSERT_TRUE(Send("header", std::string(size, 'x')).ok());
    ASSERT_TRUE(Eventually([&] { return arrived() == before + 1; }));
    ASSERT_TRUE(tap_->Say(to_b_, tap_->heard.back()).ok());
  }
  EXPECT_TRUE(Eventually([&] { return Drops("seal_replayed") == kSizes.size(); }));
  EXPECT_EQ(arrived(), kSizes.size());
}

TEST_P(Sealed, WhatIsMovedIsRefused) {
  for (size_t size : kSizes) {
    const Heard one = Keep("extent 1", std::string(size, '1')), two = Keep("extent 2", std::string(size, '2'));
    const size_t before = failed().size();
    ASSERT_TRUE(tap_->Say(to_b_, {kChannel, one.header, two.payload}).ok());
    ASSERT_TRUE(Eventually([&] { return failed().size() == before + 1; })) << "a payload under another's header";
    const uint64_t broken = Drops("seal_broken");
    ASSERT_TRUE(tap_->Say(to_b_, {kOtherChannel, two.header, two.payload}).ok());
    EXPECT_TRUE(Eventually([&] { return Drops("seal_broken") == broken + 1; })) << "another channel";
    ASSERT_TRUE(tap_->Say(to_b_, {kChannel, two.header, two.payload.substr(1)}).ok());
    EXPECT_TRUE(Eventually([&] { return Drops("seal_broken") == broken + 2; })) << "cut";
  }
  EXPECT_EQ(arrived(), 0u);
}

TEST_P(Sealed, WhatWasHeardOnAnEndedConnectionOpensOnNoOther) {
  ASSERT_TRUE(Send("header", "payload").ok());
  const Heard heard = tap_->heard.back();
  Outcome fenced;
  a_->Disconnect(to_b_, [done = fenced.Callback()]() mutable { done(absl::OkStatus()); });
  ASSERT_TRUE(fenced.Wait());
  to_b_ = *a_->Connect(b_->address());
  // The first message of the new connection is the old one; the same peer then speaks for itself.
  ASSERT_TRUE(tap_->Say(to_b_, heard).ok());
  EXPECT_TRUE(Eventually([&] { return Drops("seal_replayed") == 1; }));
  ASSERT_TRUE(Send("header", "payload").ok());
  EXPECT_TRUE(Eventually([&] { return arrived() == 2; }));
  ASSERT_TRUE(tap_->Say(to_b_, heard).ok());
  EXPECT_TRUE(Eventually([&] { return Drops("seal_broken") == 1; })) << "another connection's keys";
  EXPECT_EQ(arrived(), 2u);
}

TEST_P(Sealed, WhoWasNotAdmittedIsRefusedAndSettingsThatDifferDoNotPair) {
  auto plain = factory_.MakePlain();
  EXPECT_THAT(std::string(plain->Connect(b_->address()).status().message()), HasSubstr("transfer.seal"));
  EXPECT_THAT(std::string(a_->Connect(plain->address()).status().message()), HasSubstr("transfer.seal"));
  // It has found out where b listens, but not b's keys.
  const std::string& sealed = b_->address();
  const size_t before = kSealedAddressMagic.size() + 2 * internal::kSealKeyBytes;
  auto to_b = plain->Connect(sealed.substr(before, sealed.size() - before - 8));
  ASSERT_TRUE(to_b.ok()) << to_b.status();
  Outcome outcome;
  ASSERT_TRUE(plain->SendMessage(*to_b, kChannel, Bytes("let me in"), {}, outcome.Callback()).ok());
  EXPECT_TRUE(Eventually([&] { return Drops("not_sealed") == 1; }));
  // Nor does a message that somebody else was heard to send help it.
  const Heard kept = Keep("header", "payload");
  std::string wrong = kept.header;
  wrong[40] ^= 1;  // of the public key that names the connection
  ASSERT_TRUE(
      plain->SendMessage(*to_b, kChannel, Bytes(wrong), {kept.payload.data(), kept.payload.size()}, [](auto) {}).ok());
  EXPECT_TRUE(Eventually([&] { return Drops("seal_broken") == 1; }));
  EXPECT_EQ(arrived(), 0u);
  plain->Close();
}

TEST_P(Sealed, AHandoffIsRepairedWhateverIsDoneToItsMessages) {
  auto faulty = FaultTransport::Wrap(factory_.MakePlain(), {});
  FaultTransport* const faults = faulty.get();
  auto prefill = SealTransport(std::move(faulty), HostMemoryFunctions());
  Receiver receiver(*b_);
  const PeerId peer = *prefill->Connect(b_->address());
  constexpr size_t kExtents = 40, kBytes = 40000;
  const auto source = Pattern(kExtents * kBytes, 1);
  std::vector<uint8_t> destination(source.size());
  std::vector<ExpectedExtent> expected;
  for (size_t i = 0; i < kExtents; ++i) expected.push_back({i, {destination.data() + i * kBytes, kBytes}});
  ASSERT_TRUE(receiver.Open({1, 1}, expected).ok());
  FaultPlan plan;
  plan.flip_payload = plan.flip_header = plan.truncate = plan.duplicate = plan.reorder = 0.1;
  faults->SetPlan(plan);
  bool complete = false;
  {
    Sender sender(*prefill, peer, {1, 1});
    for (size_t i = 0; i < kExtents; ++i) ASSERT_TRUE(sender.Send(i, {source.data() + i * kBytes, kBytes}).ok());
    for (int round = 0; round < 20 && !complete; ++round) {
      ASSERT_TRUE(sender.FlushAndWait(kSoon).ok());
      (void)Eventually([&] { return receiver.progress(1).extents == kExtents; }, absl::Milliseconds(50));
      const auto verified = receiver.Verify(*sender.BuildManifest(""));
      ASSERT_TRUE(verified.ok()) << verified.status();
      complete = verified->complete;
      if (!complete) {
        ASSERT_TRUE(sender.Resend(verified->resend).ok());
      }
    }
  }
  EXPECT_TRUE(complete);
  EXPECT_TRUE(destination == source);
  EXPECT_GT(faults->counts().payload_flipped, 0u);
  EXPECT_GT(receiver.statistics().rejected["seal_broken"], 0u);
  EXPECT_EQ(receiver.statistics().rejected["digest_mismatch"], 0u) << "the seal finds it first";
  ASSERT_TRUE(receiver.FenceAndWait(1, kSoon));
  prefill->Close();
  b_->Close();
}

TEST(ReplayWindow, TakesEachCounterOnceInAnyOrderWithinItsSize) {
  internal::ReplayWindow window;
  EXPECT_TRUE(window.Accept(5));
  EXPECT_TRUE(window.Accept(0));
  EXPECT_FALSE(window.Accept(5));
  EXPECT_FALSE(window.Accept(0));
  constexpr uint64_t kSize = internal::ReplayWindow::kSize;
  EXPECT_TRUE(window.Accept(kSize + 2));
  EXPECT_FALSE(window.Accept(2)) << "too far back to know";
  EXPECT_TRUE(window.Accept(3));
  EXPECT_FALSE(window.Accept(5)) << "still within";
  EXPECT_TRUE(window.Accept(10 * kSize));
  EXPECT_FALSE(window.Accept(kSize + 2));
  EXPECT_TRUE(window.Accept(10 * kSize - 1));
  EXPECT_FALSE(window.Accept(10 * kSize - 1));
}

TEST(Seal, NoKeyComesOutOfAPublicKeyOfSmallOrder) {
  const internal::SealKeyPair own = internal::SealKeyPair::Random();
  const auto keys = internal::SealKeys::Derive(own, {}, own.public_key(), {}, internal::RandomSealBytes());
  EXPECT_TRUE(absl::IsInvalidArgument(keys.status())) << keys.status();
}

}  // namespace
}  // namespace millrace::kvtransfer::testing
