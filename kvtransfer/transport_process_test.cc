// SPDX-License-Identifier: Apache-2.0
// UCX between two processes, and what happens when one of them dies or hangs: kill -9 before, during and after a
// transfer, SIGSTOP in the middle. Every test checks that nothing is left behind in ours.
#include <signal.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "kvtransfer/peer_process.h"

namespace millrace::kvtransfer::testing {
namespace {

class TwoProcesses : public ::testing::TestWithParam<TransportKind> {
 protected:
  void SetUp() override {
    if (!UcxAvailable()) GTEST_SKIP() << "built without UCX";
    // UCX keeps some descriptors for the life of the process once it has been used.
    factory_.Make()->Close();
    files_ = OpenFiles(), threads_ = Threads();
    transport_ = factory_.Make();
    ASSERT_NE(transport_, nullptr);
    transport_->SetHandler(kFromPeer, &handler_);
    transport_->OnPeerFailed([this](PeerId, const absl::Status& why) {
      std::lock_guard lock(mu_);
      ++failures_;
      why_ = why;
    });
  }
  void TearDown() override {
    if (transport_ == nullptr) return;
    transport_->Close();
    const auto statistics = transport_->statistics();
    EXPECT_EQ(statistics.messages_in_flight, 0u);
    EXPECT_EQ(statistics.bytes_in_flight, 0u);
    EXPECT_EQ(statistics.messages_queued, 0u);
    EXPECT_EQ(statistics.arrivals_in_flight, 0u);
    EXPECT_EQ(statistics.peers_connected, 0u);
    transport_.reset();
    peer_.reset();
    EXPECT_EQ(OpenFiles(), files_);
    EXPECT_TRUE(Eventually([&] { return Threads() <= threads_; }));
  }

  void StartPeer() {
    hello_ = false;
    peer_ = std::make_unique<PeerProcess>();
    peer_->Start(transport_->address());
    ASSERT_TRUE(Eventually([&] { return hello_.load(); })) << "the peer did not come up";
  }
  std::unique_ptr<Outcome> Send(const std::string& header, const std::vector<uint8_t>& payload) {
    auto outcome = std::make_unique<Outcome>();
    auto sent =
        transport_->SendMessage(from_, kToPeer, Bytes(header), {payload.data(), payload.size()}, outcome->Callback());
    EXPECT_TRUE(sent.ok()) << sent.status();
    return outcome;
  }
  int failures() {
    std::lock_guard lock(mu_);
    return failures_;
  }

  Placement OnMessage(const IncomingMessage& m) {
    from_ = m.from;
    if (m.header.size() == 5) {
      hello_ = true;
      return Placement::Consumed();
    }
    if (on_large_) on_large_();
    received_.assign(m.payload_bytes, 0);
    return Placement::Into({received_.data(), received_.size()}, arrival_.Callback());
  }

