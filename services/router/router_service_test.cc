// SPDX-License-Identifier: Apache-2.0
// The gRPC front over a scripted engine and a real connection: what it delivers, what it refuses, what it lets go.
#include "services/router/router_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "millrace/v1/cluster.grpc.pb.h"
#include "millrace/v1/handoff.grpc.pb.h"
#include "services/common/config.h"
#include "services/common/error.h"
#include "services/common/incarnation.h"
#include "services/common/rpc.h"
#include "services/common/test_certificates.h"
#include "services/router/api_keys.h"
#include "services/router/fake_generation_service.h"
#include "services/router/router_process.h"

namespace millrace::router {
namespace {

using ::testing::HasSubstr;

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

  static text::Tokenizer* tokenizer_;
  FakeGenerationService generations_;
  TraceLog traces_{{}};
  std::unique_ptr<RouterService> service_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

text::Tokenizer* RouterServiceTest::tokenizer_ = nullptr;

TEST_F(RouterServiceTest, GenerateStreamsTokensThenOneEnd) {
  v1::GenerateRequest request = Prompt("Say hello");
  request.set_request_id("mine");
  request.mutable_options()->set_seed(18446744073709551615u);
  request.mutable_options()->set_num_logprobs(2);
  const Generated out = Generate(request);
  ASSERT_TRUE(out.status.ok()) << out.status.error_message();
  EXPECT_EQ(out.text, "Hello world");
  for (size_t i = 0; i < out.tokens.size(); ++i) EXPECT_EQ(out.tokens[i].index(), i);
  EXPECT_EQ(out.tokens[0].top_logprobs_size(), 2);
  EXPECT_EQ(out.end.reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(out.end.seed(), 18446744073709551615u);
  EXPECT_EQ(out.end.request_id(), "mine");
  EXPECT_EQ(out.end.usage().completion_tokens(), out.tokens.size());
  EXPECT_EQ(generations_.requests()[0].sampling.seed, 18446744073709551615u);
}

TEST_F(RouterServiceTest, ACallersTraceGoesOn) {
  v1::GenerateRequest request;
  request.set_request_id("traced");
  request.set_text("Hi");
  grpc::ClientContext context;
  context.AddMetadata("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
  auto reader = stub_->Generate(&context, request);
  v1::GenerateEvent event;
  while (reader->Read(&event)) {
  }
  ASSERT_TRUE(reader->Finish().ok());
  const auto view = traces_.Find("traced");
  ASSERT_TRUE(view.has_value());
  EXPECT_TRUE(view->closed);
  EXPECT_TRUE(view->sampled);
  EXPECT_EQ(view->trace_high, 0x0af7651916cd43ddu);
  EXPECT_EQ(view->phases[0].parent, 0xb7ad6b7169203331u);
  EXPECT_EQ(view->phases[0].code, absl::StatusCode::kOk);
  EXPECT_THAT(view->phases[0].numbers,
              ::testing::Contains(::testing::Pair(::testing::StrEq("output_tokens"), ::testing::Gt(0))));
}

TEST_F(RouterServiceTest, IdsAreTakenAsTheyAreAndMaxTokensFillsTheContext) {
  v1::GenerateRequest request;
  for (int id : {3, 4, 5}) request.mutable_ids()->add_ids(id);
  ASSERT_TRUE(Generate(request).status.ok());
  EXPECT_EQ(generations_.requests()[0].prompt_ids, (std::vector<int32_t>{3, 4, 5}));
  EXPECT_EQ(generations_.requests()[0].max_tokens, 2045);
}

TEST_F(RouterServiceTest, AStopStringEndsTheTextAndTheWork) {
  generations_.SetScript({.text = "Hello world", .repeat = true});
  v1::GenerateRequest request = Prompt("x");
  request.mutable_options()->add_stop("wor");
  const Generated out = Generate(request);
  ASSERT_TRUE(out.status.ok());
  EXPECT_EQ(out.text, "Hello ");
  EXPECT_EQ(out.end.reason(), v1::FINISH_REASON_STOP);
  for (int i = 0; i < 500 && generations_.running() > 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(generations_.running(), 0);
}

TEST_F(RouterServiceTest, ChatTakesReasoningAndToolCallsApart) {
  generations_.SetScript({.text = "thoughts</think>Answer."});
  v1::ChatRequest request = Ask("Hi");
  request.set_thinking(true);
  Answer answer = Chat(request);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.reasoning, "thoughts");
  EXPECT_EQ(answer.content, "Answer.");

  generations_.SetScript(
      {.text = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" "
               "string=\"true\">Oslo</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"});
  request = Ask("Weather?");
  v1::Tool* tool = request.add_tools();
  tool->set_name("get_weather");
  tool->set_parameters_json(R"({"type":"object","properties":{"city":{"type":"string"}}})");
  answer = Chat(request);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.tool, "get_weather");
  EXPECT_THAT(answer.arguments, HasSubstr("Oslo"));
  EXPECT_EQ(answer.end.reason(), v1::FINISH_REASON_TOOL_CALLS);
}

TEST_F(RouterServiceTest, WhatIsWrongIsNamed) {
  const auto generate = [&](const std::function<void(v1::GenerateRequest&)>& change) {
    v1::GenerateRequest request = Prompt("x");
    change(request);
    const Generated out = Generate(request);
    return absl::StrCat(out.status.error_code(), " ", out.code, " ", out.status.error_message());
  };
  EXPECT_THAT(generate([](auto& r) { r.clear_text(); }), HasSubstr("3 missing_field"));
  EXPECT_THAT(generate([](auto& r) { r.set_text(""); }), HasSubstr("3 empty_prompt"));
  EXPECT_THAT(generate([](auto& r) { r.set_model("other"); }), HasSubstr("5 model_not_found"));
  EXPECT_THAT(generate([](auto& r) { r.mutable_ids()->add_ids(-1); }), HasSubstr("3 invalid_token_id"));
  EXPECT_THAT(generate([](auto& r) { r.mutable_ids()->add_ids(1536); }), HasSubstr("prompt[0]"));
  EXPECT_THAT(generate([](auto& r) { r.mutable_options()->set_temperature(2.1f); }), HasSubstr("temperature"));
  EXPECT_THAT(generate([](auto& r) { r.mutable_options()->set_temperature(NAN); }), HasSubstr("temperature"));
  EXPECT_THAT(generate([](auto& r) { r.mutable_options()->set_top_p(0); }), HasSubstr("top_p"));
  EXPECT_THAT(generate([](auto& r) { r.mutable_options()->set_num_logprobs(21); }), HasSubstr("num_logprobs"));
  EXPECT_THAT(generate([](auto& r) { r.mutable_options()->set_max_tokens(4000); }),
              HasSubstr("context_length_exceeded"));
  EXPECT_THAT(generate([](auto& r) {
                for (int i = 0; i < 17; ++i) r.mutable_options()->add_stop("s");
              }),
              HasSubstr("stop"));
  EXPECT_THAT(generate([](auto& r) {
                for (int i = 0; i < 2; ++i) r.mutable_options()->add_logit_bias()->set_id(7);
              }),
              HasSubstr("duplicate_key"));
  EXPECT_THAT(generate([](auto& r) { r.set_request_id("two words"); }), HasSubstr("request_id"));
  EXPECT_THAT(generate([](auto& r) { r.set_request_id(std::string(129, 'a')); }), HasSubstr("request_id"));
  v1::ChatRequest chat = Ask("x");
  chat.set_reasoning_effort(static_cast<v1::ReasoningEffort>(9999));
  EXPECT_EQ(Chat(chat).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  chat = Ask("x");
  chat.mutable_messages(0)->set_role("nobody");
  EXPECT_THAT(Chat(chat).status.error_message(), HasSubstr("messages[0]"));
  EXPECT_EQ(Chat(v1::ChatRequest()).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(generations_.requests().empty());
}

TEST_F(RouterServiceTest, ClusterErrorsKeepTheirCodesAndSayWhenToComeBack) {
  generations_.SetScript({.start_error = MakeError(absl::StatusCode::kResourceExhausted, "busy",
                                                   {.code = "overloaded", .retry_after_s = 2})});
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Prompt("x"));
  v1::GenerateEvent event;
  EXPECT_FALSE(reader->Read(&event));
  const grpc::Status refused = reader->Finish();
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(Trailer(context, "grpc-retry-pushback-ms"), "2000");
  EXPECT_EQ(Detail<google::rpc::RetryInfo>(refused).retry_delay().seconds(), 2);
  EXPECT_EQ(Detail<google::rpc::ErrorInfo>(refused).reason(), "OVERLOADED");
  EXPECT_EQ(Detail<google::rpc::ErrorInfo>(refused).domain(), "millrace");
  EXPECT_EQ(Detail<google::rpc::BadRequest>(refused).field_violations_size(), 0);

  generations_.SetScript({.text = "Hello world", .error = absl::InternalError("secret 10.0.0.7"), .error_after = 2});
  const Generated out = Generate(Prompt("x"));
  EXPECT_EQ(out.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(out.status.error_message().find("10.0.0.7"), std::string::npos);
  EXPECT_EQ(out.status.error_details().find("10.0.0.7"), std::string::npos);
  EXPECT_FALSE(Detail<google::rpc::RetryInfo>(out.status).has_retry_delay()) << "the same request would fail again";
  // Words of the cluster's own carry no time to come back; the table of HTTP has one.
  generations_.SetScript({.start_error = absl::UnavailableError("decode-0 at 10.0.0.7")});
  const Generated unavailable = Generate(Prompt("x"));
  EXPECT_EQ(Detail<google::rpc::RetryInfo>(unavailable.status).retry_delay().seconds(), 5);
  EXPECT_EQ(unavailable.status.error_details().find("10.0.0.7"), std::string::npos);
}

TEST_F(RouterServiceTest, ABadFieldIsInTheDetails) {
  v1::GenerateRequest request = Prompt("x");
  request.mutable_options()->set_temperature(3);
  const grpc::Status status = Generate(request).status;
  const auto bad = Detail<google::rpc::BadRequest>(status);
  ASSERT_EQ(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), "temperature");
  EXPECT_THAT(status.error_message(), HasSubstr(bad.field_violations(0).description()));
  EXPECT_FALSE(Detail<google::rpc::RetryInfo>(status).has_retry_delay());
}

TEST_F(RouterServiceTest, AbortCancelsByIdAndAnIdIsNotUsedTwiceAtOnce) {
  generations_.SetScript({.text = "Hello world", .hold_after = 1});
  v1::GenerateRequest request = Prompt("x");
  request.set_request_id("one");
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, request);
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(Generate(request).code, "duplicate_request_id");
  v1::AbortRequest abort;
  abort.set_request_id("one");
  v1::AbortResponse aborted;
  grpc::ClientContext abort_context;
  ASSERT_TRUE(stub_->Abort(&abort_context, abort, &aborted).ok());
  EXPECT_TRUE(aborted.was_running());
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(generations_.cancelled(), 1);
  grpc::ClientContext again;
  ASSERT_TRUE(stub_->Abort(&again, abort, &aborted).ok());
  EXPECT_FALSE(aborted.was_running());
}

TEST_F(RouterServiceTest, ACallerThatLeavesCancelsItsWork) {
  generations_.SetScript({.text = "Hello world", .hold_after = 1});
  {
    grpc::ClientContext context;
    auto reader = stub_->Generate(&context, Prompt("x"));
    v1::GenerateEvent event;
    ASSERT_TRUE(reader->Read(&event));
    context.TryCancel();
    reader->Finish();
  }
  for (int i = 0; i < 500 && generations_.running() > 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(generations_.running(), 0);
}

// The cancel and the failure of the write in flight come in either order. A call that is not finished after both would
// be waited for by the server's end, for ever.
TEST_F(RouterServiceTest, CallersThatLeaveInTheMiddleOfAWriteLeaveNoCall) {
  generations_.SetScript({.text = "Hello world"});
  for (int i = 0; i < 100; ++i) {
    grpc::ClientContext context;
    v1::GenerateRequest request = Prompt("x");
    request.mutable_options()->set_max_tokens(1000);
    request.mutable_options()->set_ignore_eos(true);
    auto reader = stub_->Generate(&context, request);
    v1::GenerateEvent event;
    ASSERT_TRUE(reader->Read(&event));
    context.TryCancel();
    reader->Finish();
  }
  std::future<void> ended = std::async(std::launch::async, [this] { server_->Shutdown(absl::ZeroDuration()); });
  if (ended.wait_for(std::chrono::seconds(20)) != std::future_status::ready) {
    ADD_FAILURE() << "a call is not finished";
    std::quick_exit(1);  // neither the future nor the server would ever end
  }
}

TEST_F(RouterServiceTest, TokenizeAndDetokenizeAreInverse) {
  v1::TokenizeRequest request;
  request.set_text("Hello 世界 🙂");
  v1::TokenizeResponse ids;
  grpc::ClientContext context;
  ASSERT_TRUE(stub_->Tokenize(&context, request, &ids).ok());
  v1::DetokenizeRequest back;
  *back.mutable_ids() = ids.ids();
  v1::DetokenizeResponse text;
  grpc::ClientContext back_context;
  ASSERT_TRUE(stub_->Detokenize(&back_context, back, &text).ok());
  EXPECT_EQ(text.text(), "Hello 世界 🙂");
  back.add_ids(99999);
  grpc::ClientContext wrong;
  const grpc::Status status = stub_->Detokenize(&wrong, back, &text);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr(absl::StrCat("ids[", ids.ids_size(), "]")));
}

TEST_F(RouterServiceTest, ModelsSayWhetherARequestWouldFindWorkers) {
  for (bool ready : {true, false}) {
    generations_.SetReady(ready ? absl::OkStatus() : absl::UnavailableError("no"));
    v1::ListModelsResponse models;
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->ListModels(&context, {}, &models).ok());
    ASSERT_EQ(models.models_size(), 1);
    EXPECT_EQ(models.models(0).ready(), ready);
    EXPECT_EQ(models.models(0).max_context_tokens(), 2048u);
  }
}

TEST_F(RouterServiceTest, AMessageOverTheLimitIsRefusedAndTheServerLives) {
  v1::TokenizeRequest request;
  request.set_text(std::string(kMaxPublicMessageBytes + 1, 'a'));
  v1::TokenizeResponse ids;
  grpc::ClientContext context;
  EXPECT_EQ(stub_->Tokenize(&context, request, &ids).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(Generate(Prompt("x")).status.ok());
}

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
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (generations_.running() == 0 && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_THAT(Ask("Bearer key-a", Prompt("x")).error_message(), HasSubstr("max_concurrent 1"));
  EXPECT_FALSE(abort("key-b"));
  EXPECT_TRUE(abort("key-a"));
  running.join();
}

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
