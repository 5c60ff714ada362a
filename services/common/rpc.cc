// SPDX-License-Identifier: Apache-2.0
// See rpc.h.
#include "services/common/rpc.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>

#include <chrono>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "grpc/health/v1/health.pb.h"

namespace millrace {
namespace {

// A silent peer is found out in 8 s even when nothing is said; heartbeats find it sooner.
constexpr int kKeepaliveMs = 5000;
constexpr int kKeepaliveAckMs = 3000;
// What clients ask for and our certificates say: identity is the URI, but a server logs an error for each connection
// that asks for a name it does not have.
constexpr char kServerName[] = "millrace";
// Servers take pings this often, with slack for a client whose timer runs early.
constexpr int kMinPingIntervalMs = 2000;

void EnableProcessWideServices() {
  static std::once_flag once;
  std::call_once(once, [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    // Links the descriptor in, for reflection: nothing else of ours needs it.
    CHECK(grpc::health::v1::HealthCheckRequest::descriptor() != nullptr);
  });
}

}  // namespace

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Start(const RpcServerOptions& options,
                                                            const std::vector<grpc::Service*>& services) {
  EnableProcessWideServices();
  std::unique_ptr<RpcServer> server(new RpcServer);
  grpc::ServerBuilder builder;
  builder.AddListeningPort(options.listen,
                           options.credentials != nullptr ? options.credentials : grpc::InsecureServerCredentials(),
                           &server->port_);
  builder.SetMaxReceiveMessageSize(options.max_receive_bytes);
  builder.SetMaxSendMessageSize(kMaxInternalMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveAckMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kMinPingIntervalMs);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a second process on our port is an error, not a share
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, 16 << 10);
  for (grpc::Service* service : services) builder.RegisterService(service);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || server->port_ == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", options.listen, ": in use or not ours"));
  }
  server->address_ = absl::StrCat(options.listen.substr(0, options.listen.rfind(':')), ":", server->port_);
  server->service_names_ = options.service_names;
  server->SetServing(false);
  return server;
}

RpcServer::~RpcServer() { Shutdown(absl::ZeroDuration()); }

void RpcServer::SetServing(bool serving) {
  if (server_ == nullptr) return;
  grpc::HealthCheckServiceInterface* const health = server_->GetHealthCheckService();
  health->SetServingStatus(serving);  // the server, and what it has heard of
  for (const std::string& name : service_names_) health->SetServingStatus(name, serving);
}

void RpcServer::Shutdown(absl::Duration grace) {
  if (server_ == nullptr) return;
  server_->Shutdown(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(grace));
  server_->Wait();
  server_.reset();
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address,
                                           const std::shared_ptr<grpc::ChannelCredentials>& credentials,
                                           const std::string& server_name) {
  grpc::ChannelArguments arguments;
  if (!server_name.empty()) arguments.SetSslTargetNameOverride(server_name);
  arguments.SetMaxReceiveMessageSize(kMaxInternalMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxInternalMessageBytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveAckMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);  // retries are the router's decision, per token
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  return grpc::CreateCustomChannel(address, credentials != nullptr ? credentials : grpc::InsecureChannelCredentials(),
                                   arguments);
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const PeerSecurity* security, PeerRole role) {
  if (security == nullptr) return MakeChannel(address);
  return MakeChannel(address, security->MakeChannelCredentials(role), kServerName);
}

std::shared_ptr<grpc::Channel> ChannelPool::Get(const std::string& address, PeerRole role) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (const auto it = channels_.find(Key(address, role)); it != channels_.end()) return it->second;
  if (channels_.size() >= max_channels_) {
    for (auto it = channels_.begin(); it != channels_.end(); ++it) {
      if (it->second.use_count() == 1) {
        channels_.erase(it);
        break;
      }
    }
  }
  return channels_[Key(address, role)] = MakeChannel(address, security_.get(), role);
}

}  // namespace millrace
