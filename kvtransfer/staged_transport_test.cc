// SPDX-License-Identifier: Apache-2.0
// Device memory through host buffers, with a device that any machine has: its bytes are kept inverted, so that whoever
// reads or writes them without the copy function is found out.
#include "kvtransfer/staged_transport.h"

#include <algorithm>

#include "kvtransfer/receiver.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/transport_test_util.h"

namespace millrace::kvtransfer::testing {
namespace {

constexpr LeaseKey kKey{7, 3};

void Convert(const uint8_t* from, bool inverted_from, uint8_t* to, bool inverted_to, size_t bytes) {
  const uint8_t mask = inverted_from != inverted_to ? 0xff : 0;
  for (size_t i = 0; i < bytes; ++i) to[i] = from[i] ^ mask;
}

MemoryFunctions InvertedDevice() {
  MemoryFunctions functions = HostMemoryFunctions();
  functions.copy = [](Memory destination, ConstMemory source) {
    Convert(static_cast<const uint8_t*>(source.data), source.kind == MemoryKind::kDevice,
            static_cast<uint8_t*>(destination.data), destination.kind == MemoryKind::kDevice, source.bytes);
    return absl::OkStatus();
  };
  functions.digest = [](ConstMemory content, DigestDone done) {
    std::vector<uint8_t> plain(content.bytes);
    Convert(static_cast<const uint8_t*>(content.data), content.kind == MemoryKind::kDevice, plain.data(), false,
            content.bytes);
    done(ContentDigest(plain.data(), plain.size()));
  };
  return functions;
}

std::vector<uint8_t> OnDevice(std::vector<uint8_t> plain) {
  for (uint8_t& byte : plain) byte ^= 0xff;
  return plain;
}

class StagedTransportTest : public ::testing::TestWithParam<TransportKind> {
 protected:
  std::unique_ptr<Transport> Make(size_t max_staging_bytes = size_t{1} << 30) {
    TransportOptions options;
    options.memory = InvertedDevice();
    return StageDeviceMemory(factory_.Make(std::move(options)), InvertedDevice(), max_staging_bytes);
  }

  // Whether everything has arrived, asked until it is so.
  using Settled = absl::FunctionRef<bool(Sender& sender, Receiver& receiver, const Manifest& manifest)>;
  static bool Arrived(Sender& /*sender*/, Receiver& receiver, const Manifest& manifest) {
    return receiver.Verify(manifest)->complete;
  }

  // A hand-off of extents of these sizes from device to device, ended by `settled`; the bytes must have come over.
  static void HandOver(Transport& here, Transport& there, const std::vector<size_t>& sizes, Settled settled) {
    Receiver receiver(there, {.memory = InvertedDevice()});
    std::vector<std::vector<uint8_t>> sources, destinations;
    std::vector<ExpectedExtent> expected;
    for (size_t i = 0; i < sizes.size(); ++i) {
      sources.push_back(OnDevice(Pattern(sizes[i], i)));
      destinations.push_back(std::vector<uint8_t>(sizes[i], 0xab));
      expected.push_back({i, {destinations[i].data(), sizes[i], MemoryKind::kDevice}});
    }
    ASSERT_TRUE(receiver.Open(kKey, expected).ok());
    {
      const auto peer = here.Connect(there.address());
      ASSERT_TRUE(peer.ok());
      Sender sender(here, *peer, kKey, {.memory = InvertedDevice()});
      for (size_t i = 0; i < sizes.size(); ++i) {
        ASSERT_TRUE(sender.Send(i, {sources[i].data(), sizes[i], MemoryKind::kDevice}).ok());
      }
      ASSERT_TRUE(sender.FlushAndWait(kSoon).ok());
      const auto manifest = sender.BuildManifest("");
      ASSERT_TRUE(manifest.ok()) << manifest.status();
      ASSERT_TRUE(Eventually([&] { return settled(sender, receiver, *manifest); }));
    }
    EXPECT_EQ(destinations, sources) << "inverted on both sides";
    EXPECT_TRUE(receiver.FenceAndWait(kKey.lease, kSoon));
    here.Close();
    there.Close();
  }

  TransportFactory factory_{GetParam()};
};

std::string Name(const ::testing::TestParamInfo<TransportKind>& param_info) { return KindName(param_info.param); }
INSTANTIATE_TEST_SUITE_P(All, StagedTransportTest, ::testing::ValuesIn(AllKinds()), Name);

TEST_P(StagedTransportTest, AHandOffFromDeviceToDeviceIsCompleteAndProved) {
  auto there = Make(), here = Make();
  HandOver(*here, *there, {1, 100, 16384, 300000, 5000000}, Arrived);
}

TEST_P(StagedTransportTest, BeyondItsBufferASendIsTriedAgainUntilEverythingArrived) {
  auto there = Make(), here = Make(600000);  // two of the extents below
  HandOver(*here, *there, std::vector<size_t>(30, 250000), Arrived);
}

TEST_P(StagedTransportTest, AnArrivalWithoutBufferFailsAndMayBeAskedForAgain) {
  auto there = Make(300000), here = Make();
  // As a prefill worker repairs: what is missing is sent again until nothing is.
  HandOver(*here, *there, std::vector<size_t>(12, 250000),
           [](Sender& sender, Receiver& receiver, const Manifest& manifest) {
             const VerifyResult result = *receiver.Verify(manifest);
             if (result.complete) return true;
             EXPECT_TRUE(sender.Resend(result.resend).ok());
             return sender.FlushAndWait(kSoon).ok() && receiver.Verify(manifest)->complete;
           });
}

}  // namespace
}  // namespace millrace::kvtransfer::testing
