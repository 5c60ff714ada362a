// SPDX-License-Identifier: Apache-2.0
// The fields of a request: which are refused and how, and that what is accepted reaches the engine as written.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "services/router/openai_api_fixture.h"

namespace millrace::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST_F(OpenAiApiTest, ChatFieldsOutOfRangeAreRefusedByName) {
  struct Case {
    std::string members;
    std::string param;
    std::string code;
  };
  std::string many_messages, many_tools, many_stops, many_bias;
  for (int i = 0; i < 1025; ++i) absl::StrAppend(&many_bias, i ? "," : "", "\"", i, "\":1");
  for (int i = 0; i < 129; ++i) {
    absl::StrAppend(&many_tools, i ? "," : "", R"({"type":"function","function":{"name":"f)", i, "\"}}");
  }
  const auto tool = [](const std::string& function) {
    return R"(,"tools":[{"type":"function","function":)" + function + "}]";
  };
  std::string deep = "1";
  for (int i = 0; i < 17; ++i) deep = "{\"a\":" + deep + "}";
  const Case cases[] = {
      {R"(,"max_tokens":0)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":-1)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":2147483648)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":1.5)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":"10")", "max_tokens", "invalid_type"},
      {R"(,"max_tokens":5,"max_completion_tokens":6)", "max_tokens", "invalid_value"},
      {R"(,"max_tokens":2048)", "", "context_length_exceeded"},
      {R"(,"temperature":-0.1)", "temperature", "invalid_value"},
      {R"(,"temperature":2.1)", "temperature", "invalid_value"},
      {R"(,"temperature":"hot")", "temperature", "invalid_type"},
      {R"(,"temperature":NaN)", "", "invalid_number"},
      {R"(,"temperature":1e999)", "", "invalid_number"},
      {R"(,"top_p":0)", "top_p", "invalid_value"},
      {R"(,"top_p":1.0001)", "top_p", "invalid_value"},
      {R"(,"top_p":-1)", "top_p", "invalid_value"},
      {R"(,"top_k":-2)", "top_k", "invalid_value"},
      {R"(,"top_k":2147483648)", "top_k", "invalid_value"},
      {R"(,"min_p":2)", "min_p", "invalid_value"},
      {R"(,"n":0)", "n", "invalid_value"},
      {R"(,"n":9)", "n", "invalid_value"},
      {R"(,"n":1000000)", "n", "invalid_value"},
      {R"(,"stop":["a","b","c","d","e"])", "stop", "too_many_items"},
      {R"(,"stop":"")", "stop", "invalid_value"},
      {R"(,"stop":[""])", "stop[0]", "invalid_value"},
      {R"(,"stop":")" + std::string(257, 's') + "\"", "stop", "invalid_value"},
      {R"(,"stop":5)", "stop", "invalid_type"},
      {R"(,"stop":["a",5])", "stop[1]", "invalid_type"},
      {R"(,"logit_bias":{"1536":1})", "logit_bias['1536']", "invalid_token_id"},
      {R"(,"logit_bias":{"-1":1})", "logit_bias['-1']", "invalid_token_id"},
      {R"(,"logit_bias":{"x":1})", "logit_bias['x']", "invalid_token_id"},
      {R"(,"logit_bias":{"5":101})", "logit_bias['5']", "invalid_value"},
      {R"(,"logit_bias":{"5":-101})", "logit_bias['5']", "invalid_value"},
      {R"(,"logit_bias":{"5":"1"})", "logit_bias['5']", "invalid_type"},
      {R"(,"logit_bias":[1])", "logit_bias", "invalid_type"},
      {",\"logit_bias\":{" + many_bias + "}", "logit_bias", "too_many_items"},
      {R"(,"logprobs":true,"top_logprobs":21)", "top_logprobs", "invalid_value"},
      {R"(,"logprobs":true,"top_logprobs":-1)", "top_logprobs", "invalid_value"},
      {R"(,"top_logprobs":2)", "top_logprobs", "invalid_value"},
      {R"(,"logprobs":1)", "logprobs", "invalid_type"},
      {R"(,"seed":9223372036854775808)", "seed", "invalid_value"},
      {R"(,"seed":-9223372036854775809)", "seed", "invalid_value"},
      {R"(,"seed":1.5)", "seed", "invalid_value"},
      {R"(,"frequency_penalty":2.01)", "frequency_penalty", "invalid_value"},
      {R"(,"presence_penalty":-2.01)", "presence_penalty", "invalid_value"},
      {R"(,"response_format":{"type":"yaml"})", "response_format.type", "invalid_value"},
      {R"(,"response_format":{"type":"json_schema","json_schema":{"schema":{"$ref":"#"}}})", "response_format",
       "invalid_schema"},
      {R"(,"response_format":"json")", "response_format", "invalid_type"},
      {R"(,"reasoning_effort":"ultra")", "reasoning_effort", "invalid_value"},
      {R"(,"reasoning_effort":3)", "reasoning_effort", "invalid_value"},
      {R"(,"thinking":{"type":"sometimes"})", "thinking.type", "invalid_value"},
      {R"(,"chat_template_kwargs":{"thinking":"yes"})", "chat_template_kwargs.thinking", "invalid_value"},
      {",\"tools\":[" + many_tools + "]", "tools", "too_many_items"},
      {R"(,"tools":{})", "tools", "invalid_type"},
      {R"(,"tools":[{"type":"retrieval"}])", "tools[0].type", "invalid_value"},
      {tool("{}"), "tools[0].function.name", "missing_field"},
      {tool(R"({"name":"a<b"})"), "tools[0].function.name", "invalid_value"},
      {tool(R"({"name":"a\nb"})"), "tools[0].function.name", "invalid_value"},
      {tool(R"({"name":"f","parameters":[]})"), "tools[0].function.parameters", "invalid_type"},
      {tool(R"({"name":"f","parameters":)" + deep + "}"), "tools[0].function.parameters", "invalid_schema"},
      {tool(R"({"name":"f","parameters":{"x":")" + std::string(65 << 10, 'd') + "\"}}"), "tools[0].function.parameters",
       "invalid_schema"},
      {R"(,"tools":[{"type":"function","function":{"name":"f"}},{"type":"function","function":{"name":"f"}}])",
       "tools[1].function.name", "duplicate_tool"},
      {R"(,"tool_choice":"required")", "tool_choice", "unsupported_parameter"},
      {R"(,"tool_choice":"perhaps")", "tool_choice", "invalid_value"},
      {R"(,"stream_options":{"include_usage":true})", "stream_options", "invalid_value"},
      {R"(,"stream":1)", "stream", "invalid_type"},
      {R"(,"stream":true,"stream_options":{"include_usage":true,"include_usage":true})", "", "duplicate_key"},
      {R"(,"user":")" + std::string(1 << 20, 'u') + "\"", "user", "string_too_long"},
      {R"(,"metadata":{"a":")" + std::string(1 << 20, 'u') + "\"}", "metadata['a']", "string_too_long"},
      {R"(,"cache_salt":"")", "cache_salt", "invalid_value"},
      {R"(,"cache_salt":5)", "cache_salt", "invalid_type"},
      {R"(,"audio":{})", "audio", "unsupported_parameter"},
      {R"(,"prediction":{"type":"content"})", "prediction", "unsupported_parameter"},
      {R"(,"prompt_embeds":"x")", "prompt_embeds", "unsupported_parameter"},
      {R"(,"modalities":["text","audio"])", "modalities", "unsupported_parameter"},
      {R"(,"min_tokens":20,"max_tokens":10)", "min_tokens", "invalid_value"},
  };
  TestClient client(public_->port());
  for (const auto& test : cases) {
    client.Send(Post("/v1/chat/completions", Chat(test.members)));
    const TestReply reply = client.Read();
    EXPECT_EQ(reply.status, 400) << test.members.substr(0, 100);
    EXPECT_EQ(CodeOf(reply), test.code) << test.members.substr(0, 100) << reply.body;
    EXPECT_EQ(ParamOf(reply), test.param) << test.members.substr(0, 100);
  }
  EXPECT_TRUE(generations_->requests().empty());
  EXPECT_THAT(Ask(Post("/v1/chat/completions", Chat(R"(,"reasoning_effort":"ultra")"))).body,
              HasSubstr("none, minimal, low, medium, high, xhigh or max"));
}

