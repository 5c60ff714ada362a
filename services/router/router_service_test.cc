// SPDX-License-Identifier: Apache-2.0
// The gRPC front: what it delivers, what it refuses, what it lets go.
#include "services/router/router_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <future>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "services/common/error.h"
#include "services/router/router_service_fixture.h"

namespace millrace::router {
namespace {

using ::testing::HasSubstr;

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
  EXPECT_TRUE(Eventually([&] { return generations_.running() == 0; }));
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
  EXPECT_TRUE(Eventually([&] { return generations_.running() == 0; }));
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

}  // namespace
}  // namespace millrace::router
