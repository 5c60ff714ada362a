// SPDX-License-Identifier: Apache-2.0
// The cluster as the router sees it at one instant: plain values that placement, status pages and tests can hold.
//
// The registry fills in what workers said; the request flow adds what it has assigned to each since, because a status
// is up to one heartbeat old and the router's own book is not. Nothing here is a handle: a snapshot may outlive its
// workers.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "millrace/v1/cluster.pb.h"
#include "millrace/v1/types.pb.h"
#include "services/common/incarnation.h"

namespace millrace::router {

// What the router has given a worker that has not ended there yet.
struct Assigned {
  int64_t requests = 0;
  int64_t prompt_tokens = 0;  // prefill: of requests without their first token
  int64_t pages = 0;          // decode: under lease
};

struct WorkerView {
  v1::Role role = v1::ROLE_UNSPECIFIED;
  std::string name;
  IncarnationId incarnation;
  std::string control_address;
  std::string software;
  bool ready = false;      // has sent WorkerReady
  v1::WorkerReady serves;  // valid if ready
  v1::WorkerStatus status;
  std::chrono::steady_clock::time_point joined;
  std::chrono::steady_clock::time_point last_heard;
  Assigned assigned;
  // Refused a request for lack of room after `last_heard`: counted as full until it is heard again.
  bool saturated = false;

  bool Serving() const { return ready && status.state() == v1::WORKER_STATE_READY; }
};

struct ClusterSnapshot {
  std::vector<WorkerView> workers;  // by role, then name
  std::chrono::milliseconds suspect_after{1500};
};

}  // namespace millrace::router
