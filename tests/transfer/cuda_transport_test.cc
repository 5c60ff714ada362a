// SPDX-License-Identifier: Apache-2.0
// Memory of a card over UCX, staged through the host and by UCX itself: the promises of transport.h that depend on
// where bytes lie. The whole conformance suite on host memory is kvtransfer's own.
//
// Needs a card. What UCX moves by itself needs its CUDA build too (deploy/setup.sh --cuda; tests/gpu.sh finds it).
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/device/cuda_device.h"
#include "engine/device/device_copy.h"
#include "engine/status.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/staged_transport.h"
#include "kvtransfer/transport_test_util.h"
#include "kvtransfer/ucx_transport.h"
#include "services/common/cache_extents.h"

namespace millrace::kvtransfer::testing {
namespace {

constexpr uint16_t kTestChannel = 7;
constexpr LeaseKey kKey{7, 3};

// Memory of either kind with contents.
class Block {
 public:
  Block(MemoryKind kind, const std::vector<uint8_t>& content) : kind_(kind), bytes_(content.size()) {
    if (kind == MemoryKind::kHost) {
      host_ = content;
      return;
    }
    auto buffer = cuda::DeviceBuffer::Take(static_cast<int64_t>(bytes_), "a test");
    CHECK(buffer.ok(), buffer.status().ToString());
    device_ = *std::move(buffer);
    Write(content);
  }
  Memory memory() { return {kind_ == MemoryKind::kHost ? host_.data() : device_.data(), bytes_, kind_}; }
  void Write(const std::vector<uint8_t>& content) {
    CHECK(CacheMemoryFunctions().copy(memory(), {content.data(), content.size()}).ok());
  }
  std::vector<uint8_t> Read() {
    std::vector<uint8_t> content(bytes_);
    CHECK(CacheMemoryFunctions().copy({content.data(), bytes_}, memory()).ok());
    return content;
  }

 private:
  const MemoryKind kind_;
  const size_t bytes_;
  std::vector<uint8_t> host_;
  cuda::DeviceBuffer device_;
};

enum class Way { kStaged, kDirect };

class DeviceTransport : public ::testing::TestWithParam<Way> {
 protected:
  void SetUp() override {
    if (const absl::Status attached = AttachDevice(); !attached.ok()) GTEST_SKIP() << attached.message();
    a_ = Make();
    b_ = Make();
    if (a_ == nullptr) GTEST_SKIP() << "UCX " << UcxVersion() << " carries no device memory";
    auto peer = a_->Connect(b_->address());
    ASSERT_TRUE(peer.ok()) << peer.status();
    to_b_ = *peer;
  }
  void TearDown() override {
    if (a_) a_->Close();
    if (b_) b_->Close();
  }

  static std::unique_ptr<Transport> Make() {
    TransportOptions options;
    options.memory = CacheMemoryFunctions();
    options.log = [](absl::string_view line) { printf("%s\n", std::string(line.data(), line.size()).c_str()); };
    auto transport = CreateUcxTransport(std::move(options));
    CHECK(transport.ok(), transport.status().ToString());
    if (GetParam() == Way::kStaged) return StageDeviceMemory(std::move(*transport), CacheMemoryFunctions());
    return (*transport)->Supports(MemoryKind::kDevice) ? std::move(*transport) : nullptr;
  }

