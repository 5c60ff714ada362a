// SPDX-License-Identifier: Apache-2.0
// GB/s and latency of the UCX transport between two processes, and of a whole hand-off with digests; of host memory, or
// of whatever memory the main that includes transport_bench.h has.
//
// One measurement a run, so that bench.sh can take turns with ucx_perftest:
//   transport_bench bandwidth BYTES [SECONDS]   messages of BYTES, kWindow in flight; prints GB/s
//   transport_bench latency BYTES [SECONDS]     ping and pong of BYTES; prints microseconds, half of a round trip
//   transport_bench wait BYTES [SECONDS]        the same, driven by the waiting thread (WaitFor), as expert rows are
//   transport_bench handoff BYTES [SECONDS]     extents of BYTES through Sender, Receiver and Verify; prints GB/s
// The first word may be prefixed by "loopback-" to measure the in-process transport, or by "staged-" to carry device
// memory through host buffers; before that by "sealed-" to have every message sealed (host memory, or staged). What a
// hand-off carries is checked: a wrong byte fails the run.
#include "kvtransfer/transport_bench.h"

#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kvtransfer/loopback_transport.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/sealed_transport.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/staged_transport.h"
#include "kvtransfer/status.h"
#include "kvtransfer/ucx_transport.h"

extern char** environ;

namespace millrace::kvtransfer {
namespace {

constexpr uint16_t kPing = 2, kPong = 3;
constexpr int kWindow = 4;  // as ucx_perftest -O 4
constexpr uint64_t kExtents = 16;

absl::Span<const uint8_t> Bytes(absl::string_view s) { return {reinterpret_cast<const uint8_t*>(s.data()), s.size()}; }

class Handler : public MessageHandler {
 public:
  using Function = std::function<Placement(const IncomingMessage&)>;
  explicit Handler(Function f) : f_(std::move(f)) {}
  Placement OnMessage(const IncomingMessage& message) override { return f_(message); }

 private:
  Function f_;
};

std::unique_ptr<Transport> MaybeSeal(std::unique_ptr<Transport> transport, bool seal) {
  return seal ? SealTransport(std::move(transport), HostMemoryFunctions()) : std::move(transport);
}

TransportOptions Quiet(const BenchMemory& memory) {
  TransportOptions options;
  options.log = [](absl::string_view) {};
  options.memory = memory.functions;
  return options;
}

// Memory of the kind that is measured; the process' end gives it back.
class Block {
 public:
  Block(const BenchMemory& memory, size_t bytes) : memory_{memory.allocate(bytes), bytes, memory.kind} {
    CHECK(memory_.data != nullptr, "out of memory");
  }
  Memory memory() const { return memory_; }
  ConstMemory Part(size_t offset, size_t bytes) const {
    return {static_cast<const uint8_t*>(memory_.data) + offset, bytes, memory_.kind};
  }
  Memory WritablePart(size_t offset, size_t bytes) const {
    return {static_cast<uint8_t*>(memory_.data) + offset, bytes, memory_.kind};
  }
  size_t bytes() const { return memory_.bytes; }

 private:
  Memory memory_;
};

std::unique_ptr<Transport> MakeUcx(const BenchMemory& memory, bool staged, bool sealed) {
  auto created = CreateUcxTransport(Quiet(memory));
  CHECK(created.ok(), created.status().ToString());
  std::unique_ptr<Transport> transport = MaybeSeal(*std::move(created), sealed);
  if (staged) return StageDeviceMemory(std::move(transport), memory.functions);
  CHECK(transport->Supports(memory.kind), "no device memory by itself here; staged- goes through the host");
  return transport;
}

// The other end: takes everything, answers pings, and holds a lease for hand-offs that it verifies on demand. What a
// control plane would say goes over the pong channel.
class Peer {
 public:
  Peer(Transport& transport, const BenchMemory& memory, size_t bytes)
      : transport_(transport),
        receiver_(transport, {.memory = memory.functions}),
        memory_(memory, bytes * kExtents),
        pong_(memory, bytes) {
    for (int i = 0; i < 2 * kWindow; ++i) buffers_.emplace_back(memory, bytes);
    transport.SetHandler(kPing, &handler_);
  }
  ~Peer() { transport_.SetHandler(kPing, nullptr); }