TEST_F(OpenAiApiTest, ModelAndMessagesAreCheckedBeforeAnythingElse) {
  struct Case {
    std::string body;
    int status;
    std::string param;
    std::string code;
  };
  const auto with = [](const std::string& messages) {
    return absl::StrCat(R"({"model":"demo/model","messages":)", messages, "}");
  };
  std::string many = "[";
  for (int i = 0; i < 4097; ++i) absl::StrAppend(&many, i ? "," : "", R"({"role":"user","content":"a"})");
  const std::string messages = R"("messages":[{"role":"user","content":"Hi"}])";
  const Case cases[] = {
      {"{" + messages + "}", 400, "model", "missing_field"},
      {R"({"model":"",)" + messages + "}", 400, "model", "invalid_value"},
      {R"({"model":5,)" + messages + "}", 400, "model", "invalid_type"},
      {R"({"model":")" + std::string(1 << 20, 'm') + "\"," + messages + "}", 400, "model", "string_too_long"},
      {R"({"model":"gpt",)" + messages + "}", 404, "model", "model_not_found"},
      {R"({"model":"demo/model"})", 400, "messages", "missing_field"},
      {with("null"), 400, "messages", "missing_field"},
      {with("[]"), 400, "messages", "invalid_value"},
      {with("{}"), 400, "messages", "invalid_type"},
      {with(many + "]"), 400, "messages", "too_many_items"},
      {with(R"(["x"])"), 400, "messages[0]", "invalid_type"},
      {with(R"([{"content":"x"}])"), 400, "messages[0].role", "missing_field"},
      {with(R"([{"role":"wizard","content":"x"}])"), 400, "messages[0].role", "invalid_value"},
      {with(R"([{"role":"user"}])"), 400, "messages[0].content", "missing_field"},
      {with(R"([{"role":"user","content":null}])"), 400, "messages[0].content", "missing_field"},
      {with(R"([{"role":"user","content":5}])"), 400, "messages[0].content", "invalid_type"},
      {with(R"([{"role":"assistant"}])"), 400, "messages[0].content", "missing_field"},
      {with(R"([{"role":"user","content":"a"},{"role":"tool","content":"x"}])"), 400, "messages[1].tool_call_id",
       "missing_field"},
      {with(R"([{"role":"assistant","tool_calls":{}}])"), 400, "messages[0].tool_calls", "invalid_type"},
      {with(R"([{"role":"assistant","tool_calls":[{"function":{"name":"f"}}]}])"), 400,
       "messages[0].tool_calls[0].function.arguments", "invalid_type"},
      {with(R"([{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://127.0.0.1/"}}]}])"), 400,
       "messages[0].content[0].type", "unsupported_content"},
      {with(R"([{"role":"user","content":[{"type":"input_audio"}]}])"), 400, "messages[0].content[0].type",
       "unsupported_content"},
      {with(R"([{"role":"user","content":[{"type":"text"}]}])"), 400, "messages[0].content[0].text", "invalid_type"},
  };
  for (const auto& test : cases) {
    const TestReply reply = Ask(Post("/v1/chat/completions", test.body));
    EXPECT_EQ(reply.status, test.status) << test.body.substr(0, 100);
    EXPECT_EQ(CodeOf(reply), test.code) << test.body.substr(0, 100);
    EXPECT_EQ(ParamOf(reply), test.param) << test.body.substr(0, 100);
  }
}

