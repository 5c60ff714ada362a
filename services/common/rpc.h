// SPDX-License-Identifier: Apache-2.0
// gRPC set up once, the same on both ends: limits, keepalive, health, reflection.
//
// Keepalive has to agree on both ends, or the server answers pings with GOAWAY; so the numbers live here only. A
// channel is kept per address, with a connection of its own, and made again after its peer came back.
//
// Thread: RpcServer from its owner's thread; ChannelPool any.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "services/common/peer_security.h"

namespace millrace {

inline constexpr int kMaxInternalMessageBytes = 64 << 20;
inline constexpr int kMaxPublicMessageBytes = 16 << 20;

struct RpcServerOptions {
  std::string listen;                                    // "host:port"; port 0: any free one
  int max_receive_bytes = kMaxInternalMessageBytes;      // larger requests are RESOURCE_EXHAUSTED
  std::vector<std::string> service_names;                // whose health may be asked by name, beside the server's own
  std::shared_ptr<grpc::ServerCredentials> credentials;  // null: plain
};

class RpcServer {
 public:
  // Serves `services`, which must outlive this object. Unavailable: the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<RpcServer>> Start(const RpcServerOptions& options,
                                                          const std::vector<grpc::Service*>& services);
  ~RpcServer();

  // "host:port" with the port that was bound.
  const std::string& address() const { return address_; }
  int port() const { return port_; }
  // What grpc.health.v1 answers, for the server and for each of `service_names`.
  void SetServing(bool serving);
  // No new calls; running ones may go on for `grace` and are then cancelled. Idempotent.
  void Shutdown(absl::Duration grace);

 private:
  RpcServer() = default;
  std::string address_;
  int port_ = 0;
  std::vector<std::string> service_names_;
  std::unique_ptr<grpc::Server> server_;
};

// A channel to one peer of ours. Null credentials: plain. `server_name`: instead of the address's, in the handshake.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address,
                                           const std::shared_ptr<grpc::ChannelCredentials>& credentials = nullptr,
                                           const std::string& server_name = "");
// A channel to a process of that role; `security` null: plain.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const PeerSecurity* security, PeerRole role);

// Channels by address and role, shared by who needs them. Bounded: beyond `max_channels` one that nobody uses is
// dropped.
class ChannelPool {
 public:
  explicit ChannelPool(std::shared_ptr<const PeerSecurity> security = nullptr, size_t max_channels = 256)
      : security_(std::move(security)), max_channels_(max_channels) {}
  std::shared_ptr<grpc::Channel> Get(const std::string& address, PeerRole role);

 private:
  using Key = std::pair<std::string, PeerRole>;
  const std::shared_ptr<const PeerSecurity> security_;
  const size_t max_channels_;
  std::mutex mutex_;
  absl::flat_hash_map<Key, std::shared_ptr<grpc::Channel>> channels_;  // guarded by mutex_
};

}  // namespace millrace
