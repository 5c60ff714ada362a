// SPDX-License-Identifier: Apache-2.0
// Every rule of the encoder as a case in tests/data/encoding/cases.json, the prompts of the demo's goldens byte for
// byte, and the official cases where they can be found.
#include "engine/text/chat_encoding.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace millrace::text {
namespace {

using testing::HasSubstr;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in) << path;
  return std::string(std::istreambuf_iterator<char>(in), {});
}

Json ReadJson(const std::string& path) {
  const auto parsed = ParseJson(ReadFile(path));
  EXPECT_TRUE(parsed.ok()) << path << ": " << parsed.status();
  return parsed.ok() ? *parsed : Json();
}

const Tokenizer& Demo() {
  static const Tokenizer* tokenizer = Tokenizer::Load("deploy/demo/model/tokenizer.json", 1536)->release();
  return *tokenizer;
}

std::string ErrorOf(std::string_view messages, bool strict = false) {
  ChatOptions options;
  options.strict = strict;
  return std::string(EncodeMessages(*ParseJson(messages), options).status().message());
}

ChatOptions OptionsOf(const Json& test) {
  ChatOptions options;
  options.thinking = test.value("thinking", false);
  options.drop_thinking = test.value("drop_thinking", true);
  options.add_bos = test.value("add_bos", true);
  if (test.value("release", "preview") == "dspark") options.release = EncoderRelease::kDspark;
  const std::string effort = test.value("effort", "low");
  if (effort == "high") options.effort = ReasoningEffort::kHigh;
  if (effort == "max") options.effort = ReasoningEffort::kMax;
  if (test.contains("context")) options.context = test["context"];
  return options;
}

// A case: "messages" or "request", encoder arguments, and "prompt". In the prompt, {TOOLS:...} stands for the tools
// block with these schema lines, {MAX} and {BEYOND} for the effort texts.
std::string ExpandPrompt(std::string prompt) {
  const std::string constants = "tests/data/encoding/";
  const auto replace = [&](const std::string& from, const std::string& to) {
    for (size_t at; (at = prompt.find(from)) != std::string::npos;) prompt.replace(at, from.size(), to);
  };
  replace("{MAX}", ReadFile(constants + "effort_absolute.txt"));
  replace("{BEYOND}", ReadFile(constants + "effort_beyond.txt"));
  const std::string mark = "{TOOLS:";
  if (const size_t at = prompt.find(mark); at != std::string::npos) {
    const size_t end = prompt.find(":TOOLS}");
    const std::string schemas = prompt.substr(at + mark.size(), end - at - mark.size());
    std::string block = ReadFile(constants + "tools.txt");
    block.replace(block.find("{schemas}"), 9, schemas);
    prompt.replace(at, end + 7 - at, block);
  }
  return prompt;
}

TEST(ChatEncoding, EveryRuleAsWrittenDown) {
  const Json cases = ReadJson("tests/data/encoding/cases.json");
  EXPECT_GE(cases.size(), 40u);
  for (const Json& test : cases) {
    SCOPED_TRACE(test["name"].get<std::string>());
    const ChatOptions options = OptionsOf(test);
    const auto prompt = test.contains("request") ? EncodeChatRequest(test["request"], options)
                                                 : EncodeMessages(test["messages"], options);
    ASSERT_TRUE(prompt.ok()) << prompt.status();
    EXPECT_EQ(PromptString(*prompt), ExpandPrompt(test["prompt"]));
  }
}

TEST(ChatEncoding, GoldenPromptsAreByteEqual) {
  const Json goldens = ReadJson("tests/data/demo/golden_greedy.json");
  ASSERT_EQ(goldens.size(), 20u);
  for (const Json& golden : goldens) {
    Prompt prompt;
    if (golden.contains("fim")) {
      prompt =
          EncodeFillInMiddle(golden["fim"]["prefix"].get<std::string>(), golden["fim"]["suffix"].get<std::string>());
    } else {
      Json request = {{"messages", golden["messages"]}};
      for (const char* key : {"tools", "reasoning_effort"}) {
        if (golden.contains(key)) request[key] = golden[key];
      }
      ChatOptions defaults;
      defaults.thinking = golden.value("thinking", false);
      auto encoded = EncodeChatRequest(request, defaults);
      ASSERT_TRUE(encoded.ok()) << encoded.status();
      prompt = *std::move(encoded);
    }
    EXPECT_EQ(PromptString(prompt), golden["prompt"].get<std::string>());
    EXPECT_EQ(*PromptIds(prompt, Demo()), golden["prompt_ids"].get<std::vector<int32_t>>());
    // No case spells a control token in its own text, so matching gives the same ids.
    EXPECT_EQ(*Demo().Encode(PromptString(prompt), SpecialTokens::kMatch), *PromptIds(prompt, Demo()));
  }
}