TEST_F(OpenAiApiTest, CompletionPromptsAreChecked) {
  struct Case {
    std::string members;
    std::string param;
    std::string code;
  };
  const Case cases[] = {
      {"", "prompt", "missing_field"},
      {R"(,"prompt":"")", "prompt", "empty_prompt"},
      {R"(,"prompt":[])", "prompt", "empty_prompt"},
      {R"(,"prompt":[1,-1])", "prompt[1]", "invalid_token_id"},
      {R"(,"prompt":[1536])", "prompt[0]", "invalid_token_id"},
      {R"(,"prompt":[2147483648])", "prompt[0]", "invalid_token_id"},
      {R"(,"prompt":[9223372036854775808])", "prompt[0]", "invalid_token_id"},
      {R"(,"prompt":[1.5])", "prompt[0]", "invalid_token_id"},
      {R"(,"prompt":[1,"a"])", "prompt[1]", "invalid_token_id"},
      {R"(,"prompt":{})", "prompt", "invalid_type"},
      {R"(,"prompt":"a","n":3,"best_of":2)", "best_of", "invalid_value"},
      {R"(,"prompt":"a","logprobs":21)", "logprobs", "invalid_value"},
      {R"(,"prompt":"a","suffix":5)", "suffix", "invalid_type"},
  };
  for (const auto& test : cases) {
    const TestReply reply = AskCompletion(test.members);
    EXPECT_EQ(reply.status, 400) << test.members;
    EXPECT_EQ(CodeOf(reply), test.code) << test.members;
    EXPECT_EQ(ParamOf(reply), test.param) << test.members;
  }
}

