// SPDX-License-Identifier: Apache-2.0
// UCX between two network namespaces with a veth pair between them, whose link is then cut.
//
// Needs root, ip, netns and veth; says NOT TESTED where they are missing.
#include <gmock/gmock.h>
#include <unistd.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "kvtransfer/peer_process.h"

namespace millrace::kvtransfer::testing {
namespace {

int Shell(const std::string& command) { return std::system(absl::StrCat(command, " >/dev/null 2>&1").c_str()); }

// Two namespaces of our own with a veth pair between them. Nothing is added to the one we live in: tests beside us
// would take the new interface for theirs and hang when it goes.
class Namespaces {
 public:
  bool Make() {
    return Shell("ip netns add " + a_) == 0 && Shell("ip netns add " + b_) == 0 &&
           Shell(absl::StrCat("ip -n ", a_, " link add vetha type veth peer name vethb netns ", b_)) == 0 &&
           Up(a_, "vetha", "10.213.77.1/24") && Up(b_, "vethb", "10.213.77.2/24") &&
           Eventually([&] { return Running(a_, "vetha") && Running(b_, "vethb"); });
  }
  ~Namespaces() {
    Shell("ip netns del " + a_);
    Shell("ip netns del " + b_);
  }
  // Runs the other half of the test in the first namespace.
  int RunInside() const {
    char self[4096] = {};
    if (readlink("/proc/self/exe", self, sizeof(self) - 1) <= 0) return -1;
    return std::system(absl::StrCat("ip netns exec ", a_, " env UCX_TLS=tcp UCX_NET_DEVICES=vetha ", kInside, "=", b_,
                                    " ", self, " --gtest_filter=TwoNamespaces.InsideTheFirst")
                           .c_str());
  }
  static constexpr const char* kInside = "MILLRACE_TEST_OTHER_NAMESPACE";

 private:
  static bool Up(const std::string& name, const std::string& device, const std::string& address) {
    return Shell(absl::StrCat("ip -n ", name, " addr add ", address, " dev ", device)) == 0 &&
           Shell(absl::StrCat("ip -n ", name, " link set ", device, " up")) == 0 &&
           Shell(absl::StrCat("ip -n ", name, " link set lo up")) == 0;
  }
  // The kernel tells of a carrier up to a second later, and UCX skips a device without one.
  static bool Running(const std::string& name, const std::string& device) {
    return Shell(absl::StrCat("ip -n ", name, " link show dev ", device, " | grep -q 'state UP'")) == 0;
  }
  const std::string a_ = absl::StrCat("millrace-a", getpid()), b_ = absl::StrCat("millrace-b", getpid());
};

TEST(TwoNamespaces, TransfersCrossAVethPairAndACutLinkIsBounded) {
  if (!UcxAvailable()) GTEST_SKIP() << "built without UCX";
  Namespaces namespaces;
  if (!namespaces.Make())
    GTEST_SKIP() << "NOT TESTED: cannot make network namespaces with a veth pair here (needs root, ip, netns and veth)";
  EXPECT_EQ(namespaces.RunInside(), 0) << "see above";
}

TEST(TwoNamespaces, InsideTheFirst) {
  const char* other = std::getenv(Namespaces::kInside);
  if (other == nullptr) GTEST_SKIP() << "the test before starts this one inside a namespace";
  TransportOptions options;
  options.log = [](absl::string_view) {};
  auto created = CreateUcxTransport(options);
  ASSERT_TRUE(created.ok()) << created.status();
  Transport& transport = **created;
  std::atomic<bool> hello{false};
  PeerId from;
  std::vector<uint8_t> received;
  Outcome arrival;
  FunctionHandler handler([&](const IncomingMessage& m) {
    from = m.from;
    if (m.header.size() == 5) {
      hello = true;
      return Placement::Consumed();
    }
    received.assign(m.payload_bytes, 0);
    return Placement::Into({received.data(), received.size()}, arrival.Callback());
  });
  transport.SetHandler(kFromPeer, &handler);
  Outcome failed;
  auto failed_callback = std::make_shared<SendDone>(failed.Callback());
  transport.OnPeerFailed([failed_callback](PeerId, const absl::Status& why) { (*failed_callback)(why); });

  PeerProcess peer;
  peer.Start(transport.address(), {"ip", "netns", "exec", other, "env", "UCX_NET_DEVICES=vethb"});
  ASSERT_TRUE(Eventually([&] { return hello.load(); }));
  const auto payload = Pattern(32 << 20, 1);
  Outcome taken, asked;
  ASSERT_TRUE(
      transport.SendMessage(from, kToPeer, Bytes("take"), {payload.data(), payload.size()}, taken.Callback()).ok());
  EXPECT_TRUE(taken.Get().ok());
  ASSERT_TRUE(transport.SendMessage(from, kToPeer, Bytes("send 33554432"), {}, asked.Callback()).ok());
  ASSERT_TRUE(arrival.Get().ok());
  EXPECT_TRUE(received == Pattern(32 << 20, 32 << 20));
  EXPECT_THAT(transport.statistics().lanes, ::testing::ElementsAre(::testing::HasSubstr("tcp/vetha")));

  // The link goes down with a send under way. TCP alone would try for minutes.
  peer.Stop();
  Outcome lost;
  ASSERT_TRUE(
      transport.SendMessage(from, kToPeer, Bytes("take"), {payload.data(), payload.size()}, lost.Callback()).ok());
  ASSERT_TRUE(Eventually([&] { return transport.statistics().messages_in_flight == 1; }));
  ASSERT_EQ(Shell("ip link set vetha down"), 0);
  Outcome fenced;
  transport.Disconnect(from, [callback = fenced.Callback()]() mutable { callback(absl::OkStatus()); });
  EXPECT_TRUE(fenced.Wait(kFailureBound)) << "our own disconnect is bounded though the link is dead";
  EXPECT_FALSE(lost.Get(kFailureBound).ok());
  EXPECT_TRUE(failed.Wait(kFailureBound));
  transport.Close();
}

}  // namespace
}  // namespace millrace::kvtransfer::testing
