// SPDX-License-Identifier: Apache-2.0
// See transport_probe.h.
#include "services/cli/transport_probe.h"

#include <algorithm>
#include <atomic>
#include <boost/asio/buffer.hpp>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/write.hpp>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "engine/status.h"
#include "kvtransfer/ucx_transport.h"
#include "services/common/clock.h"

namespace millrace::cli {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

constexpr uint16_t kProbeChannel = 10, kReplyChannel = 11;
constexpr size_t kBlockBytes = 4u << 20;
constexpr int kInFlight = 8;
constexpr int kRounds = 200;
constexpr absl::Duration kWarmUp = absl::Milliseconds(50), kMeasured = absl::Milliseconds(500);
constexpr absl::Duration kPatience = absl::Seconds(5);
constexpr double kSlowBytesPerSecond = 200e6;
constexpr absl::string_view kGreeting = "millrace-probe 1 ";

struct HostPort {
  std::string host, port;
};

absl::StatusOr<HostPort> Split(const std::string& address) {
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon + 1 == address.size()) {
    return absl::InvalidArgumentError(absl::StrCat(address, ": expected host:port"));
  }
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
  return HostPort{host, address.substr(colon + 1)};
}

// Lands what comes in one buffer for each message on the wire, and says so to its sender.
class Landing final : public kvtransfer::MessageHandler {
 public:
  explicit Landing(kvtransfer::Transport& transport) : transport_(transport) {}

  kvtransfer::Placement OnMessage(const kvtransfer::IncomingMessage& message) override {
    if (message.payload_bytes > kBlockBytes) return kvtransfer::Placement::Drop("too_long");
    const kvtransfer::PeerId from = message.from;
    if (message.payload.size() == message.payload_bytes) {
      Acknowledge(from);
      return kvtransfer::Placement::Consumed();
    }
    auto buffer = std::make_shared<std::vector<uint8_t>>(message.payload_bytes);
    return kvtransfer::Placement::Into({buffer->data(), buffer->size()}, [this, from, buffer](absl::Status arrived) {
      if (arrived.ok()) Acknowledge(from);
    });
  }

 private:
  void Acknowledge(kvtransfer::PeerId to) {
    (void)transport_.SendMessage(to, kReplyChannel, {}, {}, [](const absl::Status&) {});
  }
  kvtransfer::Transport& transport_;
};

class Counting final : public kvtransfer::MessageHandler {
 public:
  kvtransfer::Placement OnMessage(const kvtransfer::IncomingMessage&) override {
    acknowledged.fetch_add(1);
    return kvtransfer::Placement::Consumed();
  }
  std::atomic<int64_t> acknowledged{0};
};

// Connects, reads the greeting line, and keeps the connection: its end tells the other side that we are done.
absl::StatusOr<std::string> Greet(tcp::socket& socket, asio::io_context& io, const std::string& address) {
  ASSIGN_OR_RETURN(const HostPort where, Split(address));
  error_code error = asio::error::would_block;
  tcp::resolver resolver(io);
  const auto found = resolver.resolve(where.host, where.port, error);
  if (error) return absl::UnavailableError(absl::StrCat(address, ": ", error.message()));
  std::string line;
  char buffer[4096];
  // One operation after the other, each within what is left of our patience.
  const auto run = [&](auto start) {
    error = asio::error::timed_out;
    start();
    io.restart();
    io.run_for(absl::ToChronoMilliseconds(kPatience));
    if (error == asio::error::timed_out) socket.close();
    return !error;
  };
  if (!run([&] { asio::async_connect(socket, found, [&](error_code e, const tcp::endpoint&) { error = e; }); })) {
    return absl::UnavailableError(absl::StrCat("cannot reach ", address, ": ", error.message()));
  }
  while (!absl::StrContains(line, '\n') && line.size() < sizeof(buffer) * 4) {
    if (!run([&] {
          socket.async_read_some(asio::buffer(buffer), [&](error_code e, size_t bytes) {
            error = e;
            if (!e) line.append(buffer, bytes);
          });
        })) {
      return absl::UnavailableError(absl::StrCat(address, " did not say where its transport is: ", error.message()));
    }
  }
  if (!absl::StartsWith(line, kGreeting)) {
    return absl::UnavailableError(absl::StrCat("what answers at ", address, " is not `millrace doctor --listen`"));
  }
  return absl::HexStringToBytes(absl::StripSuffix(absl::string_view(line).substr(kGreeting.size()), "\n"));
}

// "peer 1 lanes tcp/lo.0 (rma_bw#0 am), ..." without its beginning.
std::string LanesOf(const kvtransfer::Transport& transport) {
  const std::vector<std::string> lines = transport.statistics().lanes;
  if (lines.empty()) return "unknown";
  const size_t at = lines.back().find("lanes ");
  return at == std::string::npos ? lines.back() : lines.back().substr(at + 6);
}

}  // namespace

Finding JudgeProbe(const std::string& pair, const ProbeResult& result, bool same_machine,
                   const std::vector<std::string>& rdma) {
  const std::string text = absl::StrFormat("%s: %.2f GB/s, %.0f us there and back, over %s", pair,
                                           result.bytes_per_second / 1e9, result.round_trip_us, result.lanes);
  if (result.tcp_only && !same_machine && !rdma.empty()) {
    return {Severity::kError, pair,
            absl::StrCat(text, ": TCP, although ", absl::StrJoin(rdma, ", "),
                         " is active here. Look at UCX_TLS and UCX_NET_DEVICES, at the other machine's devices, at "
                         "memlock, and whether this UCX has verbs (the images say which they hold)")};
  }
  if (result.bytes_per_second < kSlowBytesPerSecond) {
    return {Severity::kWarning, pair, absl::StrCat(text, ": slow; hand-offs of long prompts will be felt")};
  }
  return {Severity::kNote, pair, text};
}