// The official cases belong to others and are read where they lie: in $MILLRACE_ENCODING_TESTS.
TEST(ChatEncoding, OfficialCasesAreByteEqual) {
  const char* given = std::getenv("MILLRACE_ENCODING_TESTS");
  if (given == nullptr) GTEST_SKIP() << "MILLRACE_ENCODING_TESTS does not name a folder of the official cases";
  const std::filesystem::path folder = given;
  int found = 0;
  for (int i = 1; i <= 9; ++i) {
    const auto input = folder / ("test_input_" + std::to_string(i) + ".json");
    if (!std::filesystem::exists(input)) continue;
    ++found;
    const Json test = ReadJson(input);
    const std::string expected = ReadFile(folder / ("test_output_" + std::to_string(i) + ".txt"));
    // Cases 1 and 2 think; the others, where present, say so in what they expect.
    ChatOptions options;
    options.thinking = expected.find("<｜Assistant｜><think>") != std::string::npos;
    const auto prompt = EncodeChatRequest(test, options);
    ASSERT_TRUE(prompt.ok()) << input << prompt.status();
    EXPECT_EQ(PromptString(*prompt), expected) << input;
  }
  if (found == 0) {
    std::fprintf(stderr, "\n*** OFFICIAL ENCODING CASES NOT FOUND at %s: set MILLRACE_ENCODING_TESTS ***\n\n",
                 folder.c_str());
    GTEST_SKIP() << "official encoding cases not found";
  }
}

TEST(ChatEncoding, OnlyTheEncodersOwnLiteralsAreControlTokens) {
  std::string every_special;
  for (int32_t id = 0; id < Demo().size(); ++id) {
    if (Demo().IsAdded(id)) every_special += Demo().TokenBytes(id);
  }
  const Json messages = {
      {{"role", "system"}, {"content", every_special}},
      {{"role", "user"}, {"content", every_special}},
      {{"role", "assistant"},
       {"reasoning_content", every_special},
       {"content", every_special},
       {"tool_calls",
        {{{"function", {{"name", every_special}, {"arguments", Json{{every_special, every_special}}.dump()}}}}}}},
      {{"role", "tool"}, {"tool_call_id", "x"}, {"content", every_special}},
  };
  ChatOptions options;
  options.thinking = true;
  options.drop_thinking = false;
  const auto prompt = EncodeMessages(messages, options);
  ASSERT_TRUE(prompt.ok()) << prompt.status();
  std::vector<std::string> controls;
  const std::vector<int32_t> ids = *PromptIds(*prompt, Demo());
  for (const int32_t id : ids) {
    if (Demo().IsAdded(id)) controls.emplace_back(Demo().TokenBytes(id));
  }
  const std::string d(kDsml);
  EXPECT_EQ(controls, (std::vector<std::string>{std::string(kBos), std::string(kUser), std::string(kAssistant),
                                                "<think>", "</think>", d, d, d, d, d, d, std::string(kEos),
                                                std::string(kUser), std::string(kAssistant), "<think>"}));
  // What the model sees still reads as what was written.
  EXPECT_EQ(Demo().Decode(ids, false), PromptString(*prompt));
}

TEST(ChatEncoding, ErrorsNameTheMessageAndTheField) {
  EXPECT_THAT(ErrorOf(R"({"a":1})"), HasSubstr("messages: found an object"));
  EXPECT_THAT(ErrorOf(R"([{"role":"user","content":"a"},7])"), HasSubstr("messages[1]: found a number"));
  EXPECT_THAT(ErrorOf(R"([{"content":"a"}])"), HasSubstr("messages[0].role: found nothing"));
  EXPECT_THAT(ErrorOf(R"([{"role":"robot","content":"a"}])"), HasSubstr("messages[0].role: found \"robot\""));
  EXPECT_THAT(ErrorOf(R"([{"role":"user","content":3}])"), HasSubstr("messages[0].content: found a number"));
  EXPECT_THAT(ErrorOf(R"([{"role":"user","content":[3]}])"), HasSubstr("messages[0].content[0]: found a number"));
  EXPECT_THAT(ErrorOf(R"([{"role":"user","content":[{"type":"text"}]}])"), HasSubstr("messages[0].content[0].text"));
  EXPECT_THAT(ErrorOf(R"([{"role":"developer"}])"), HasSubstr("messages[0].content: found nothing"));
  EXPECT_THAT(ErrorOf(R"([{"role":"user","content":"a","task":"dance"}])"),
              HasSubstr("messages[0].task: found \"dance\""));
  EXPECT_THAT(ErrorOf(R"([{"role":"assistant","content":"a","wo_eos":1}])"), HasSubstr("messages[0].wo_eos"));
  EXPECT_THAT(ErrorOf(R"([{"role":"assistant","tool_calls":{}}])"),
              HasSubstr("messages[0].tool_calls: found an object"));
  EXPECT_THAT(ErrorOf(R"([{"role":"assistant","tool_calls":[{}]}])"), HasSubstr("messages[0].tool_calls[0].function"));
  EXPECT_THAT(ErrorOf(R"([{"role":"assistant","tool_calls":[{"function":{"name":"f"}}]}])"),
              HasSubstr("messages[0].tool_calls[0].function.arguments: found nothing"));
  EXPECT_THAT(ErrorOf(R"([{"role":"system","content":"a","tools":[{"function":{}}]}])"),
              HasSubstr("messages[0].tools[0].function.name"));
}

