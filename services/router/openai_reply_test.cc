// SPDX-License-Identifier: Apache-2.0
// What good replies and streams look like, over a scripted engine.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "services/router/openai_api_fixture.h"

namespace millrace::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

TEST_F(OpenAiApiTest, WholeChatReplyHasOpenAisShape) {
  generations_->SetScript({.text = "Hello world", .cached_prompt_tokens = 2});
  const TestReply reply = AskChat();
  ASSERT_EQ(reply.status, 200) << reply.body;
  const Json json = Parse(reply.body);
  EXPECT_EQ(json["object"], "chat.completion");
  EXPECT_EQ(json["model"], "demo/model");
  EXPECT_EQ(json["id"].get<std::string>().substr(0, 9), "chatcmpl-");
  EXPECT_EQ(json["choices"][0]["message"]["role"], "assistant");
  EXPECT_EQ(json["choices"][0]["message"]["content"], "Hello world");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(json["choices"][0]["logprobs"].is_null());
  const auto prompt_tokens = generations_->requests().back().prompt_ids.size();
  const auto completion_tokens = TokenCount("Hello world") + 1;
  EXPECT_EQ(json["usage"]["prompt_tokens"], prompt_tokens);
  EXPECT_EQ(json["usage"]["completion_tokens"], completion_tokens);
  EXPECT_EQ(json["usage"]["total_tokens"], prompt_tokens + completion_tokens);
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
  EXPECT_EQ(json["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, StreamHasRoleContentFinishAndDone) {
  TestClient client(public_->port());
  for (const bool usage : {false, true}) {  // twice on one connection: a good stream does not end it
    client.Send(Post("/v1/chat/completions",
                     Chat(usage ? R"(,"stream":true,"stream_options":{"include_usage":true})" : R"(,"stream":true)")));
    TestReply reply = client.Read();
    ASSERT_EQ(reply.status, 200);
    EXPECT_EQ(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    EXPECT_EQ(reply.headers["cache-control"], "no-cache");
    const auto events = Events(reply.body);
    ASSERT_GE(events.size(), 4u);
    EXPECT_EQ(events.back(), "[DONE]");
    EXPECT_EQ(Parse(events[0])["choices"][0]["delta"]["role"], "assistant");
    EXPECT_EQ(Joined(events, "content"), "Hello world");
    EXPECT_EQ(FinishReason(events), "stop");
    const Json first = Parse(events[0]);
    for (size_t i = 0; i + 1 < events.size(); ++i) {
      const Json chunk = Parse(events[i]);
      EXPECT_EQ(chunk["object"], "chat.completion.chunk");
      EXPECT_EQ(chunk["id"], first["id"]);
      EXPECT_EQ(chunk["created"], first["created"]);
      EXPECT_EQ(chunk.contains("usage"), usage);
    }
    if (!usage) continue;
    const Json last = Parse(events[events.size() - 2]);
    EXPECT_TRUE(last["choices"].is_array() && last["choices"].empty());
    EXPECT_EQ(last["usage"]["completion_tokens"], TokenCount("Hello world") + 1);
  }
}

TEST_F(OpenAiApiTest, LengthEndsWithItsReason) {
  EXPECT_EQ(Parse(AskChat(R"(,"max_tokens":1)").body)["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(FinishReason(Events(AskChat(R"(,"max_tokens":1,"stream":true)").body)), "length");
}

TEST_F(OpenAiApiTest, StopStringsAreTrimmedAndCancelTheRest) {
  const std::string text = "one two three four";
  generations_->SetScript({.text = text, .cached_prompt_tokens = 1});
  const Json json = Parse(AskChat(R"(,"stop":["wo th","four"])").body);
  EXPECT_EQ(json["choices"][0]["message"]["content"], "one t");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
  EXPECT_LT(json["usage"]["completion_tokens"], TokenCount(text));
  EXPECT_EQ(Joined(Events(AskChat(R"(,"stream":true,"stop":"o thr")").body), "content"), "one tw");
  EXPECT_EQ(Joined(Events(AskChat(R"(,"stream":true,"stop":"one two three four")").body), "content"), "");
  EXPECT_EQ(Joined(Events(AskChat(R"(,"stream":true,"stop":"four!")").body), "content"), text);
  EXPECT_TRUE(Quiet());
}

TEST_F(OpenAiApiTest, ReasoningIsApartAndCounted) {
  generations_->SetScript({.text = "I think so</think>Yes"});
  for (const char* how : {R"(,"reasoning_effort":"high")", R"(,"thinking":{"type":"enabled"})",
                          R"(,"chat_template_kwargs":{"thinking":true})"}) {
    const Json json = Parse(AskChat(how).body);
    EXPECT_EQ(json["choices"][0]["message"]["reasoning_content"], "I think so") << how;
    EXPECT_EQ(json["choices"][0]["message"]["content"], "Yes");
    EXPECT_EQ(json["usage"]["completion_tokens_details"]["reasoning_tokens"], TokenCount("I think so</think>"));
    const auto events = Events(AskChat(std::string(how) + R"(,"stream":true)").body);
    EXPECT_EQ(Joined(events, "reasoning_content"), "I think so");
    EXPECT_EQ(Joined(events, "content"), "Yes");
  }
  for (const char* how : {"", R"(,"reasoning_effort":"none")"}) {
    EXPECT_FALSE(Parse(AskChat(how).body)["choices"][0]["message"].contains("reasoning_content"));
  }
}

TEST_F(OpenAiApiTest, ToolCallsStreamWithIndexIdAndArguments) {
  const std::string tools =
      R"(,"tools":[{"type":"function","function":{"name":"get_weather","parameters":{"type":"object"}}}])";
  const std::string call =
      "<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">"
      "Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n";
  generations_->SetScript({.text = "Let me look.\n\n<｜DSML｜tool_calls>\n" + call + call + "</｜DSML｜tool_calls>"});
  const Json json = Parse(AskChat(tools).body);
  EXPECT_EQ(json["choices"][0]["finish_reason"], "tool_calls");
  const Json& message = json["choices"][0]["message"];
  EXPECT_EQ(message["content"], "Let me look.");
  ASSERT_EQ(message["tool_calls"].size(), 2u);
  EXPECT_EQ(message["tool_calls"][0]["type"], "function");
  EXPECT_EQ(message["tool_calls"][0]["function"]["name"], "get_weather");
  EXPECT_EQ(Parse(message["tool_calls"][1]["function"]["arguments"])["city"], "Rome");
  EXPECT_NE(message["tool_calls"][0]["id"], message["tool_calls"][1]["id"]);

  const TestReply reply = AskChat(tools + R"(,"stream":true)");
  EXPECT_THAT(reply.body, Not(HasSubstr("DSML")));
  std::string arguments[2];
  int starts = 0;
  const auto events = Events(reply.body);
  for (const auto& event : events) {
    const Json chunk = Parse(event);
    if (!chunk.is_object() || !chunk["choices"][0]["delta"].contains("tool_calls")) continue;
    for (const auto& piece : chunk["choices"][0]["delta"]["tool_calls"]) {
      starts += piece.contains("id");
      arguments[piece["index"].get<int>()] += piece["function"]["arguments"].get<std::string>();
    }
  }
  EXPECT_EQ(starts, 2);
  for (const auto& text : arguments) EXPECT_EQ(Parse(text)["city"], "Rome");
  EXPECT_EQ(FinishReason(events), "tool_calls");
}

TEST_F(OpenAiApiTest, WithToolChoiceNoneThereIsNeitherACallNorItsMarkup) {
  const std::string none = R"(,"tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":"none")";
  const std::string call =
      "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\" string=\"true\">"
      "Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
  const struct {
    std::string text, content;
  } kCases[] = {{"\n\n" + call, ""},
                {"Let me look.\n\n" + call, "Let me look."},
                {"Before." + call + "\nAfter.", "Before.After."},
                {"Cut off.\n\n" + call.substr(0, call.size() / 2), "Cut off."},
                {"No markup: a < b", "No markup: a < b"}};
  for (const auto& test : kCases) {
    generations_->SetScript({.text = test.text});
    const Json choice = Parse(AskChat(none).body)["choices"][0];
    EXPECT_EQ(choice["message"]["content"], test.content);
    EXPECT_FALSE(choice["message"].contains("tool_calls"));
    EXPECT_EQ(choice["finish_reason"], "stop");
    const TestReply reply = AskChat(none + R"(,"stream":true)");
    EXPECT_EQ(Joined(Events(reply.body), "content"), test.content);
    EXPECT_EQ(FinishReason(Events(reply.body)), "stop");
    EXPECT_THAT(reply.body, Not(HasSubstr("DSML")));
    EXPECT_THAT(reply.body, Not(HasSubstr("tool_calls")));
  }
  EXPECT_THAT(RenderMetrics(*registry_), HasSubstr("millrace_unreadable_tool_calls_total 0\n"));
}

TEST_F(OpenAiApiTest, SeveralChoicesShareAReply) {
  const Json json = Parse(AskChat(R"(,"n":3)").body);
  ASSERT_EQ(json["choices"].size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(json["choices"][i]["index"], i);
  EXPECT_EQ(json["usage"]["completion_tokens"], 3 * (TokenCount("Hello world") + 1));
  const auto requests = generations_->requests();
  EXPECT_EQ(requests[0].sampling.seed, requests[2].sampling.seed);
  EXPECT_EQ(requests[2].choice, 2);

  const auto events = Events(AskChat(R"(,"n":3,"stream":true)").body);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Joined(events, "content", i), "Hello world");
    EXPECT_EQ(Joined(events, "role", i), "assistant");
    EXPECT_EQ(FinishReason(events, i), "stop");
  }
  EXPECT_EQ(events.back(), "[DONE]");
}

TEST_F(OpenAiApiTest, LogprobsHaveAnEntryForEveryToken) {
  const size_t tokens = TokenCount("Hello world") + 1;
  const std::string how = R"(,"logprobs":true,"top_logprobs":2)";
  const Json content = Parse(AskChat(how).body)["choices"][0]["logprobs"]["content"];
  ASSERT_EQ(content.size(), tokens);
  EXPECT_EQ(content[1]["logprob"], -0.25);
  EXPECT_EQ(content[0]["top_logprobs"].size(), 2u);
  EXPECT_TRUE(content[0]["bytes"].is_array());
  std::string text;
  for (size_t i = 0; i + 1 < tokens; ++i) text += content[i]["token"].get<std::string>();
  EXPECT_EQ(text, "Hello world");

  size_t streamed = 0;
  for (const auto& event : Events(AskChat(how + R"(,"stream":true)").body)) {
    const Json chunk = Parse(event);
    if (chunk.is_object() && chunk["choices"][0]["logprobs"].is_object()) {
      streamed += chunk["choices"][0]["logprobs"]["content"].size();
    }
  }
  EXPECT_EQ(streamed, tokens);

  const Json plain = Parse(AskCompletion(R"(,"prompt":"Hi","logprobs":1)").body)["choices"][0]["logprobs"];
  EXPECT_EQ(plain["tokens"].size(), tokens);
  EXPECT_EQ(plain["token_logprobs"][1], -0.25);
  EXPECT_EQ(plain["top_logprobs"].size(), tokens);
  EXPECT_EQ(plain["text_offset"][0], 0);
}

TEST_F(OpenAiApiTest, CompletionsTakeTextIdsSuffixAndEcho) {
  Json json = Parse(AskCompletion(R"(,"prompt":"Hi there")").body);
  EXPECT_EQ(json["object"], "text_completion");
  EXPECT_EQ(json["choices"][0]["text"], "Hello world");
  EXPECT_EQ(generations_->requests().back().prompt_ids, *tokenizer_->Encode("Hi there", text::SpecialTokens::kPlain));
  EXPECT_EQ(AskCompletion(R"(,"prompt":[100,1e2])").status, 200);
  EXPECT_THAT(generations_->requests().back().prompt_ids, ElementsAre(100, 100));
  EXPECT_EQ(Parse(AskCompletion(R"(,"prompt":"Hi ","echo":true)").body)["choices"][0]["text"], "Hi Hello world");
  const auto events = Events(AskCompletion(R"(,"prompt":"Hi ","echo":true,"stream":true)").body);
  EXPECT_EQ(Joined(events, "text"), "Hi Hello world");
  EXPECT_EQ(events.back(), "[DONE]");
  EXPECT_EQ(AskCompletion(R"(,"prompt":"def f(","suffix":"return x")").status, 200);
  const auto ids = generations_->requests().back().prompt_ids;
  EXPECT_EQ(ids.front(), *tokenizer_->TokenId("<｜begin▁of▁sentence｜>"));
  EXPECT_EQ(ids.back(), *tokenizer_->TokenId("<｜fim▁end｜>"));
}

TEST_F(OpenAiApiTest, SeveralPromptsAreAnsweredInOrderAndCountedOnce) {
  const Json reply =
      Parse(AskCompletion(R"(,"prompt":["Hi there","Compute 1",[40,41,42]],"n":2,"seed":5,"echo":true)").body);
  ASSERT_EQ(reply["choices"].size(), 6u) << reply;
  for (int i = 0; i < 6; ++i) EXPECT_EQ(reply["choices"][i]["index"], i);
  EXPECT_THAT(reply["choices"][1]["text"].get<std::string>(), ::testing::StartsWith("Hi there"));
  EXPECT_THAT(reply["choices"][2]["text"].get<std::string>(), ::testing::StartsWith("Compute 1"));
  const auto requests = generations_->requests();
  ASSERT_EQ(requests.size(), 6u);
  int64_t tokens = 0;
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(requests[i].choice, i % 2) << "with one seed, each prompt draws what it draws alone";
    EXPECT_EQ(requests[i].prompt_ids, requests[i - i % 2].prompt_ids);
    if (i % 2 == 0) tokens += static_cast<int64_t>(requests[i].prompt_ids.size());
  }
  EXPECT_THAT(requests[4].prompt_ids, ElementsAre(40, 41, 42));
  EXPECT_EQ(reply["usage"]["prompt_tokens"], tokens);

  const auto events = Events(AskCompletion(R"(,"prompt":["Hi","Ho"],"stream":true,"echo":true)").body);
  EXPECT_EQ(Joined(events, "text", 0), "HiHello world");
  EXPECT_EQ(Joined(events, "text", 1), "HoHello world");
  EXPECT_EQ(events.back(), "[DONE]");
}

}  // namespace
}  // namespace millrace::router