 private:
  Placement OnPing(const IncomingMessage& m) {
    const absl::string_view header(reinterpret_cast<const char*>(m.header.data()), m.header.size());
    const Memory buffer = buffers_[next_++ % buffers_.size()].memory();
    if (header == "sink") return Placement::Into(buffer, nullptr);
    if (header == "ping") {
      return Placement::Into(buffer, [this, from = m.from](absl::Status) {
        (void)transport_.SendMessage(from, kPong, {}, pong_.memory(), nullptr);
      });
    }
    // "open LEASE" or an encoded manifest.
    uint64_t lease = 0;
    if (absl::ConsumePrefix(&const_cast<absl::string_view&>(header), "open ") && absl::SimpleAtoi(header, &lease)) {
      std::vector<ExpectedExtent> extents;
      const size_t bytes = memory_.bytes() / kExtents;
      for (uint64_t i = 0; i < kExtents; ++i) extents.push_back({i, memory_.WritablePart(i * bytes, bytes)});
      CHECK(receiver_.Open({lease, 1}, std::move(extents)).ok());
    } else {
      auto manifest = DecodeManifest({reinterpret_cast<const char*>(m.payload.data()), m.payload.size()});
      CHECK(manifest.ok(), manifest.status().ToString());
      auto verified = receiver_.Verify(*manifest);
      CHECK(verified.ok(), verified.status().ToString());
      const bool complete = verified->complete;
      if (complete) receiver_.Fence(manifest->key.lease, nullptr);
      (void)transport_.SendMessage(m.from, kPong, Bytes(complete ? "complete" : "again"), {}, nullptr);
      return Placement::Consumed();
    }
    (void)transport_.SendMessage(m.from, kPong, Bytes("open"), {}, nullptr);
    return Placement::Consumed();
  }

  Transport& transport_;
  Receiver receiver_;
  Handler handler_{[this](const IncomingMessage& m) { return OnPing(m); }};
  Block memory_, pong_;
  std::vector<Block> buffers_;
  size_t next_ = 0;
};

int RunPeer(const BenchMemory& memory, const char* address, size_t bytes, bool staged) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const std::string parent_address = absl::HexStringToBytes(address);
  const auto transport = MakeUcx(memory, staged, IsSealedAddress(parent_address));
  Peer peer(*transport, memory, bytes);
  auto parent = transport->Connect(parent_address);
  CHECK(parent.ok());
  CHECK(transport->SendMessage(*parent, kPong, Bytes("hello"), {}, nullptr).ok());
  pause();
  return 0;
}

class Bench {
 public:
  Bench(Transport& transport, const BenchMemory& memory, size_t bytes)
      : transport_(transport), kind_memory_(memory), payload_(memory, bytes), reply_(memory, bytes) {
    transport.SetHandler(kPong, &handler_);
  }
  ~Bench() { transport_.SetHandler(kPong, nullptr); }

  void AwaitHello() {
    CHECK(transport_.WaitFor([&] { return pongs_ == 1; }, absl::Seconds(20)), "no peer");
  }

  double Bandwidth(double seconds) {
    auto run = [&](double limit) {
      uint64_t sent = 0;
      const absl::Time start = absl::Now();
      while (absl::ToDoubleSeconds(absl::Now() - start) < limit || sent < 2 * kWindow) {
        while (sent - completed_ >= kWindow)
          transport_.WaitFor([&] { return sent - completed_ < kWindow; }, absl::Seconds(20));
        CHECK(transport_
                  .SendMessage(peer_, kPing, Bytes("sink"), Payload(),
                               [&](absl::Status s) {
                                 CHECK(s.ok(), s.ToString());
                                 ++completed_;
                               })
                  .ok());
        ++sent;
      }
      transport_.WaitFor([&] { return completed_ == sent; }, absl::Seconds(20));
      const double took = absl::ToDoubleSeconds(absl::Now() - start);
      completed_ = 0;
      return static_cast<double>(sent * payload_.bytes()) / took / 1e9;
    };
    run(seconds / 5);  // warm
    return run(seconds);
  }

  // `driving`: the waiting thread polls the wire. Otherwise it sleeps, as a thread that knows nothing of transports.
  double Latency(double seconds, bool driving) {
    auto once = [&] {
      const uint64_t before = pongs_;
      CHECK(transport_.SendMessage(peer_, kPing, Bytes("ping"), Payload(), nullptr).ok());
      if (driving) {
        CHECK(transport_.WaitFor([&] { return pongs_ != before; }, absl::Seconds(20)));
      } else {
        pongs_.wait(before);
      }
    };
    for (int i = 0; i < 100; ++i) once();
    uint64_t rounds = 0;
    const absl::Time start = absl::Now();
    while (absl::ToDoubleSeconds(absl::Now() - start) < seconds) {
      for (int i = 0; i < 20; ++i) once();
      rounds += 20;
    }
    return absl::ToDoubleMicroseconds(absl::Now() - start) / static_cast<double>(rounds) / 2;
  }