  TransportFactory factory_{GetParam()};
  size_t files_ = 0, threads_ = 0;
  FunctionHandler handler_{[this](const IncomingMessage& m) { return OnMessage(m); }};
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<PeerProcess> peer_;
  std::atomic<bool> hello_{false};
  PeerId from_;
  std::function<void()> on_large_;
  std::vector<uint8_t> received_;
  Outcome arrival_;
  std::mutex mu_;
  int failures_ = 0;
  absl::Status why_;
};

INSTANTIATE_TEST_SUITE_P(All, TwoProcesses, ::testing::Values(TransportKind::kUcxTcpSelf, TransportKind::kUcxDefault),
                         [](const auto& kind) { return KindName(kind.param); });

TEST_P(TwoProcesses, PayloadsOfEverySizeArriveIntactBothWays) {
  StartPeer();
  for (size_t size : {0ul, 1ul, 8192ul, 65536ul, 1ul << 20, 64ul << 20}) {
    EXPECT_TRUE(Send("take", Pattern(size, 1))->Get().ok()) << size;
    arrival_ = Outcome();
    EXPECT_TRUE(Send(absl::StrCat("send ", size), {})->Get().ok());
    ASSERT_TRUE(arrival_.Get().ok()) << size;
    EXPECT_TRUE(received_ == Pattern(size, size)) << size;
  }
  EXPECT_EQ(peer_->Finish(), 0);
  EXPECT_TRUE(Eventually([&] { return failures() == 1; }, kFailureBound));
}

TEST_P(TwoProcesses, PeerKilledBeforeASendFailsItWithinTheBound) {
  StartPeer();
  peer_->Kill();
  const auto payload = Pattern(1 << 20, 1);
  const absl::Time start = absl::Now();
  Outcome outcome;
  auto sent = transport_->SendMessage(from_, kToPeer, Bytes("x"), {payload.data(), payload.size()}, outcome.Callback());
  if (sent.ok()) {
    EXPECT_TRUE(absl::IsUnavailable(outcome.Get(kFailureBound))) << outcome.Get();
  } else {
    EXPECT_TRUE(absl::IsNotFound(sent.status())) << "already known to be dead";
  }
  EXPECT_TRUE(Eventually([&] { return failures() == 1; }, kFailureBound));
  EXPECT_LT(absl::Now() - start, kFailureBound);
}

TEST_P(TwoProcesses, PeerKilledDuringSendsFailsThemAllWithinTheBound) {
  StartPeer();
  peer_->Stop();  // so that the sends are surely under way when it dies
  const auto payload = Pattern(16 << 20, 1);
  std::vector<std::unique_ptr<Outcome>> outcomes;
  for (int i = 0; i < 8; ++i) outcomes.push_back(Send("take", payload));
  ASSERT_TRUE(Eventually([&] { return transport_->statistics().messages_in_flight == 8; }));
  const absl::Time start = absl::Now();
  peer_->Kill();
  for (auto& outcome : outcomes) {
    EXPECT_TRUE(absl::IsUnavailable(outcome->Get(kFailureBound))) << outcome->Get();
    EXPECT_EQ(outcome->times(), 1);
  }
  EXPECT_TRUE(Eventually([&] { return failures() == 1; }, kFailureBound));
  EXPECT_LT(absl::Now() - start, kFailureBound);
  EXPECT_EQ(transport_->statistics().errors["UNAVAILABLE"], 8u);
}

TEST_P(TwoProcesses, PeerKilledWhileItSendsFailsTheArrivalWithinTheBound) {
  StartPeer();
  on_large_ = [&] { peer_->Signal(SIGKILL); };
  absl::Time start = absl::Now();
  EXPECT_TRUE(Send("send 67108864", {})->Wait());
  EXPECT_TRUE(absl::IsUnavailable(arrival_.Get(kFailureBound))) << arrival_.Get();
  EXPECT_EQ(arrival_.times(), 1);
  EXPECT_TRUE(Eventually([&] { return failures() == 1; }, kFailureBound));
  EXPECT_LT(absl::Now() - start, kFailureBound);
  EXPECT_EQ(transport_->statistics().errors["UNAVAILABLE"], 1u);
}

TEST_P(TwoProcesses, PeerKilledAfterASendLeavesItsSuccessAndIsReported) {
  StartPeer();
  const auto payload = Pattern(1 << 20, 1);
  const auto outcome = Send("take", payload);
  ASSERT_TRUE(outcome->Get().ok());
  peer_->Kill();
  EXPECT_TRUE(Eventually([&] { return failures() == 1; }, kFailureBound));
  EXPECT_TRUE(absl::IsUnavailable(why_)) << why_;
  EXPECT_EQ(outcome->times(), 1);
  EXPECT_TRUE(absl::IsNotFound(transport_->SendMessage(from_, kToPeer, {}, {}, nullptr).status()));
}

TEST_P(TwoProcesses, ReplacementOfADeadPeerIsUsedWithoutRestart) {
  for (int i = 0; i < 4; ++i) {
    StartPeer();
    EXPECT_TRUE(Send("take", Pattern(1 << 20, 1))->Get().ok());
    peer_->Kill();
    EXPECT_TRUE(Eventually([&] { return failures() == i + 1; }, kFailureBound));
  }
}

// The fence must not depend on the peer: it hangs in the middle of its send, we take our memory back, it wakes up.
TEST_P(TwoProcesses, StoppedPeerIsFencedByDisconnectAndDoesNotWriteWhenItWakes) {
  StartPeer();
  on_large_ = [&] { peer_->Stop(); };
  EXPECT_TRUE(Send("send 67108864", {})->Wait());
  ASSERT_TRUE(Eventually([&] { return transport_->statistics().arrivals_in_flight == 1; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  ASSERT_EQ(arrival_.times(), 0) << "the peer is stopped, so the arrival must be pending";
  const absl::Time start = absl::Now();
  Outcome fenced;
  transport_->Disconnect(from_, [callback = fenced.Callback()]() mutable { callback(absl::OkStatus()); });
  ASSERT_TRUE(fenced.Wait(kFailureBound));
  EXPECT_LT(absl::Now() - start, kFailureBound);
  EXPECT_FALSE(arrival_.Get().ok());
  std::fill(received_.begin(), received_.end(), 0xbb);
  peer_->Signal(SIGCONT);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  EXPECT_EQ(received_, std::vector<uint8_t>(received_.size(), 0xbb));
}

TEST_P(TwoProcesses, StoppedPeerReleasesSourcesByDisconnect) {
  StartPeer();
  peer_->Stop();
  const auto payload = Pattern(64 << 20, 1);
  const auto outcome = Send("take", payload);
  ASSERT_TRUE(Eventually([&] { return transport_->statistics().messages_in_flight == 1; }));
  Outcome fenced;
  transport_->Disconnect(from_, [callback = fenced.Callback()]() mutable { callback(absl::OkStatus()); });
  EXPECT_TRUE(fenced.Wait(kFailureBound));
  EXPECT_FALSE(outcome->Get(kFailureBound).ok());
}

// A peer that dies at a random moment of its first milliseconds, handshake included.
TEST_P(TwoProcesses, PeersKilledWhileTheyConnectHurtNobody) {
  constexpr int kPeers = 60;
  for (int i = 0; i < kPeers; ++i) {
    PeerProcess victim;
    victim.Start(transport_->address());
    std::this_thread::sleep_for(std::chrono::microseconds(8000 + 1000 * i));
    victim.Kill();
  }
  StartPeer();
  EXPECT_TRUE(Send("take", Pattern(1 << 20, 1))->Get().ok());
}

}  // namespace
}  // namespace millrace::kvtransfer::testing
