// SPDX-License-Identifier: Apache-2.0
// Replies and streams that do not end well: errors, hang-ups, slow readers, silence; and that nothing is left of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>

#include "services/router/openai_api_fixture.h"

namespace millrace::router {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST_F(OpenAiApiTest, ErrorsBeforeTheFirstByteAreHttpErrors) {
  for (const bool stream : {false, true}) {
    const std::string members = stream ? R"(,"stream":true)" : "";
    generations_->SetScript({.start_error = MakeError(absl::StatusCode::kResourceExhausted, "Queue full.",
                                                      {.code = "overloaded", .retry_after_s = 7})});
    TestReply reply = AskChat(members);
    EXPECT_EQ(reply.status, 429);
    EXPECT_EQ(reply.headers["retry-after"], "7");
    EXPECT_EQ(CodeOf(reply), "overloaded");
    generations_->SetScript({.start_error = absl::DeadlineExceededError("late")});
    EXPECT_EQ(AskChat(members).status, 504);
  }
  generations_->SetScript({.text = "abc def", .error = absl::DataLossError("digest of 10.1.2.3"), .error_after = 1});
  const TestReply reply = AskChat();
  EXPECT_EQ(reply.status, 500);
  EXPECT_THAT(reply.body, Not(HasSubstr("10.1.2.3")));
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, AnErrorInsideAStreamIsAnEventAndTheEnd) {
  generations_->SetScript({.text = "one two three", .error = absl::UnavailableError("decode died"), .error_after = 2});
  TestClient client(public_->port());
  client.Send(Post("/v1/chat/completions", Chat(R"(,"stream":true,"n":2)")));
  const TestReply reply = client.Read();
  EXPECT_EQ(reply.status, 200);
  const auto events = Events(reply.body);
  ASSERT_FALSE(events.empty());
  const Json error = Parse(events.back())["error"];
  EXPECT_EQ(error["code"], "no_capacity");
  EXPECT_TRUE(error["delivered_tokens"].is_number());
  EXPECT_THAT(reply.body, Not(HasSubstr("[DONE]")));
  EXPECT_TRUE(client.WaitForClose());
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, HangingUpCancelsWhateverTheRequestWaitsFor) {
  for (const int hold : {0, 2}) {
    for (const bool stream : {false, true}) {
      generations_->SetScript({.text = "one two three four", .hold_after = hold});
      const int before = generations_->cancelled();
      {
        TestClient client(public_->port());
        client.Send(Post("/v1/chat/completions", Chat(stream ? R"(,"n":2,"stream":true)" : R"(,"n":2)")));
        ASSERT_TRUE(Eventually([&] { return generations_->running() == 2; }));
      }
      EXPECT_TRUE(Quiet());
      EXPECT_EQ(generations_->cancelled(), before + 2);
    }
  }
}

TEST_F(OpenAiApiTest, ManyClientsThatLeaveAtOnceLeaveNothingBehind) {
  generations_->SetScript({.text = "one two three four", .token_delay = std::chrono::microseconds(300)});
  for (int i = 0; i < 300; ++i) {
    TestClient client(public_->port());
    client.Send(Post("/v1/chat/completions", Chat(i % 2 ? R"(,"stream":true)" : "")));
    std::this_thread::sleep_for(std::chrono::microseconds(10 * i));
  }
  EXPECT_TRUE(Quiet());
  EXPECT_THAT(AskOperator(Get("/metrics")).body, HasSubstr("millrace_requests_running{role=\"router\"} 0"));
}

TEST_F(OpenAiApiTest, QuietStreamsArePingedUntilTheirTurn) {
  ApiLimits limits;
  limits.ping_interval = std::chrono::milliseconds(50);
  StartServers(limits);
  generations_->SetScript({.text = "Hello world", .hold_after = 0});
  TestClient client(public_->port());
  client.Send(Post("/v1/chat/completions", Chat(R"(,"stream":true)")));
  ASSERT_TRUE(client.WaitFor(": ping\n\n"));
  EXPECT_THAT(client.buffer(), Not(HasSubstr("assistant")));
  generations_->Release();
  const auto events = Events(client.Read().body);
  EXPECT_EQ(Joined(events, "content"), "Hello world");
  EXPECT_EQ(events.back(), "[DONE]");
}

TEST_F(OpenAiApiTest, TheRoleComesAtAdmission) {
  generations_->SetScript({.text = "one two three", .hold_after = 1});
  TestClient client(public_->port());
  client.Send(Post("/v1/chat/completions", Chat(R"(,"stream":true)")));
  EXPECT_TRUE(client.WaitFor("assistant"));
  generations_->Release();
  EXPECT_EQ(Joined(Events(client.Read().body), "content"), "one two three");
}

TEST_F(OpenAiApiTest, TheFrontEndsWhatTheClusterForgot) {
  ApiLimits limits;
  limits.deadline_grace = std::chrono::milliseconds(50);
  StartServers(limits);
  generations_->SetScript({.text = "x", .hold_after = 0});
  const TestReply reply = AskChat("", "x-request-timeout-ms: 100\r\n");
  EXPECT_EQ(reply.status, 504);
  EXPECT_EQ(CodeOf(reply), "deadline_exceeded");
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, SlowReadersArePausedThenEndedWithTheirReason) {
  HttpLimits limits;
  limits.soft_write_buffer_bytes = 32 << 10;
  limits.slow_reader_timeout = std::chrono::milliseconds(300);
  StartServers({}, limits);
  generations_->SetScript({.text = "one two three four five six seven eight nine ten ", .repeat = true});
  TestClient client(public_->port(), 4096);
  client.Send(Post("/v1/completions", R"({"model":"demo/model","prompt":"a","stream":true,"max_tokens":2000,"n":8,)"
                                      R"("logprobs":20})"));
  EXPECT_TRUE(Eventually([&] { return generations_->pauses() > 0; }));
  EXPECT_TRUE(Quiet());
  EXPECT_THAT(AskOperator(Get("/metrics")).body, HasSubstr("millrace_slow_consumers_total 1"));
}

TEST_F(OpenAiApiTest, StoppingTheServerCancelsWhatRuns) {
  generations_->SetScript({.text = "x", .hold_after = 0});
  TestClient client(public_->port());
  client.Send(Post("/v1/chat/completions", Chat(R"(,"stream":true)")));
  ASSERT_TRUE(Eventually([&] { return generations_->running() == 1; }));
  public_.reset();
  EXPECT_EQ(generations_->cancelled(), 1);
  EXPECT_TRUE(Quiet());
}

}  // namespace
}  // namespace millrace::router
