// SPDX-License-Identifier: Apache-2.0
// Mutual TLS over real connections: every cell of the table, everybody who is kept out, and a change of certificates
// under a running stream.
#include "services/common/peer_security.h"

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <thread>

#include "grpc/health/v1/health.pb.h"
#include "millrace/v1/cluster.grpc.pb.h"
#include "millrace/v1/decode.grpc.pb.h"
#include "millrace/v1/expert.grpc.pb.h"
#include "millrace/v1/handoff.grpc.pb.h"
#include "millrace/v1/inference.grpc.pb.h"
#include "millrace/v1/prefill.grpc.pb.h"
#include "services/common/rpc.h"
#include "services/common/test_certificates.h"

namespace millrace {
namespace {

using ::testing::HasSubstr;

std::string FileText(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

// A call of any method with one empty message, byte by byte.
class RawCall {
 public:
  RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method) : stub_(channel) {
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    call_ = stub_.PrepareCall(&context_, method, &queue_);
    call_->StartCall(nullptr);
    if (!Next()) return;
    grpc::Slice nothing;
    call_->WriteLast(grpc::ByteBuffer(&nothing, 1), grpc::WriteOptions(), nullptr);
    open_ = Next();
  }
  ~RawCall() {
    context_.TryCancel();
    if (!finished_) (void)Finish();
  }
  bool Read(grpc::ByteBuffer* reply) {
    if (!open_) return false;
    call_->Read(reply, nullptr);
    return open_ = Next();
  }
  grpc::Status Finish() {
    finished_ = true;
    grpc::Status status;
    call_->Finish(&status, nullptr);
    Next();
    return status;
  }

 private:
  bool Next() {
    void* tag = nullptr;
    bool ok = false;
    EXPECT_TRUE(queue_.Next(&tag, &ok));
    return ok;
  }
  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  bool open_ = false, finished_ = false;
};

// What a call comes to. A message back counts as OK: some streams never end.
grpc::Status CallMethod(const std::shared_ptr<grpc::Channel>& channel, const std::string& method) {
  RawCall call(channel, method);
  grpc::ByteBuffer reply;
  return call.Read(&reply) ? grpc::Status::OK : call.Finish();
}

// The next state that a Watch of the health service tells.
grpc::health::v1::HealthCheckResponse::ServingStatus NextState(RawCall& watch) {
  grpc::ByteBuffer reply;
  grpc::Slice bytes;
  grpc::health::v1::HealthCheckResponse state;
  EXPECT_TRUE(watch.Read(&reply)) << "the stream broke";
  EXPECT_TRUE(reply.DumpToSingleSlice(&bytes).ok());
  EXPECT_TRUE(state.ParseFromArray(bytes.begin(), static_cast<int>(bytes.size())));
  return state.status();
}

class PeerSecurityTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { certificates_ = new TestCertificates; }
  static void TearDownTestSuite() { delete certificates_; }

  static std::shared_ptr<const PeerSecurity> Of(PeerRole role, const TestCertificates& certificates = *certificates_) {
    auto security = PeerSecurity::Create(certificates.Tls(), role);
    EXPECT_TRUE(security.ok()) << security.status();
    return *security;
  }
  // A server of that role with every internal service and, by mistake, the public one.
  std::unique_ptr<RpcServer> Serve(PeerRole role, const TestCertificates& certificates = *certificates_) {
    RpcServerOptions options;
    options.listen = "127.0.0.1:0";
    options.credentials = Of(role, certificates)->MakeServerCredentials();
    auto server = RpcServer::Start(options, {&cluster_, &prefill_, &handoff_, &decode_, &expert_, &inference_});
    EXPECT_TRUE(server.ok()) << server.status();
    (*server)->SetServing(true);
    return *std::move(server);
  }
  // A client that presents what it likes and believes any server.
  static std::shared_ptr<grpc::Channel> Stranger(const std::string& address, const std::string& certificate,
                                                 const std::string& key) {
    grpc::experimental::TlsChannelCredentialsOptions options;
    std::vector<grpc::experimental::IdentityKeyCertPair> pairs;
    if (!certificate.empty()) pairs.push_back({FileText(key), FileText(certificate)});
    options.set_certificate_provider(std::make_shared<grpc::experimental::StaticDataCertificateProvider>(
        FileText(certificates_->Path("ca.pem")), pairs));
    options.watch_root_certs();
    options.set_verify_server_certs(false);
    if (!certificate.empty()) options.watch_identity_key_cert_pairs();
    options.set_certificate_verifier(std::make_shared<grpc::experimental::NoOpCertificateVerifier>());
    options.set_check_call_host(false);
    return MakeChannel(address, grpc::experimental::TlsCredentials(options));
  }
  static constexpr char kHealthCheck[] = "/grpc.health.v1.Health/Check";

