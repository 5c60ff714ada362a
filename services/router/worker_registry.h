// SPDX-License-Identifier: Apache-2.0
// Who is in the cluster: the workers whose Join streams are open, what they serve, and when they were last heard.
//
// The stream is the lease of membership. A worker that breaks it, or is silent for dead_after, is gone at once; a new
// incarnation under the same name replaces the old. Nothing is kept that a worker cannot tell again, so a router that
// restarts is whole when its workers have dialled back in. The registry also tells prefill and decode workers who is in
// the expert pool, each time that changes. The stream itself is cluster_service; who gets work is placement.
//
// Thread: the loop's, for everything; time is an argument.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "millrace/v1/cluster.pb.h"
#include "services/router/cluster_snapshot.h"
#include "services/router/event_loop.h"

namespace millrace::router {

// The router's end of one Join stream. Implementations queue and return: Send may be called from the loop only.
class WorkerConnection {
 public:
  virtual ~WorkerConnection() = default;
  virtual void Send(v1::RouterMessage message) = 0;
  // Ends the stream with this status; nothing is sent after it. OnDisconnected need not be called for it.
  virtual void Close(absl::Status status) = 0;
};

struct RegistryOptions {
  IncarnationId router;
  milliseconds heartbeat{500};
  milliseconds dead_after{3000};
  milliseconds suspect_after() const { return 3 * heartbeat; }
};

class WorkerRegistry {
 public:
  explicit WorkerRegistry(RegistryOptions options);

  // The first message of a stream must be a hello. A non-OK status means: close the stream with it. `connection` stays
  // referenced until it is closed here or OnDisconnected is called for it.
  absl::Status OnMessage(const std::shared_ptr<WorkerConnection>& connection, const v1::WorkerMessage& message,
                         TimePoint now);
  // The stream broke or its peer left: the worker is gone now.
  void OnDisconnected(const std::shared_ptr<WorkerConnection>& connection, TimePoint now);
  // Ends members that have been silent for dead_after. Call at least every heartbeat / 5.
  void Sweep(TimePoint now);

  // Asks the worker of this name to drain. NotFound: there is none. The worker's own status tells when it has begun.
  absl::Status Drain(const std::string& name, const std::string& reason);

  // Closes every stream with UNAVAILABLE.
  void CloseAll(const std::string& reason);

  // Called inside the calls above, after the member list has changed.
  void set_on_gone(std::function<void(const WorkerView&, const std::string& why, TimePoint)> f) {
    on_gone_ = std::move(f);
  }
  // Something that placement looks at has changed for the better or the worse.
  void set_on_change(std::function<void(TimePoint)> f) { on_change_ = std::move(f); }

  // Everybody, by role, then name. `assigned` and `saturated` are left empty for the request flow to fill in.
  ClusterSnapshot Snapshot() const;
  const WorkerView* Find(const IncarnationId& incarnation) const;
  size_t size() const { return members_.size(); }

  // Counts since start, for metrics.
  int64_t joins() const { return joins_; }
  int64_t deaths() const { return deaths_; }

 private:
  struct Member {
    WorkerView view;
    std::shared_ptr<WorkerConnection> connection;
  };
  using Key = std::pair<int, std::string>;  // role, name

  absl::Status OnHello(const std::shared_ptr<WorkerConnection>& connection, const v1::WorkerHello& hello,
                       TimePoint now);
  Member* FindConnection(const WorkerConnection* connection);
  void Remove(std::map<Key, Member>::iterator member, const std::string& why, TimePoint now);
  void PublishPeers();
  v1::RouterMessage PeersMessage() const;

  const RegistryOptions options_;
  std::map<Key, Member> members_;
  uint64_t peers_version_ = 0;
  int64_t joins_ = 0, deaths_ = 0;
  std::function<void(const WorkerView&, const std::string&, TimePoint)> on_gone_;
  std::function<void(TimePoint)> on_change_;
};

}  // namespace millrace::router
