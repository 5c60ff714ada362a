// SPDX-License-Identifier: Apache-2.0
// UCX between two processes, and what happens when one of them dies or hangs: kill -9 before, during and after a
// transfer, SIGSTOP in the middle, raw junk at the port; and two network namespaces with a veth pair between them.
//
// The other process is this binary again, started with --peer. It connects to the address that it reads, sends back
// whatever it is asked to, and takes what it is sent. Every test checks that nothing is left behind in ours.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kvtransfer/transport_test_util.h"

extern char** environ;

namespace millrace::kvtransfer::testing {
namespace {

constexpr uint16_t kToPeer = 2, kFromPeer = 3;

// ---- the other process ----

// Takes everything on kToPeer. A header "send N" makes it send N bytes on kFromPeer.
int RunPeer(const std::string& parent_address_hex) {
  TransportOptions options;
  options.log = [](absl::string_view line) { std::fprintf(stderr, "peer: %.*s\n", int(line.size()), line.data()); };
  auto created = CreateUcxTransport(options);
  if (!created.ok()) {
    std::fprintf(stderr, "peer: %s\n", created.status().ToString().c_str());
    return 1;
  }
  Transport& transport = **created;
  FunctionHandler handler([&](const IncomingMessage& m) {
    const std::string header(reinterpret_cast<const char*>(m.header.data()), m.header.size());
    size_t bytes = 0;
    if (header.rfind("send ", 0) == 0 && absl::SimpleAtoi(header.substr(5), &bytes)) {
      auto payload = std::make_shared<std::vector<uint8_t>>(Pattern(bytes, bytes));
      (void)transport.SendMessage(m.from, kFromPeer, m.header, {payload->data(), payload->size()},
                                  [payload](absl::Status) {});
    }
    auto sink = std::make_shared<std::vector<uint8_t>>(m.payload_bytes);
    return Placement::Into({sink->data(), sink->size()}, [sink](absl::Status) {});
  });
  transport.SetHandler(kToPeer, &handler);
  auto parent = transport.Connect(absl::HexStringToBytes(parent_address_hex));
  if (!parent.ok()) return 1;
  (void)transport.SendMessage(*parent, kFromPeer, Bytes("hello"), {}, nullptr);
  char byte;
  while (read(STDIN_FILENO, &byte, 1) > 0) {  // until our parent closes the pipe or dies
  }
  transport.Close();
  return 0;
}

class PeerProcess {
 public:
  // `prefix` is put before the command: how to get into a network namespace.
  void Start(const std::string& parent_address, std::vector<std::string> prefix = {}) {
    int pipe_fds[2];
    ASSERT_EQ(pipe2(pipe_fds, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, pipe_fds[0], STDIN_FILENO);
    char self[4096] = {};
    ASSERT_GT(readlink("/proc/self/exe", self, sizeof(self) - 1), 0);
    std::vector<std::string> words = std::move(prefix);
    words.insert(words.end(), {self, "--peer", absl::BytesToHexString(parent_address)});
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    ASSERT_EQ(posix_spawnp(&pid_, argv[0], &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(pipe_fds[0]);
    pipe_ = pipe_fds[1];
  }
  ~PeerProcess() {
    Signal(SIGCONT);
    Kill();
  }
  void Signal(int signal) const {
    if (pid_ > 0) kill(pid_, signal);
  }
  // SIGSTOP takes effect a little after kill() returns.
  void Stop() const {
    Signal(SIGSTOP);
    int status = 0;
    ASSERT_EQ(waitpid(pid_, &status, WUNTRACED), pid_);
    ASSERT_TRUE(WIFSTOPPED(status));
  }
  void Kill() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    close(pipe_);
    pid_ = -1;
  }
  int Finish() {  // lets it close by itself
    close(pipe_);
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return status;
  }

 private:
  pid_t pid_ = -1;
  int pipe_ = -1;
};

// ---- this process ----

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

// ---- two network namespaces ----

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

int PeerMain(const char* address) { return RunPeer(address); }

}  // namespace millrace::kvtransfer::testing

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--peer") == 0) return millrace::kvtransfer::testing::PeerMain(argv[2]);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
