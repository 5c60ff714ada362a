// SPDX-License-Identifier: Apache-2.0
// `millrace health`: is a process alive, would it take work? For probes of containers that have no HTTP client.
//
// Kubernetes asks by itself (httpGet, grpc); this is for container engines, supervisors and scripts.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/proto_utils.h>  // how the stub reads and writes messages

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <future>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "grpc/health/v1/health.pb.h"
#include "services/cli/command.h"
#include "services/cli/http_client.h"
#include "services/common/grpc_status.h"
#include "services/common/rpc.h"

namespace millrace::cli {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using std::chrono::milliseconds;

absl::Status AskHttp(const std::string& address, bool ready, milliseconds timeout) {
  HttpCall call{.address = address, .path = ready ? "/readyz" : "/healthz"};
  call.connect_timeout = call.read_timeout = timeout;
  const absl::StatusOr<HttpReply> reply = Send(call);
  if (!reply.ok()) return reply.status();
  if (reply->status == 200) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(address, call.path, " answers ", reply->status));
}

absl::Status AskGrpc(const std::string& address, const std::string& service, milliseconds timeout) {
  grpc::TemplatedGenericStub<HealthCheckRequest, HealthCheckResponse> stub(MakeChannel(address));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + timeout);
  HealthCheckRequest request;
  request.set_service(service);
  HealthCheckResponse response;
  std::promise<grpc::Status> done;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", {}, &request, &response,
                 [&done](grpc::Status status) { done.set_value(std::move(status)); });
  const grpc::Status status = done.get_future().get();  // bounded by the call's deadline
  if (!status.ok()) {
    return absl::UnavailableError(absl::StrCat(address, ": ", FromGrpcStatus(status).message()));
  }
  if (response.status() == HealthCheckResponse::SERVING) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat(address, ": ", HealthCheckResponse::ServingStatus_Name(response.status())));
}

}  // namespace

int RunHealth(Arguments arguments) {
  std::vector<std::string> http, grpc;
  std::string service;
  bool ready = false;
  int64_t timeout_ms = 2000;
  Flags flags(
      "health", "Says by its exit status whether a process is well",
      "0: one of the addresses answers that it is; 1: none does, and one line says why. --http asks an operator\n"
      "port or the router's public one: /healthz (it lives) or, with --ready, /readyz (a request would be\n"
      "placed; the router has it). --grpc asks grpc.health.v1 of a worker: SERVING once it is loaded, until\n"
      "it drains. Without either: --http 127.0.0.1:8081 and 127.0.0.1:9091, where the chart and the documents\n"
      "put the operator ports of the router and of a worker, so that one image's check suits every role.\n\n"
      "  millrace health\n"
      "  millrace health --http 127.0.0.1:8080 --ready\n"
      "  millrace health --grpc 127.0.0.1:9090");
  flags.Repeated("http", &http, "HOST:PORT", "An HTTP port to ask; may be given several times.");
  flags.Repeated("grpc", &grpc, "HOST:PORT", "A gRPC server to ask; may be given several times.");
  flags.String("service", &service, "NAME", "With --grpc: one service of it, such as millrace.v1.Decode.");
  flags.Bool("ready", &ready, "With --http: whether requests would be served, not only whether it lives.");
  flags.Int("timeout-ms", &timeout_ms, 1, 60000, "How long each address may take.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "health", arguments, &exit_code)) return exit_code;
  if (http.empty() && grpc.empty()) http = {"127.0.0.1:8081", "127.0.0.1:9091"};

  const milliseconds timeout(timeout_ms);
  std::vector<std::string> reasons;
  const auto well = [&](const absl::Status& status) {
    if (!status.ok()) reasons.emplace_back(status.message());
    return status.ok();
  };
  for (const std::string& address : http) {
    if (well(AskHttp(address, ready, timeout))) return kExitOk;
  }
  for (const std::string& address : grpc) {
    if (well(AskGrpc(address, service, timeout))) return kExitOk;
  }
  return Fail("health", kExitFailure, absl::StrJoin(reasons, "; "));
}

}  // namespace millrace::cli