absl::Status ServeProbes(const std::string& listen, const StopSignal& stop,
                         const std::function<void(const std::string&)>& on_listening) {
  ASSIGN_OR_RETURN(const HostPort where, Split(listen));
  kvtransfer::TransportOptions options;
  options.name = "doctor";
  options.log = [](absl::string_view) {};
  ASSIGN_OR_RETURN(const auto transport, kvtransfer::CreateUcxTransport(options));
  Landing landing(*transport);
  transport->SetHandler(kProbeChannel, &landing);

  asio::io_context io;
  error_code error;
  const auto address = asio::ip::make_address(where.host == "localhost" ? "127.0.0.1" : where.host, error);
  uint32_t port = 0;
  if (error || !absl::SimpleAtoi(where.port, &port) || port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(listen, ": expected an address of this machine and a port"));
  }
  tcp::acceptor acceptor(io);
  const tcp::endpoint endpoint(address, static_cast<uint16_t>(port));
  if (acceptor.open(endpoint.protocol(), error) || acceptor.set_option(tcp::acceptor::reuse_address(true), error) ||
      acceptor.bind(endpoint, error) || acceptor.listen(16, error)) {
    return absl::UnavailableError(absl::StrCat(listen, ": ", error.message()));
  }
  const std::string greeting = absl::StrCat(kGreeting, absl::BytesToHexString(transport->address()), "\n");
  // A connection needs nothing but the line; it is closed when its turn comes to be dropped.
  std::vector<std::shared_ptr<tcp::socket>> open;
  std::function<void()> accept = [&] {
    auto socket = std::make_shared<tcp::socket>(io);
    acceptor.async_accept(*socket, [&, socket](error_code failed) {
      if (!failed) {
        asio::async_write(*socket, asio::buffer(greeting), [socket](error_code, size_t) {});
        open.push_back(socket);
        if (open.size() > 64) open.erase(open.begin());
        accept();
      }
    });
  };
  accept();
  on_listening(absl::StrCat(where.host, ":", acceptor.local_endpoint(error).port()));
  while (!stop.raised()) io.run_for(std::chrono::milliseconds(100));
  transport->Close();
  return absl::OkStatus();
}

absl::StatusOr<ProbeResult> MeasureTransport(const std::string& name, const std::string& address) {
  asio::io_context io;
  tcp::socket socket(io);
  ASSIGN_OR_RETURN(const std::string peer_address, Greet(socket, io, address));
  kvtransfer::TransportOptions options;
  options.name = name;
  options.log = [](absl::string_view) {};
  ASSIGN_OR_RETURN(const auto transport, kvtransfer::CreateUcxTransport(options));
  Counting counting;
  transport->SetHandler(kReplyChannel, &counting);
  ASSIGN_OR_RETURN(const kvtransfer::PeerId peer, transport->Connect(peer_address));

  std::vector<uint8_t> block(kBlockBytes, 0x5a);
  std::atomic<int64_t> failed{0};
  int64_t sent = 0;
  const auto send = [&](size_t bytes) -> absl::Status {
    ASSIGN_OR_RETURN(const auto id, transport->SendMessage(peer, kProbeChannel, {}, {block.data(), bytes},
                                                           [&failed](const absl::Status& status) {
                                                             if (!status.ok()) failed.fetch_add(1);
                                                           }));
    (void)id;
    ++sent;
    return absl::OkStatus();
  };
  const auto await = [&](int64_t acknowledged) -> absl::Status {
    const auto there = [&] { return counting.acknowledged.load() >= acknowledged || failed.load() > 0; };
    if (!transport->WaitFor(there, kPatience)) {
      return absl::DeadlineExceededError(
          absl::StrCat(address, ": a block did not arrive within ", absl::FormatDuration(kPatience)));
    }
    if (failed.load() > 0) return absl::UnavailableError(absl::StrCat(address, ": the connection failed"));
    return absl::OkStatus();
  };
  const absl::Status measured = [&]() -> absl::Status {
    RETURN_IF_ERROR(send(8));  // makes the connection
    return await(1);
  }();
  ProbeResult result;
  absl::Status status = measured;
  std::vector<double> round_trips;
  for (int i = 0; i < kRounds && status.ok(); ++i) {
    const absl::Time began = MonotonicNow();
    status = send(8);
    if (status.ok()) status = await(sent);
    round_trips.push_back(absl::ToDoubleMicroseconds(MonotonicNow() - began));
  }
  for (const absl::Duration how_long : {kWarmUp, kMeasured}) {
    const int64_t before = counting.acknowledged.load();
    const absl::Time began = MonotonicNow();
    while (status.ok() && MonotonicNow() - began < how_long) {
      status = send(kBlockBytes);
      if (status.ok()) status = await(sent - kInFlight);
    }
    if (status.ok()) status = await(sent);
    result.bytes_per_second = static_cast<double>(counting.acknowledged.load() - before) * kBlockBytes /
                              absl::ToDoubleSeconds(MonotonicNow() - began);
  }
  result.lanes = LanesOf(*transport);
  transport->Close();
  RETURN_IF_ERROR(status);
  std::nth_element(round_trips.begin(), round_trips.begin() + kRounds / 2, round_trips.end());
  result.round_trip_us = round_trips[kRounds / 2];
  result.tcp_only = true;
  for (const absl::string_view lane : absl::StrSplit(result.lanes, "), ")) {
    result.tcp_only = result.tcp_only && absl::StartsWith(lane, "tcp/");
  }
  return result;
}

}  // namespace millrace::cli
