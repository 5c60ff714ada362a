// SPDX-License-Identifier: Apache-2.0
// How fast blocks really travel between two processes, and over what: the measurement behind `millrace doctor`.
//
// One side answers (ServeProbes), the other measures (MeasureTransport). They find each other over a plain TCP
// connection that carries one line, the answering side's transport address; what is measured then goes through
// kvtransfer as blocks and expert rows do, with payloads acknowledged by the receiver when they have landed.
//
// Thread: any, blocking, bounded.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/cli/config_check.h"
#include "services/common/drain.h"

namespace millrace::cli {

struct ProbeResult {
  double bytes_per_second = 0;  // of blocks of 4 MiB, several on the wire
  double round_trip_us = 0;     // median of small messages there and back, as an expert row travels
  std::string lanes;            // what carries it, in UCX's words: "tcp/eth0.0 (am am_bw#0)"
  bool tcp_only = false;        // every lane is TCP
};

// What to make of it. A transport that fell back to TCP between machines although one has RDMA devices is an error:
// it works, and is ten times slower than what was paid for. `rdma`: names of the active devices here.
Finding JudgeProbe(const std::string& pair, const ProbeResult& result, bool same_machine,
                   const std::vector<std::string>& rdma);

// Serves on "host:port" (port 0: any free one) until `stop`; `on_listening` gets the address. Unavailable: the address
// cannot be bound, or UCX cannot start.
absl::Status ServeProbes(const std::string& listen, const StopSignal& stop,
                         const std::function<void(const std::string& address)>& on_listening);

// Measures to the process that serves at `address`, about a second. Unavailable, DeadlineExceeded: it cannot be
// reached, or the blocks do not arrive. `name` shows in logs.
absl::StatusOr<ProbeResult> MeasureTransport(const std::string& name, const std::string& address);

}  // namespace millrace::cli