  std::unique_ptr<Transport> a_, b_;
  PeerId to_b_;
};

INSTANTIATE_TEST_SUITE_P(Cuda, DeviceTransport, ::testing::Values(Way::kStaged, Way::kDirect),
                         [](const auto& way) { return way.param == Way::kStaged ? "Staged" : "Direct"; });

TEST_P(DeviceTransport, PayloadsOfEverySizeArriveIntactBetweenEitherKindOfMemory) {
  for (const MemoryKind from : {MemoryKind::kHost, MemoryKind::kDevice}) {
    for (const MemoryKind to : {MemoryKind::kHost, MemoryKind::kDevice}) {
      for (const size_t size :
           {1ul, 7ul, 4096ul, 8193ul, 65536ul, (128ul << 10) + 1, (1ul << 20) + 3, 16ul << 20, 64ul << 20}) {
        SCOPED_TRACE(absl::StrCat(from == MemoryKind::kHost ? "host" : "device", " to ",
                                  to == MemoryKind::kHost ? "host" : "device", ", ", size, " bytes"));
        Block source(from, Pattern(size, size)), destination(to, std::vector<uint8_t>(size, 0xee));
        Outcome sent, arrived;
        FunctionHandler sink(
            [&](const IncomingMessage&) { return Placement::Into(destination.memory(), arrived.Callback()); });
        b_->SetHandler(kTestChannel, &sink);
        ASSERT_TRUE(a_->SendMessage(to_b_, kTestChannel, Bytes("x"), source.memory(), sent.Callback()).ok());
        ASSERT_TRUE(arrived.Get().ok()) << arrived.Get();
        ASSERT_TRUE(sent.Get().ok()) << sent.Get();
        ASSERT_TRUE(destination.Read() == Pattern(size, size));
        b_->SetHandler(kTestChannel, nullptr);
      }
    }
  }
}

TEST_P(DeviceTransport, ADestinationThatIsTooSmallIsNotTouched) {
  constexpr size_t kBytes = 1 << 20;
  Block source(MemoryKind::kDevice, Pattern(kBytes, 1)), destination(MemoryKind::kDevice, Pattern(kBytes, 2));
  Outcome sent, arrived;
  FunctionHandler sink([&](const IncomingMessage&) {
    Memory small = destination.memory();
    small.bytes -= 1;
    return Placement::Into(small, arrived.Callback());
  });
  b_->SetHandler(kTestChannel, &sink);
  ASSERT_TRUE(a_->SendMessage(to_b_, kTestChannel, Bytes("x"), source.memory(), sent.Callback()).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(arrived.Get())) << arrived.Get();
  EXPECT_TRUE(sent.Get().ok()) << sent.Get();
  EXPECT_TRUE(destination.Read() == Pattern(kBytes, 2));
  b_->SetHandler(kTestChannel, nullptr);
}

TEST_P(DeviceTransport, ManyMessagesInBothDirectionsKeepApart) {
  constexpr int kMessages = 24;
  constexpr size_t kBytes = (3 << 20) + 5;
  std::vector<std::unique_ptr<Block>> sources, at_a, at_b;
  for (int i = 0; i < kMessages; ++i) {
    sources.push_back(std::make_unique<Block>(MemoryKind::kDevice, Pattern(kBytes, i)));
    for (auto* side : {&at_a, &at_b}) {
      side->push_back(std::make_unique<Block>(MemoryKind::kDevice, std::vector<uint8_t>(kBytes, 0xee)));
    }
  }
  std::atomic<int> arrived{0};
  const auto taker = [&](std::vector<std::unique_ptr<Block>>& blocks) {
    return [&](const IncomingMessage& m) {
      return Placement::Into(blocks[m.header[0]]->memory(), [&](const absl::Status& status) {
        CHECK(status.ok(), status.ToString());
        ++arrived;
      });
    };
  };
  FunctionHandler sink_a(taker(at_a)), sink_b(taker(at_b));
  a_->SetHandler(kTestChannel, &sink_a);
  b_->SetHandler(kTestChannel, &sink_b);
  const auto to_a = b_->Connect(a_->address());
  ASSERT_TRUE(to_a.ok()) << to_a.status();
  std::vector<Outcome> outcomes(2 * kMessages);
  for (int i = 0; i < kMessages; ++i) {
    const std::string header(1, static_cast<char>(i));
    ASSERT_TRUE(
        a_->SendMessage(to_b_, kTestChannel, Bytes(header), sources[i]->memory(), outcomes[2 * i].Callback()).ok());
    ASSERT_TRUE(
        b_->SendMessage(*to_a, kTestChannel, Bytes(header), sources[i]->memory(), outcomes[2 * i + 1].Callback()).ok());
  }
  ASSERT_TRUE(Eventually([&] { return arrived == 2 * kMessages; }));
  for (Outcome& outcome : outcomes) EXPECT_TRUE(outcome.Get().ok()) << outcome.Get();
  for (int i = 0; i < kMessages; ++i) {
    EXPECT_TRUE(at_a[i]->Read() == Pattern(kBytes, i)) << i;
    EXPECT_TRUE(at_b[i]->Read() == Pattern(kBytes, i)) << i;
  }
  a_->SetHandler(kTestChannel, nullptr);
  b_->SetHandler(kTestChannel, nullptr);
}

// The fence: what is given back may be used by others at once.
TEST_P(DeviceTransport, AfterADisconnectIsFencedNothingWritesToTheCardAnyMore) {
  constexpr size_t kBytes = 64 << 20;
  for (int round = 0; round < 5; ++round) {
    Block source(MemoryKind::kDevice, Pattern(kBytes, 1));
    Block destination(MemoryKind::kDevice, std::vector<uint8_t>(kBytes, 0xee));
    Outcome sent, arrived, fenced;
    PeerId from;
    std::atomic<bool> placed{false};
    FunctionHandler sink([&](const IncomingMessage& m) {
      from = m.from;
      placed = true;
      return Placement::Into(destination.memory(), arrived.Callback());
    });
    b_->SetHandler(kTestChannel, &sink);
    ASSERT_TRUE(a_->SendMessage(to_b_, kTestChannel, Bytes("x"), source.memory(), sent.Callback()).ok());
    ASSERT_TRUE(Eventually([&] { return placed.load(); }));
    b_->Disconnect(from, [done = fenced.Callback()]() mutable { done(absl::OkStatus()); });
    ASSERT_TRUE(fenced.Get().ok());
    ASSERT_TRUE(arrived.Wait());
    const std::vector<uint8_t> after = Pattern(kBytes, 9);
    destination.Write(after);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    EXPECT_TRUE(destination.Read() == after) << "round " << round;
    ASSERT_TRUE(sent.Wait());
    b_->SetHandler(kTestChannel, nullptr);
    ASSERT_TRUE(Eventually([&] {  // the next round's connection
      auto peer = a_->Connect(b_->address());
      if (peer.ok()) to_b_ = *peer;
      return peer.ok();
    }));
  }
}

TEST_P(DeviceTransport, AHandOffFromCardToCardIsProved) {
  const std::vector<size_t> sizes = {1, 5000, 600000, 600000, 8 << 20, 40 << 20, 3000};
  Receiver receiver(*b_, {.memory = CacheMemoryFunctions()});
  std::vector<std::unique_ptr<Block>> sources, destinations;
  std::vector<ExpectedExtent> expected;
  for (size_t i = 0; i < sizes.size(); ++i) {
    sources.push_back(std::make_unique<Block>(MemoryKind::kDevice, Pattern(sizes[i], i)));
    destinations.push_back(std::make_unique<Block>(MemoryKind::kDevice, std::vector<uint8_t>(sizes[i], 0xee)));
    expected.push_back({i, destinations[i]->memory()});
  }
  ASSERT_TRUE(receiver.Open(kKey, expected).ok());
  Sender sender(*a_, to_b_, kKey, {.memory = CacheMemoryFunctions()});
  for (size_t i = 0; i < sizes.size(); ++i) ASSERT_TRUE(sender.Send(i, sources[i]->memory()).ok());
  ASSERT_TRUE(sender.FlushAndWait(kSoon).ok()) << sender.status();
  const auto manifest = sender.BuildManifest("");
  ASSERT_TRUE(manifest.ok()) << manifest.status();
  ASSERT_TRUE(Eventually([&] { return receiver.Verify(*manifest)->complete; }));
  for (size_t i = 0; i < sizes.size(); ++i) EXPECT_TRUE(destinations[i]->Read() == Pattern(sizes[i], i)) << i;
}

}  // namespace
}  // namespace millrace::kvtransfer::testing