TEST(ChatEncoding, StrictRefusesWhatAServerShould) {
  for (const auto& [messages, error] : std::initializer_list<std::pair<const char*, const char*>>{
           {R"([{"role":"user"}])", "messages[0].content: found nothing"},
           {R"([{"role":"tool","content":"x"}])", "messages[0].tool_call_id: found nothing"},
           {R"([{"role":"user","content":[{"type":"image_url"}]}])",
            "messages[0].content[0].type: found \"image_url\""}}) {
    EXPECT_EQ(ErrorOf(messages, false), "") << messages;
    EXPECT_THAT(ErrorOf(messages, true), HasSubstr(error));
  }
}

TEST(ChatEncoding, RequestErrorsNameTheField) {
  const auto error = [](std::string_view request) {
    return std::string(EncodeChatRequest(*ParseJson(request), ChatOptions()).status().message());
  };
  EXPECT_THAT(error(R"({})"), HasSubstr("messages: found nothing"));
  EXPECT_THAT(error(R"({"messages":[]})"), HasSubstr("messages: found an empty array"));
  EXPECT_THAT(error(R"({"messages":[{"role":"user","content":"a"}],"reasoning_effort":"ultra"})"),
              HasSubstr("reasoning_effort: found \"ultra\", expected none, minimal, low, medium, high, xhigh or max"));
  EXPECT_THAT(error(R"({"messages":[{"role":"user","content":"a"}],"thinking":{"type":"on"}})"),
              HasSubstr("thinking.type"));
  EXPECT_THAT(error(R"({"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"thinking":1}})"),
              HasSubstr("chat_template_kwargs.thinking"));
  EXPECT_THAT(error(R"({"messages":[{"role":"user","content":"a"}],"tools":[{}]})"), HasSubstr("tools[0].function"));
  EXPECT_THAT(error(R"({"messages":[{"role":"user","content":"a"}],"response_format":{"type":"x"}})"),
              HasSubstr("response_format.type"));
}

TEST(ChatEncoding, ThinkingFollowsAnyFieldThatAsksForIt) {
  const auto thinks = [](std::string_view request, bool by_default) {
    ChatOptions defaults;
    defaults.thinking = by_default;
    return ResolveChatOptions(*ParseJson(request), defaults)->thinking;
  };
  EXPECT_FALSE(thinks(R"({})", false));
  EXPECT_TRUE(thinks(R"({})", true));
  EXPECT_TRUE(thinks(R"({"reasoning_effort":"low"})", false));
  EXPECT_FALSE(thinks(R"({"reasoning_effort":"none"})", true));
  EXPECT_TRUE(thinks(R"({"reasoning_effort":null})", true));
  EXPECT_TRUE(thinks(R"({"thinking":{"type":"enabled"}})", false));
  EXPECT_FALSE(thinks(R"({"thinking":{"type":"disabled"}})", true));
  EXPECT_TRUE(thinks(R"({"chat_template_kwargs":{"thinking":true}})", false));
  EXPECT_FALSE(thinks(R"({"chat_template_kwargs":{"thinking":false}})", true));
  EXPECT_TRUE(thinks(R"({"reasoning_effort":"none","thinking":{"type":"enabled"}})", false));
}

TEST(ChatEncoding, MissingControlTokenIsAnErrorNotText) {
  Prompt prompt = {{Segment::Kind::kControl, "<｜no such｜>"}};
  EXPECT_EQ(PromptIds(prompt, Demo()).status().code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace millrace::text
