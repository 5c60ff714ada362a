// SPDX-License-Identifier: Apache-2.0
// The gRPC front with API keys: every method asks for one, quotas hold, and a request is its tenant's own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "services/router/api_keys.h"
#include "services/router/router_service_fixture.h"

namespace millrace::router {
namespace {

using ::testing::HasSubstr;

// The same front with keys: two tenants, one of them with quotas.
class RouterKeysTest : public RouterServiceTest {
 protected:
  RouterKeysTest()
      : path_((std::filesystem::temp_directory_path() / absl::StrCat("millrace-keys-", getpid(), ".json")).string()) {
    std::ofstream(path_) << R"({"tenants":[{"name":"a","keys":[")" << ApiKeyDigest("key-a")
                         << R"("],"requests_per_minute":2,"max_concurrent":1},{"name":"b","keys":[")"
                         << ApiKeyDigest("key-b") << R"("]}]})";
    keys_ = *ApiKeys::Open(path_);
    RouterServiceOptions options;
    options.model = {.id = "demo", .context_length = 2048, .vocab_size = 1536, .tokenizer = tokenizer_};
    options.generations = &generations_;
    options.keys = keys_.get();
    locked_service_ = std::make_unique<RouterService>(std::move(options));
    locked_ = *RpcServer::Start({.listen = "127.0.0.1:0"}, {locked_service_.get()});
    locked_stub_ = v1::Inference::NewStub(MakeChannel(locked_->address()));
  }
  ~RouterKeysTest() override {
    generations_.Release();
    locked_->Shutdown(absl::ZeroDuration());
    std::filesystem::remove(path_);
  }
  // Every method once with this value of "authorization" (none if empty).
  std::vector<grpc::Status> CallAll(const std::string& authorization) {
    std::vector<grpc::Status> all;
    const auto unary = [&](auto method, auto request, auto response) {
      grpc::ClientContext context;
      if (!authorization.empty()) context.AddMetadata("authorization", authorization);
      all.push_back((locked_stub_.get()->*method)(&context, request, &response));
    };
    unary(&v1::Inference::Stub::Tokenize, v1::TokenizeRequest(), v1::TokenizeResponse());
    unary(&v1::Inference::Stub::Detokenize, v1::DetokenizeRequest(), v1::DetokenizeResponse());
    v1::AbortRequest abort;
    abort.set_request_id("x");
    unary(&v1::Inference::Stub::Abort, abort, v1::AbortResponse());
    unary(&v1::Inference::Stub::ListModels, v1::ListModelsRequest(), v1::ListModelsResponse());
    all.push_back(Ask(authorization, Prompt("x")));
    grpc::ClientContext context;
    if (!authorization.empty()) context.AddMetadata("authorization", authorization);
    v1::ChatRequest chat;
    auto* message = chat.add_messages();
    message->set_role("user");
    message->set_content("x");
    auto reader = locked_stub_->Chat(&context, chat);
    v1::ChatEvent event;
    while (reader->Read(&event)) {
    }
    all.push_back(reader->Finish());
    return all;
  }
  grpc::Status Ask(const std::string& authorization, const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    if (!authorization.empty()) context.AddMetadata("authorization", authorization);
    auto reader = locked_stub_->Generate(&context, request);
    v1::GenerateEvent event;
    while (reader->Read(&event)) {
    }
    return reader->Finish();
  }

  const std::string path_;
  std::unique_ptr<ApiKeys> keys_;
  std::unique_ptr<RouterService> locked_service_;
  std::unique_ptr<RpcServer> locked_;
  std::unique_ptr<v1::Inference::Stub> locked_stub_;
};

TEST_F(RouterKeysTest, EveryMethodAsksForAKey) {
  for (const char* authorization : {"", "Bearer key-c", "Basic key-b", "key-b"}) {
    for (const grpc::Status& status : CallAll(authorization)) {
      EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << authorization;
      EXPECT_EQ(Detail<google::rpc::ErrorInfo>(status).reason(), "INVALID_API_KEY");
    }
  }
  for (const grpc::Status& status : CallAll("Bearer key-b")) EXPECT_TRUE(status.ok()) << status.error_message();
}

TEST_F(RouterKeysTest, AQuotaSaysWhenToComeBack) {
  EXPECT_TRUE(Ask("Bearer key-a", Prompt("x")).ok());
  EXPECT_TRUE(Ask("Bearer key-a", Prompt("x")).ok());
  const grpc::Status status = Ask("Bearer key-a", Prompt("x"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("requests_per_minute 2"));
  const auto retry = Detail<google::rpc::RetryInfo>(status).retry_delay().seconds();
  EXPECT_GE(retry, 1);
  EXPECT_LE(retry, 30);
  EXPECT_TRUE(Ask("Bearer key-b", Prompt("x")).ok());
}

TEST_F(RouterKeysTest, ARequestIsItsTenantsToAbort) {
  generations_.SetScript({.text = "Hello world", .hold_after = 1});
  v1::GenerateRequest request = Prompt("x");
  request.set_request_id("mine");
  std::thread running([&] { EXPECT_EQ(Ask("Bearer key-a", request).error_code(), grpc::StatusCode::CANCELLED); });
  const auto abort = [&](const std::string& key) {
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer " + key);
    v1::AbortRequest message;
    message.set_request_id("mine");
    v1::AbortResponse response;
    EXPECT_TRUE(locked_stub_->Abort(&context, message, &response).ok());
    return response.was_running();
  };
  EXPECT_TRUE(Eventually([&] { return generations_.running() == 1; }));
  EXPECT_THAT(Ask("Bearer key-a", Prompt("x")).error_message(), HasSubstr("max_concurrent 1"));
  EXPECT_FALSE(abort("key-b"));
  EXPECT_TRUE(abort("key-a"));
  running.join();
}

}  // namespace
}  // namespace millrace::router