  double Handoff(double seconds) {
    std::vector<uint8_t> content(payload_.bytes() * kExtents);
    for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
    const Block source(kind_memory_, content.size());
    CHECK(kind_memory_.functions.copy(source.memory(), {content.data(), content.size()}).ok());
    uint64_t lease = 0, bytes = 0;
    const absl::Time start = absl::Now();
    while (absl::ToDoubleSeconds(absl::Now() - start) < seconds || lease < 2) {
      Ask(absl::StrCat("open ", ++lease), {});
      Sender sender(transport_, peer_, {lease, 1}, {.memory = kind_memory_.functions});
      for (uint64_t i = 0; i < kExtents; ++i)
        CHECK(sender.Send(i, source.Part(i * payload_.bytes(), payload_.bytes())).ok());
      CHECK(sender.FlushAndWait(absl::Seconds(20)).ok());
      auto manifest = sender.BuildManifest("");
      CHECK(manifest.ok());
      // The sender's last completion may be a little ahead of the receiver's last digest.
      while (Ask("commit", EncodeManifest(*manifest)) == "again") {
      }
      bytes += source.bytes();
    }
    return static_cast<double>(bytes) / absl::ToDoubleSeconds(absl::Now() - start) / 1e9;
  }

 private:
  ConstMemory Payload() const { return payload_.memory(); }
  std::string Ask(const std::string& header, std::string payload) {
    const uint64_t before = pongs_;
    CHECK(transport_.SendMessage(peer_, kPing, Bytes(header), {payload.data(), payload.size()}, nullptr).ok());
    CHECK(transport_.WaitFor([&] { return pongs_ != before; }, absl::Seconds(20)));
    return answer_;
  }
  Placement OnPong(const IncomingMessage& m) {
    peer_ = m.from;
    answer_.assign(reinterpret_cast<const char*>(m.header.data()), m.header.size());
    auto count = [this] { ++pongs_, pongs_.notify_all(); };
    if (m.payload_bytes == 0) {
      count();
      return Placement::Consumed();
    }
    return Placement::Into(reply_.memory(), [count](absl::Status) { count(); });
  }

  Transport& transport_;
  Handler handler_{[this](const IncomingMessage& m) { return OnPong(m); }};
  const BenchMemory& kind_memory_;
  Block payload_, reply_;
  PeerId peer_;
  std::string answer_;
  std::atomic<uint64_t> pongs_{0}, completed_{0};
};

int Measure(const BenchMemory& memory, std::string what, const char* bytes_word, double seconds, const char* self) {
  size_t bytes = 0;
  if (!absl::SimpleAtoi(bytes_word, &bytes)) return 2;
  const auto prefixed = [&what](const std::string& prefix) {
    if (what.rfind(prefix, 0) != 0) return false;
    what = what.substr(prefix.size());
    return true;
  };
  const bool sealed = prefixed("sealed-"), loopback = prefixed("loopback-"), staged = prefixed("staged-");

  auto hub = LoopbackHub::Create();
  std::unique_ptr<Transport> transport, other;
  std::unique_ptr<Peer> local_peer;
  pid_t child = -1;
  if (loopback) {
    transport = MaybeSeal(CreateLoopbackTransport(hub, Quiet(memory)), sealed);
    other = MaybeSeal(CreateLoopbackTransport(hub, Quiet(memory)), sealed);
    local_peer = std::make_unique<Peer>(*other, memory, bytes);
  } else {
    transport = MakeUcx(memory, staged, sealed);
  }
  double result = 0;
  {
    Bench bench(*transport, memory, bytes);
    if (loopback) {
      CHECK(other->SendMessage(*other->Connect(transport->address()), kPong, Bytes("hello"), {}, nullptr).ok());
    } else {
      std::string address = absl::BytesToHexString(transport->address()), size = bytes_word;
      char peer_word[] = "--peer", staged_peer_word[] = "--staged-peer";
      char* argv[] = {const_cast<char*>(self), staged ? staged_peer_word : peer_word, address.data(), size.data(),
                      nullptr};
      CHECK(posix_spawn(&child, "/proc/self/exe", nullptr, nullptr, argv, environ) == 0);
    }
    bench.AwaitHello();
    if (what == "bandwidth")
      result = bench.Bandwidth(seconds);
    else if (what == "latency" || what == "wait")
      result = bench.Latency(seconds, what == "wait");
    else if (what == "handoff")
      result = bench.Handoff(seconds);
    else
      return 2;
  }
  transport->Close();
  if (other) other->Close();
  if (child > 0) {
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  std::printf("%.3f\n", result);
  return 0;
}

}  // namespace

int TransportBenchMain(int argc, char** argv, const BenchMemory& memory) {
  size_t bytes = 0;
  const bool staged_peer = argc == 4 && std::strcmp(argv[1], "--staged-peer") == 0;
  if (argc == 4 && (staged_peer || std::strcmp(argv[1], "--peer") == 0) && absl::SimpleAtoi(argv[3], &bytes))
    return RunPeer(memory, argv[2], bytes, staged_peer);
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s [sealed-][loopback-|staged-]bandwidth|latency|wait|handoff BYTES [SECONDS]\n",
                 argv[0]);
    return 2;
  }
  return Measure(memory, argv[1], argv[2], argc > 3 ? std::atof(argv[3]) : 1.0, argv[0]);
}

}  // namespace millrace::kvtransfer
