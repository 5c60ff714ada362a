// SPDX-License-Identifier: Apache-2.0
// What doctor makes of a measurement, and that it measures: two UCX contexts over loopback.
#include "services/cli/transport_probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <string>
#include <thread>

#include "kvtransfer/ucx_transport.h"

namespace millrace::cli {
namespace {

using ::testing::HasSubstr;

TEST(TransportProbe, TcpBetweenMachinesWithRdmaIsAnErrorThatSaysWhereToLook) {
  const ProbeResult tcp{.bytes_per_second = 3e9, .round_trip_us = 80, .lanes = "tcp/eth0.0 (am)", .tcp_only = true};
  const ProbeResult rdma{.bytes_per_second = 40e9, .round_trip_us = 8, .lanes = "rc_mlx5/mlx5_0:1.0 (am)"};
  const Finding quiet = JudgeProbe("p to d", tcp, /*same_machine=*/false, {"mlx5_0"});
  EXPECT_EQ(quiet.severity, Severity::kError);
  EXPECT_THAT(quiet.text, HasSubstr("TCP, although mlx5_0 is active here"));
  EXPECT_THAT(quiet.text, HasSubstr("UCX_TLS"));
  EXPECT_EQ(JudgeProbe("p to d", tcp, true, {"mlx5_0"}).severity, Severity::kNote);  // of one machine: what UCX does
  EXPECT_EQ(JudgeProbe("p to d", tcp, false, {}).severity, Severity::kNote);
  EXPECT_EQ(JudgeProbe("p to d", rdma, false, {"mlx5_0"}).severity, Severity::kNote);
  EXPECT_EQ(JudgeProbe("p to d", {.bytes_per_second = 1e8}, true, {}).severity, Severity::kWarning);
}

TEST(TransportProbe, BlocksAreMeasuredOverWhatReallyCarriesThem) {
  if (!kvtransfer::UcxAvailable()) GTEST_SKIP() << "built without UCX";
  StopSignal stop;
  std::promise<std::string> listening;
  absl::Status served;
  std::thread server([&] {
    served = ServeProbes("127.0.0.1:0", stop, [&](const std::string& where) { listening.set_value(where); });
  });
  const std::string address = listening.get_future().get();
  for (int i = 0; i < 2; ++i) {  // one after the other: the answering side forgets nobody and refuses nobody
    const auto result = MeasureTransport("test", address);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_GT(result->bytes_per_second, 1e6);
    EXPECT_GT(result->round_trip_us, 0);
    EXPECT_THAT(result->lanes, HasSubstr("/"));
  }
  stop.Raise();
  server.join();
  EXPECT_TRUE(served.ok()) << served;
}

TEST(TransportProbe, WhoIsNotThereIsSaidSoon) {
  EXPECT_EQ(MeasureTransport("test", "127.0.0.1:1").status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(MeasureTransport("test", "nowhere").status().code(), absl::StatusCode::kInvalidArgument);
  StopSignal stop;
  EXPECT_EQ(ServeProbes("10.255.255.1:0", stop, [](const std::string&) {}).code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace millrace::cli
