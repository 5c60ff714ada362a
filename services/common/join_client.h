// SPDX-License-Identifier: Apache-2.0
// The worker's end of the Join stream: its membership, kept up over breaks and restarts of the router.
//
// Says hello, ready once the worker is, and a status every heartbeat from a thread of its own, so that a long pass
// delays none. Dials again after a break, at most once in 200 ms and then less often. What the router says comes back
// through callbacks. Two events end work: a router with another incarnation (its predecessor's requests are orphans),
// and silence for dead_after: the worker is cut off, others may have taken over, so it must stop on its own.
//
// Thread: public methods from any; callbacks run on the client's own thread, must not block and must not call Stop.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "absl/time/time.h"
#include "millrace/v1/cluster.grpc.pb.h"
#include "services/common/incarnation.h"
#include "services/common/peer_security.h"

namespace millrace {

struct JoinOptions {
  std::string router_address;                          // "host:port"
  std::shared_ptr<const PeerSecurity> security;        // null: plain
  v1::WorkerHello hello;                               // complete
  absl::Duration heartbeat = absl::Milliseconds(500);  // until the router's welcome says otherwise
  absl::Duration dead_after = absl::Seconds(3);
};

struct JoinCallbacks {
  std::function<void(v1::WorkerStatus&)> fill_status;          // all but `beat`; required
  std::function<void(const IncarnationId&)> on_router;         // at every welcome; the same incarnation may come again
  std::function<void(const std::string& why)> on_router_lost;  // once per silence
  std::function<void(const v1::PeerList&)> on_peers;
  std::function<void(const v1::Drain&)> on_drain;
};

class JoinClient {
 public:
  JoinClient(JoinOptions options, JoinCallbacks callbacks);
  ~JoinClient();  // Stop

  void SetReady(v1::WorkerReady ready);  // once
  // Sends a status soon instead of at the next beat: for changes that the router should not wait for.
  void Nudge();
  // Sends a status now and waits until the router has echoed it. False: not within `limit`, or no router is there.
  bool AwaitHeard(absl::Duration limit);
  void Stop();
  bool connected() const;

 private:
  class Stream;
  void Run();
  void ServeStream(Stream& stream);
  void Handle(Stream& stream, const v1::RouterMessage& message);
  void CheckSilence(absl::Time now);
  void LogEnd(const grpc::Status& status);

  const JoinOptions options_;
  const JoinCallbacks callbacks_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::optional<v1::WorkerReady> ready_;  // guarded by mutex_
  bool nudged_ = false;                   // guarded by mutex_
  bool stop_ = false;                     // guarded by mutex_
  bool connected_ = false;                // guarded by mutex_
  uint64_t beat_ = 0;                     // guarded by mutex_: of the last status that was filled
  uint64_t heard_beat_ = 0;               // guarded by mutex_: the last that was echoed
  // Own thread only.
  absl::Duration heartbeat_;
  absl::Duration dead_after_;
  absl::Time last_heard_;
  bool lost_ = true;      // nothing to lose before the first welcome
  std::string last_end_;  // why a stream ended, as logged
  std::thread thread_;
};

}  // namespace millrace