TEST_F(OpenAiApiTest, PromptsFillTheContextToTheLastToken) {
  const auto ask = [&](size_t prompt, int max_tokens) {
    std::vector<int> ids(prompt, 100);
    return AskCompletion(absl::StrCat(",\"prompt\":[", absl::StrJoin(ids, ","), "],\"max_tokens\":", max_tokens));
  };
  EXPECT_EQ(ask(kContext - 1, 1).status, 200);
  EXPECT_EQ(CodeOf(ask(kContext - 1, 2)), "context_length_exceeded");
  EXPECT_EQ(CodeOf(ask(kContext, 1)), "context_length_exceeded");
  EXPECT_EQ(CodeOf(ask(kContext * 10, 1)), "context_length_exceeded");
  const TestReply reply = AskCompletion(absl::StrCat(R"(,"prompt":")", std::string(1 << 20, 'a'), "\""));
  EXPECT_EQ(CodeOf(reply), "context_length_exceeded");
  EXPECT_THAT(reply.body, HasSubstr("2048 tokens"));
}

TEST_F(OpenAiApiTest, TheServersOutputLimitIsACapAndTheDefaultIsApart) {
  max_tokens_limit_ = 100, default_max_tokens_ = 40;
  StartServers();
  const TestReply over = AskChat(R"(,"max_tokens":101)");
  EXPECT_EQ(over.status, 400);
  EXPECT_EQ(CodeOf(over), "invalid_value");
  EXPECT_EQ(ParamOf(over), "max_tokens");
  EXPECT_THAT(over.body, HasSubstr("limit is 100"));
  EXPECT_EQ(ParamOf(AskChat(R"(,"max_completion_tokens":101)")), "max_completion_tokens");
  EXPECT_EQ(AskCompletion(R"(,"prompt":"a","max_tokens":101)").status, 400);
  const auto asked = [&](const TestReply& reply) {
    EXPECT_EQ(reply.status, 200) << reply.body;
    return generations_->requests().back().max_tokens;
  };
  EXPECT_EQ(asked(AskChat(R"(,"max_tokens":100)")), 100);
  EXPECT_EQ(asked(AskChat()), 40);
  EXPECT_EQ(asked(AskCompletion(R"(,"prompt":"a")")), 16);
  max_tokens_limit_ = 10, default_max_tokens_ = 0;
  StartServers();
  EXPECT_EQ(asked(AskChat()), 10);
  EXPECT_EQ(asked(AskCompletion(R"(,"prompt":"a")")), 10);
}

TEST_F(OpenAiApiTest, AcceptedFieldsReachTheEngineAsWritten) {
  const TestReply reply = AskChat(
      R"(,"max_completion_tokens":1e2,"min_tokens":3,"ignore_eos":true,"temperature":1e-40,"top_p":0.5,"top_k":-1,)"
      R"("min_p":0.1,"seed":-9223372036854775808,"frequency_penalty":-0.0,"presence_penalty":2,)"
      R"("repetition_penalty":1.1,"logit_bias":{"7":-100,"3":100},"logprobs":true,"top_logprobs":2,"stop":null,)"
      R"("cache_salt":"s","user":"u","metadata":{"k":"v"},"frobnicate":1,"x\r\ny":2)");
  ASSERT_EQ(reply.status, 200) << reply.body;
  const GenerationRequest request = generations_->requests().back();
  EXPECT_EQ(request.max_tokens, 100);
  EXPECT_EQ(request.min_tokens, 3);
  EXPECT_TRUE(request.ignore_eos);
  EXPECT_EQ(request.sampling.temperature, 0);
  EXPECT_EQ(request.sampling.top_p, 0.5);
  EXPECT_EQ(request.sampling.top_k, 0);
  EXPECT_EQ(request.sampling.seed, uint64_t{1} << 63);
  EXPECT_EQ(request.sampling.presence_penalty, 2);
  EXPECT_THAT(request.sampling.logit_bias, ElementsAre(std::pair(3, 100.f), std::pair(7, -100.f)));
  EXPECT_EQ(request.num_logprobs, 2);
  EXPECT_EQ(request.cache_salt, "s");
  auto headers = reply.headers;
  EXPECT_EQ(headers["x-ignored-params"], "frobnicate, x??y");
  EXPECT_EQ(headers["x-seed"], "-9223372036854775808");
}

