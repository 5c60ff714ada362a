// SPDX-License-Identifier: Apache-2.0
// A whole router: what each of its ports serves and to whom, and nothing else.
#include "services/router/router_process.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#include "millrace/v1/cluster.grpc.pb.h"
#include "millrace/v1/inference.grpc.pb.h"
#include "services/common/config.h"
#include "services/common/incarnation.h"
#include "services/common/rpc.h"
#include "services/common/test_certificates.h"

namespace millrace::router {
namespace {

using ::testing::HasSubstr;

v1::ClusterConfig RouterOnly(const std::string& more = "") {
  auto config = ParseClusterConfig(
      R"({"model":{"path":"deploy/demo/model","id":"demo"},"router":{"control_listen":"127.0.0.1:0",
          "grpc_listen":"127.0.0.1:0","http_listen":"off","operator_listen":"off"}, "timers":{"heartbeat_ms":100,
          "dead_after_ms":1000,"lease_ttl_ms":1000})" +
          more + "}",
      ".");
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

TEST(RouterProcess, ThePublicPortSpeaksTlsAndTheInternalOneAsksForACertificate) {
  const TestCertificates certificates;
  v1::ClusterConfig config = RouterOnly();
  *config.mutable_security()->mutable_tls() = certificates.Tls();
  *config.mutable_security()->mutable_public_tls() = certificates.PublicTls();
  auto router = RouterProcess::Start(config);
  ASSERT_TRUE(router.ok()) << router.status();
  const auto list = [](const std::shared_ptr<grpc::Channel>& channel) {
    grpc::ClientContext context;
    v1::ListModelsResponse models;
    return v1::Inference::NewStub(channel)->ListModels(&context, {}, &models);
  };
  std::ostringstream ca;
  ca << std::ifstream(certificates.Path("ca.pem")).rdbuf();
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = ca.str();
  EXPECT_TRUE(list(MakeChannel((*router)->grpc_address(), grpc::SslCredentials(ssl), "localhost")).ok());
  EXPECT_EQ(list(MakeChannel((*router)->grpc_address())).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(list(MakeChannel((*router)->control_address(), grpc::SslCredentials(ssl), "millrace")).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  // A worker joins as what its certificate says, or not at all.
  const auto join = [&](PeerRole proven, v1::Role claimed) {
    const auto security = *PeerSecurity::Create(certificates.Tls(), proven);
    auto stub = v1::Cluster::NewStub(MakeChannel((*router)->control_address(), security.get(), PeerRole::kRouter));
    grpc::ClientContext context;
    auto stream = stub->Join(&context);
    v1::WorkerMessage hello;
    hello.mutable_hello()->set_role(claimed);
    hello.mutable_hello()->set_name("w");
    *hello.mutable_hello()->mutable_incarnation() = IncarnationId::Random().ToProto();
    hello.mutable_hello()->set_wire_version(1);
    hello.mutable_hello()->set_control_address("127.0.0.1:1");
    EXPECT_TRUE(stream->Write(hello));
    v1::RouterMessage welcome;
    if (!stream->Read(&welcome)) return stream->Finish();
    context.TryCancel();
    (void)stream->Finish();
    return grpc::Status::OK;
  };
  EXPECT_TRUE(join(PeerRole::kDecode, v1::ROLE_DECODE).ok());
  const grpc::Status status = join(PeerRole::kExpert, v1::ROLE_DECODE);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_THAT(status.error_message(), HasSubstr("found ROLE_DECODE with a certificate for expert"));
  StopSignal stop;
  stop.Raise();
  (*router)->WaitAndDrain(stop);
}

// What each port of a whole router serves, and nothing else.
TEST(RouterProcess, InternalServicesAreNotOnThePublicPortNorTheOtherWayRound) {
  auto router = RouterProcess::Start(RouterOnly());
  ASSERT_TRUE(router.ok()) << router.status();
  {
    auto cluster = v1::Cluster::NewStub(MakeChannel((*router)->grpc_address()));
    grpc::ClientContext context;
    auto stream = cluster->Join(&context);
    stream->WritesDone();
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNIMPLEMENTED);
    auto inference = v1::Inference::NewStub(MakeChannel((*router)->control_address()));
    grpc::ClientContext other;
    v1::ListModelsResponse models;
    EXPECT_EQ(inference->ListModels(&other, {}, &models).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  }
  StopSignal stop;
  stop.Raise();
  (*router)->WaitAndDrain(stop);
}

}  // namespace
}  // namespace millrace::router
