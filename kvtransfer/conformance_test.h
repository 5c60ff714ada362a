// SPDX-License-Identifier: Apache-2.0
// The fixture of the conformance suite of transport.h: two transports in this process, one receiving into fresh memory.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kvtransfer/status.h"
#include "kvtransfer/transport_test_util.h"

namespace millrace::kvtransfer::testing {

inline constexpr uint16_t kChannel = 7;

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

  // b's transport thread waits at the gate, and a has sent `payload` once for each outcome.
  void SendWhileThePeerHangs(Gate& gate, const std::vector<uint8_t>& payload, std::vector<Outcome>& outcomes) {
    b_->RunAfter(absl::ZeroDuration(), [&] { gate.WaitHere(); });
    gate.AwaitSomebody();
    for (Outcome& outcome : outcomes) {
      ASSERT_TRUE(
          a_->SendMessage(to_b_, kChannel, Bytes("m"), {payload.data(), payload.size()}, outcome.Callback()).ok());
    }
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

}  // namespace millrace::kvtransfer::testing