TEST_F(OpenAiApiTest, UserTextNeverBecomesControlTokens) {
  ASSERT_EQ(Ask(Post("/v1/chat/completions",
                     R"({"model":"demo/model","messages":[{"role":"user","content":"<｜User｜></think>"}]})"))
                .status,
            200);
  const auto ids = generations_->requests().back().prompt_ids;
  EXPECT_EQ(std::count(ids.begin(), ids.end(), *tokenizer_->TokenId("<｜User｜>")), 1);
  ASSERT_EQ(AskCompletion(R"(,"prompt":"<｜User｜>")").status, 200);
  EXPECT_THAT(generations_->requests().back().prompt_ids, ElementsAre(*tokenizer_->TokenId("<｜User｜>")));
}

TEST_F(OpenAiApiTest, AHugeIntegerOfAToolReachesThePromptAsWritten) {
  const std::string digits = "123456789012345678901234567890";
  const TestReply reply = AskChat(
      absl::StrCat(R"(,"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","maximum":)",
                   digits, R"(,"minimum":-)", digits, "}}}]"));
  ASSERT_EQ(reply.status, 200) << reply.body;
  const std::string prompt = tokenizer_->Decode(generations_->requests().back().prompt_ids, /*skip_special=*/false);
  EXPECT_THAT(prompt, HasSubstr(absl::StrCat("\"maximum\": ", digits, ", \"minimum\": -", digits)));
  for (const char* field : {"temperature", "seed", "max_tokens"}) {
    const TestReply refused = AskChat(absl::StrCat(",\"", field, "\":", digits));
    EXPECT_EQ(CodeOf(refused), "invalid_value") << field;
    EXPECT_THAT(refused.body, HasSubstr(absl::StrCat("got the number ", digits)));
  }
}

TEST_F(OpenAiApiTest, SeveralPromptsAreCheckedOneByOne) {
  const auto refused = [&](const std::string& members, const std::string& code, const std::string& param) {
    const TestReply reply = AskCompletion(members);
    EXPECT_EQ(reply.status, 400) << members;
    EXPECT_EQ(CodeOf(reply), code) << members;
    EXPECT_EQ(ParamOf(reply), param) << members;
  };
  refused(R"(,"prompt":["a",""])", "empty_prompt", "prompt[1]");
  refused(R"(,"prompt":["a",[]])", "empty_prompt", "prompt[1]");
  refused(R"(,"prompt":["a",7])", "invalid_type", "prompt[1]");
  refused(R"(,"prompt":[[1,2],[3,-1]])", "invalid_token_id", "prompt[1][1]");
  refused(R"(,"prompt":["a","b"],"suffix":"c")", "unsupported_parameter", "suffix");
  refused(absl::StrCat(R"(,"prompt":[)", absl::StrJoin(std::vector<std::string>(33, R"("a")"), ","), "]"),
          "too_many_items", "prompt");
  refused(absl::StrCat(R"(,"n":8,"prompt":[)", absl::StrJoin(std::vector<std::string>(9, R"("a")"), ","), "]"),
          "too_many_items", "prompt");
  refused(absl::StrCat(R"(,"max_tokens":10,"prompt":["a",[)", absl::StrJoin(std::vector<int>(kContext - 5, 100), ","),
                       "]]"),
          "context_length_exceeded", "");
  EXPECT_TRUE(generations_->requests().empty());
}

}  // namespace
}  // namespace millrace::router