  static TestCertificates* certificates_;
  v1::Cluster::Service cluster_;
  v1::Prefill::Service prefill_;
  v1::Handoff::Service handoff_;
  v1::Decode::Service decode_;
  v1::Expert::Service expert_;
  v1::Inference::Service inference_;
};
TestCertificates* PeerSecurityTest::certificates_ = nullptr;

TEST_F(PeerSecurityTest, EveryCellOfTheTableHoldsOverTls) {
  const auto server = Serve(PeerRole::kDecode);
  int allowed = 0, denied = 0;
  for (const PeerRole role : kPeerRoles) {
    const auto channel = MakeChannel(server->address(), Of(role).get(), PeerRole::kDecode);
    for (const MethodAccess& row : MethodAccessTable()) {
      const bool may = std::find(row.callers.begin(), row.callers.end(), role) != row.callers.end();
      const grpc::Status status = CallMethod(channel, std::string(row.method));
      if (may) {
        // The services of this test implement nothing; getting so far is what the table decides.
        EXPECT_TRUE(status.ok() || status.error_code() == grpc::StatusCode::UNIMPLEMENTED)
            << PeerRoleWord(role) << " " << row.method << ": " << status.error_message();
      } else {
        EXPECT_EQ(status.error_code(), grpc::StatusCode::PERMISSION_DENIED)
            << PeerRoleWord(role) << " " << row.method << ": " << status.error_message();
        EXPECT_THAT(status.error_message(), HasSubstr(std::string(PeerRoleWord(role))));
      }
      ++(may ? allowed : denied);
    }
    for (const char* method : {"/millrace.v1.Inference/Generate", "/millrace.v1.Handoff/Reserv", "/x/y"}) {
      EXPECT_EQ(CallMethod(channel, method).error_code(), grpc::StatusCode::PERMISSION_DENIED) << method;
    }
  }
  EXPECT_GE(allowed, 20);
  EXPECT_GE(denied, 40);
}

TEST(MethodAccess, NamesEveryInternalMethodAndNoOther) {
  std::set<std::string> methods;
  const auto* const pool = google::protobuf::DescriptorPool::generated_pool();
  for (const char* service :
       {v1::Cluster::service_full_name(), v1::Prefill::service_full_name(), v1::Handoff::service_full_name(),
        v1::Decode::service_full_name(), v1::Expert::service_full_name(), "grpc.health.v1.Health"}) {
    const auto* const descriptor = pool->FindServiceByName(service);
    ASSERT_NE(descriptor, nullptr) << service;
    for (int i = 0; i < descriptor->method_count(); ++i) {
      methods.insert(absl::StrCat("/", service, "/", descriptor->method(i)->name()));
    }
  }
  methods.insert("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo");
  std::set<std::string> rows;
  for (const MethodAccess& row : MethodAccessTable()) {
    EXPECT_TRUE(rows.emplace(row.method).second) << row.method << " twice";
    EXPECT_FALSE(row.callers.empty()) << row.method;
  }
  EXPECT_EQ(rows, methods);
}

TEST(MethodAccess, ARoleIsAnExactUri) {
  EXPECT_EQ(RoleOfSpiffeId("spiffe://a.b/millrace/decode", "a.b"), PeerRole::kDecode);
  for (const char* id : {"spiffe://a.b/millrace/decode/", "spiffe://a.b/millrace/decoder", "spiffe://a/millrace/decode",
                         "spiffe://a.b/x/millrace/decode", "spiffe://A.B/millrace/decode", "decode", ""}) {
    EXPECT_EQ(RoleOfSpiffeId(id, "a.b"), std::nullopt) << id;
  }
}

TEST_F(PeerSecurityTest, WhoHasNoCertificateOfOursGetsNoConnection) {
  const auto server = Serve(PeerRole::kDecode);
  const auto code = [&](const TestCertificates& certificates, const char* name) {
    return CallMethod(Stranger(server->address(), certificates.Path(absl::StrCat(name, ".pem")),
                               certificates.Path(absl::StrCat(name, ".key"))),
                      kHealthCheck)
        .error_code();
  };
  EXPECT_EQ(code(*certificates_, "router"), grpc::StatusCode::OK);  // the control: this client can speak
  EXPECT_EQ(CallMethod(MakeChannel(server->address()), kHealthCheck).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(CallMethod(Stranger(server->address(), "", ""), kHealthCheck).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(code(TestCertificates(), "router"), grpc::StatusCode::UNAVAILABLE);
  const TestCertificates expired("--days 0", certificates_);
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // a certificate of no days is valid for its second
  EXPECT_EQ(code(expired, "router"), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(PeerSecurity::Create(expired.Tls(), PeerRole::kRouter).status().message(), HasSubstr("has expired"));
  // Of our CA, but for servers only.
  EXPECT_EQ(code(*certificates_, "public"), grpc::StatusCode::UNAVAILABLE);
  // Of our CA and for clients, but its URI is of another domain: a connection, and no method.
  EXPECT_EQ(code(TestCertificates("--trust-domain other", certificates_), "router"),
            grpc::StatusCode::PERMISSION_DENIED);
}

TEST_F(PeerSecurityTest, AServerOfAnotherRoleIsNotBelieved) {
  const auto server = Serve(PeerRole::kExpert);
  const auto router = Of(PeerRole::kRouter);
  EXPECT_TRUE(CallMethod(MakeChannel(server->address(), router.get(), PeerRole::kExpert), kHealthCheck).ok());
  const grpc::Status status = CallMethod(MakeChannel(server->address(), router.get(), PeerRole::kDecode), kHealthCheck);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(PeerSecurityTest, WrongFilesAreNamedAtTheStart) {
  const auto error = [](v1::TlsSection tls, PeerRole own = PeerRole::kDecode) {
    return std::string(PeerSecurity::Create(std::move(tls), own).status().message());
  };
  v1::TlsSection tls = certificates_->Tls();
  EXPECT_EQ(error(tls), "");
  tls.set_certificate("/nowhere/{role}.pem");
  EXPECT_EQ(error(tls), "security.tls.certificate: /nowhere/decode.pem: cannot be read");
  tls = certificates_->Tls();
  tls.set_certificate(certificates_->Path("prefill.pem"));
  EXPECT_THAT(error(tls), HasSubstr("is not the key of"));
  tls.set_key(certificates_->Path("prefill.key"));
  EXPECT_THAT(error(tls), HasSubstr("names spiffe://cluster.local/millrace/prefill, allowed "
                                    "spiffe://cluster.local/millrace/decode"));
  tls = certificates_->Tls();
  tls.set_key(certificates_->Path("ca.pem"));
  EXPECT_THAT(error(tls), HasSubstr("security.tls.key"));
  const TestCertificates other;
  tls = certificates_->Tls();
  tls.set_ca(other.Path("ca.pem"));
  EXPECT_THAT(error(tls), HasSubstr("is not signed by"));
}

TEST_F(PeerSecurityTest, NewCertificatesServeNewConnectionsAndLeaveStreamsAlone) {
  TestCertificates certificates;
  const auto server = Serve(PeerRole::kDecode, certificates);
  const auto router = Of(PeerRole::kRouter, certificates);
  const auto channel = MakeChannel(server->address(), router.get(), PeerRole::kDecode);
  RawCall watch(channel, "/grpc.health.v1.Health/Watch");
  EXPECT_EQ(NextState(watch), grpc::health::v1::HealthCheckResponse::SERVING);

  // Another CA altogether: who still held the old files could not connect any more.
  for (const char* file : {"ca.key", "ca.pem"}) std::filesystem::remove(certificates.Path(file));
  const auto before = Of(PeerRole::kRouter, *certificates_);  // of yet another CA
  certificates.Renew();
  const auto renewed = Of(PeerRole::kRouter, certificates);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  grpc::Status status;
  do {
    status = CallMethod(MakeChannel(server->address(), renewed.get(), PeerRole::kDecode), kHealthCheck);
  } while (!status.ok() && std::chrono::steady_clock::now() < end);
  EXPECT_TRUE(status.ok()) << "the server never took its new files: " << status.error_message();
  // The process that held the old files has read them again as well.
  do {
    status = CallMethod(MakeChannel(server->address(), router.get(), PeerRole::kDecode), kHealthCheck);
  } while (!status.ok() && std::chrono::steady_clock::now() < end);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_FALSE(CallMethod(MakeChannel(server->address(), before.get(), PeerRole::kDecode), kHealthCheck).ok());

  server->SetServing(false);
  EXPECT_EQ(NextState(watch), grpc::health::v1::HealthCheckResponse::NOT_SERVING);
}

}  // namespace
}  // namespace millrace
