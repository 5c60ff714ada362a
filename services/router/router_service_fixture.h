// SPDX-License-Identifier: Apache-2.0
// The gRPC front over a scripted engine and a real connection, for its tests.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "services/common/rpc.h"
#include "services/common/test_wait.h"
#include "services/router/fake_generation_service.h"
#include "services/router/router_service.h"

namespace millrace::router {

class RouterServiceTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto tokenizer = text::Tokenizer::Load("deploy/demo/model/tokenizer.json", 1536);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = tokenizer->release();
  }
  RouterServiceTest() : generations_(*tokenizer_) {
    RouterServiceOptions options;
    options.model = {.id = "demo",
                     .created_unix_s = 1700000000,
                     .context_length = 2048,
                     .vocab_size = 1536,
                     .tokenizer = tokenizer_};
    options.numerics = "release";
    options.generations = &generations_;
    options.traces = &traces_;
    service_ = std::make_unique<RouterService>(std::move(options));
    server_ =
        *RpcServer::Start({.listen = "127.0.0.1:0", .max_receive_bytes = kMaxPublicMessageBytes}, {service_.get()});
    server_->SetServing(true);
    stub_ = v1::Inference::NewStub(MakeChannel(server_->address()));
    generations_.SetScript({.text = "Hello world"});
  }
  ~RouterServiceTest() override {
    generations_.Release();
    server_->Shutdown(absl::ZeroDuration());
  }

  struct Generated {
    grpc::Status status;
    std::string text;
    std::vector<v1::Token> tokens;
    v1::GenerationEnd end;
    std::string code;
  };
  static std::string Trailer(const grpc::ClientContext& context, const char* key) {
    const auto& metadata = context.GetServerTrailingMetadata();
    const auto found = metadata.find(key);
    return found == metadata.end() ? "" : std::string(found->second.data(), found->second.size());
  }
  Generated Generate(const v1::GenerateRequest& request) {
    Generated out;
    grpc::ClientContext context;
    auto reader = stub_->Generate(&context, request);
    v1::GenerateEvent event;
    while (reader->Read(&event)) {
      out.text += event.tokens().text();
      for (const v1::Token& token : event.tokens().tokens()) out.tokens.push_back(token);
      if (event.has_end()) out.end = event.end();
    }
    out.status = reader->Finish();
    out.code = absl::AsciiStrToLower(Detail<google::rpc::ErrorInfo>(out.status).reason());
    return out;
  }
  // The detail of this kind in the status, or an empty one.
  template <typename Kind>
  static Kind Detail(const grpc::Status& status) {
    google::rpc::Status unpacked;
    EXPECT_TRUE(unpacked.ParseFromString(status.error_details()));
    Kind detail;
    for (const auto& any : unpacked.details()) {
      if (any.UnpackTo(&detail)) break;
    }
    return detail;
  }
  static v1::GenerateRequest Prompt(const std::string& text) {
    v1::GenerateRequest request;
    request.set_text(text);
    return request;
  }
  struct Answer {
    grpc::Status status;
    std::string content, reasoning, arguments, tool;
    v1::GenerationEnd end;
  };
  Answer Chat(const v1::ChatRequest& request) {
    Answer out;
    grpc::ClientContext context;
    auto reader = stub_->Chat(&context, request);
    v1::ChatEvent event;
    while (reader->Read(&event)) {
      out.content += event.delta().content();
      out.reasoning += event.delta().reasoning_content();
      for (const auto& call : event.delta().tool_calls()) {
        out.tool += call.name();
        out.arguments += call.arguments_delta();
      }
      if (event.has_end()) out.end = event.end();
    }
    out.status = reader->Finish();
    return out;
  }
  static v1::ChatRequest Ask(const std::string& text) {
    v1::ChatRequest request;
    v1::ChatMessage* message = request.add_messages();
    message->set_role("user");
    message->set_content(text);
    return request;
  }

  static inline text::Tokenizer* tokenizer_ = nullptr;
  FakeGenerationService generations_;
  TraceLog traces_{{}};
  std::unique_ptr<RouterService> service_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

}  // namespace millrace::router
