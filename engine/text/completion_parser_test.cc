// SPDX-License-Identifier: Apache-2.0
// What comes out does not depend on how the text was cut, and no markup is ever part of it.
#include "engine/text/completion_parser.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "engine/text/chat_encoding.h"
#include "engine/text/python_json.h"

namespace millrace::text {
namespace {

struct Call {
  std::string name, arguments;
  bool operator==(const Call&) const = default;
  friend std::ostream& operator<<(std::ostream& os, const Call& call) { return os << call.name << call.arguments; }
};

struct Outcome {
  std::string reasoning, content;
  std::vector<Call> calls;
  std::string error;
  bool operator==(const Outcome&) const = default;
  friend std::ostream& operator<<(std::ostream& os, const Outcome& o) {
    return os << "reasoning " << testing::PrintToString(o.reasoning) << " content " << testing::PrintToString(o.content)
              << " calls " << testing::PrintToString(o.calls) << " error " << o.error;
  }
};

Outcome ParseAll(const std::vector<std::string>& pieces, ParserOptions options) {
  CompletionParser parser(options);
  Outcome outcome;
  const auto take = [&](const CompletionDelta& delta) {
    outcome.reasoning += delta.reasoning;
    outcome.content += delta.content;
    for (const ToolCallDelta& call : delta.tool_calls) {
      EXPECT_EQ(call.starts, static_cast<size_t>(call.index) == outcome.calls.size()) << "one start per call, in order";
      if (call.starts) outcome.calls.push_back({call.name, ""});
      outcome.calls.back().arguments += call.arguments;
    }
  };
  for (const std::string& piece : pieces) take(parser.Push(piece));
  take(parser.Finish());
  outcome.error = std::string(parser.status().message());
  EXPECT_EQ(parser.num_tool_calls(), static_cast<int>(outcome.calls.size()));
  return outcome;
}

std::string Invoke(const std::string& name, const std::string& parameters) {
  return "<｜DSML｜invoke name=\"" + name + "\">\n" + parameters + "</｜DSML｜invoke>\n";
}
std::string Parameter(const std::string& name, const std::string& value, bool is_string) {
  return "<｜DSML｜parameter name=\"" + name + "\" string=\"" + (is_string ? "true" : "false") + "\">" + value +
         "</｜DSML｜parameter>\n";
}
std::string Block(const std::string& calls) { return "<｜DSML｜tool_calls>\n" + calls + "</｜DSML｜tool_calls>"; }

const std::string kWeather = Invoke("get_weather", Parameter("city", "Delhi", true));
const Call kWeatherCall = {"get_weather", R"({"city": "Delhi"})"};

struct Case {
  const char* name;
  std::string text;
  ParserOptions options;
  Outcome expected;
};

std::vector<Case> Cases() {
  const ParserOptions chat, thinking{.thinking = true}, no_tools{.parse_tools = false};
  const std::string cut =
      "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\" string=\"";
  return {
      {"plain", "Hello.", chat, {"", "Hello.", {}, ""}},
      {"empty", "", thinking, {"", "", {}, ""}},
      {"thought and answer", "Hm.\n</think>\n\nYes.", thinking, {"Hm.\n", "\n\nYes.", {}, ""}},
      {"empty thought", "</think>Yes.", thinking, {"", "Yes.", {}, ""}},
      {"thought without end", "Hm, </thin", thinking, {"Hm, </thin", "", {}, ""}},
      {"think tag in chat is text", "a</think>b", chat, {"", "a</think>b", {}, ""}},
      {"line breaks stay", "a\n\n\nb\n\n", chat, {"", "a\n\n\nb\n\n", {}, ""}},
      {"angle brackets stay", "a < b <｜ </ <</｜D", chat, {"", "a < b <｜ </ <</｜D", {}, ""}},
      {"call", "\n\n" + Block(kWeather), chat, {"", "", {kWeatherCall}, ""}},
      {"content, call", "Let me see.\n\n" + Block(kWeather), chat, {"", "Let me see.", {kWeatherCall}, ""}},
      {"only the blank line is markup", "a\n\n\n" + Block(kWeather), chat, {"", "a\n", {kWeatherCall}, ""}},
      {"no blank line", "a" + Block(kWeather), chat, {"", "a", {kWeatherCall}, ""}},
      {"thought, call", "I look.</think>\n\n" + Block(kWeather), thinking, {"I look.", "", {kWeatherCall}, ""}},
      {"call before the end of the thought",
       "I look.\n\n" + Block(kWeather),
       thinking,
       {"I look.", "", {kWeatherCall}, ""}},
      {"two calls", Block(kWeather + Invoke("g", "")), chat, {"", "", {kWeatherCall, {"g", "{}"}}, ""}},
      {"call without arguments", Block(Invoke("g", "\n")), chat, {"", "", {{"g", "{}"}}, ""}},
      {"no outer tag", "a\n\n" + kWeather, chat, {"", "a", {kWeatherCall}, ""}},
      {"no outer tag, then text", kWeather + "and more", chat, {"", "and more", {kWeatherCall}, ""}},
      {"two blocks", Block(kWeather) + "\n\n" + Block(kWeather), chat, {"", "", {kWeatherCall, kWeatherCall}, ""}},
      {"text after a block", Block(kWeather) + "\n done. \n", chat, {"", "done. \n", {kWeatherCall}, ""}},
      {"block without its end", "\n\n<｜DSML｜tool_calls>\n" + kWeather, chat, {"", "", {kWeatherCall}, ""}},
      {"kinds of values",
       Block(Invoke("f", Parameter("i", "-3", false) + Parameter("o", R"({"a":[1, 2]})", false) +
                             Parameter("s", "a\n\"b\" \\ é </x> <｜D", true) + Parameter("e", "", true))),
       chat,
       {"", "", {{"f", R"({"i": -3, "o": {"a":[1, 2]}, "s": "a\n\"b\" \\ é </x> <｜D", "e": ""})"}}, ""}},
      {"value that is not JSON becomes a string",
       Block(Invoke("f", Parameter("i", "three", false))),
       chat,
       {"", "", {{"f", R"({"i": "three"})"}}, ""}},
      {"parameter given twice",
       Block(Invoke("f", Parameter("i", "1", false) + Parameter("i", "2", false))),
       chat,
       {"", "", {{"f", R"({"i": 1})"}}, "tool call 0 (f): a parameter given twice"}},
      {"rubbish in a block",
       "a\n\n<｜DSML｜tool_calls>\nrubbish" + kWeather + "</｜DSML｜tool_calls>b",
       chat,
       {"", "ab", {}, "tool call: expected a call or the end of the block"}},
      {"rubbish in a call",
       Block("<｜DSML｜invoke name=\"f\">\nrubbish</｜DSML｜invoke>"),
       chat,
       {"", "", {{"f", "{}"}}, "tool call 0 (f): expected a parameter or the end of the call"}},
      {"call without a name",
       Block("<｜DSML｜invoke>\n" + Parameter("a", "1", false)),
       chat,
       {"", "", {}, "tool call: a call without a name"}},
      {"parameter without a type is a string",
       Block(Invoke("f", "<｜DSML｜parameter name=\"a\">1</｜DSML｜parameter>")),
       chat,
       {"", "", {{"f", R"({"a": "1"})"}}, ""}},
      {"stray tags are taken out",
       "a</｜DSML｜invoke> b<｜DSML｜parameter name=\"x\" string=\"true\">c\n｜DSML｜d>",
       chat,
       {"", "a bc\n", {}, "tool call: a tag outside of a block"}},
      {"cut in a tag", "a\n\n<｜DSML｜tool", chat, {"", "a", {}, "tool call: the text ended in a tag"}},
      {"cut before the marker", "a\n\n<", chat, {"", "a\n\n<", {}, ""}},
      {"cut in a header",
       "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f",
       chat,
       {"", "", {}, "tool call: the text ended in a call"}},
      {"cut in a string",
       cut + "true\">Del</",
       chat,
       {"", "", {{"f", R"({"a": "Del</)"}}, "tool call 0 (f): the text ended in a parameter"}},
      {"cut in an end tag",
       cut + "true\">Del</｜DSML｜para",
       chat,
       {"", "", {{"f", R"({"a": "Del)"}}, "tool call 0 (f): the text ended in a parameter"}},
      {"cut in JSON",
       cut + "false\">[1, 2",
       chat,
       {"", "", {{"f", R"({"a": )"}}, "tool call 0 (f): the text ended in a parameter"}},
      {"tools not parsed", "a\n\n" + Block(kWeather), no_tools, {"", "a\n\n" + Block(kWeather), {}, ""}},
  };
}

TEST(CompletionParser, ReadsEachCase) {
  for (const Case& test : Cases()) EXPECT_EQ(ParseAll({test.text}, test.options), test.expected) << test.name;
}

TEST(CompletionParser, EverySplitInTwoAndInThreeGivesTheSame) {
  for (const Case& test : Cases()) {
    const std::string& text = test.text;
    for (size_t i = 0; i <= text.size(); ++i) {
      ASSERT_EQ(ParseAll({text.substr(0, i), text.substr(i)}, test.options), test.expected) << test.name << " at " << i;
      // The second cut near the first: markers are short.
      for (size_t j = i + 1; j < std::min(i + 9, text.size()); ++j) {
        ASSERT_EQ(ParseAll({text.substr(0, i), text.substr(i, j - i), text.substr(j)}, test.options), test.expected)
            << test.name << " at " << i << " and " << j;
      }
    }
  }
}

TEST(CompletionParser, OneByteAtATimeGivesTheSame) {
  for (const Case& test : Cases()) {
    std::vector<std::string> pieces;
    for (const char c : test.text) pieces.emplace_back(1, c);
    EXPECT_EQ(ParseAll(pieces, test.options), test.expected) << test.name;
  }
}

// Random texts made of markup and its pieces: any cutting equals the whole, no marker leaks, arguments of calls that
// ended are JSON.
TEST(CompletionParser, RandomMarkupNeverLeaksAndNeverDependsOnTheCuts) {
  const std::vector<std::string> parts = {"<｜DSML｜tool_calls>",
                                          "</｜DSML｜tool_calls>",
                                          "<｜DSML｜invoke name=\"f\">",
                                          "</｜DSML｜invoke>",
                                          "\n",
                                          "\n\n",
                                          " ",
                                          "<｜DSML｜parameter name=\"a\" string=\"true\">",
                                          "<｜DSML｜parameter name=\"b\" string=\"false\">",
                                          "</｜DSML｜parameter>",
                                          "</think>",
                                          "text",
                                          "<",
                                          "</",
                                          "｜DSML｜",
                                          "\"",
                                          ">",
                                          "7",
                                          "<｜DSML｜",
                                          "｜",
                                          "é"};
  uint32_t x = 99;
  const auto random = [&](uint32_t bound) {
    x = x * 1664525 + 1013904223;
    return static_cast<uint32_t>((uint64_t{x} * bound) >> 32);
  };
  for (int round = 0; round < 20000; ++round) {
    std::string text;
    for (uint32_t i = 0, n = 1 + random(12); i < n; ++i) text += parts[random(parts.size())];
    const ParserOptions options{.thinking = random(2) == 1};
    const Outcome whole = ParseAll({text}, options);
    std::vector<std::string> pieces(1);
    for (const char c : text) {
      pieces.back().push_back(c);
      if (random(4) == 0) pieces.emplace_back();
    }
    ASSERT_EQ(ParseAll(pieces, options), whole) << text;
    ASSERT_EQ(whole.content.find("DSML｜"), std::string::npos) << text;
    ASSERT_EQ(whole.reasoning.find("DSML｜"), std::string::npos) << text;
    ASSERT_EQ(whole.reasoning.find("</think>"), std::string::npos) << text;
    if (whole.error.empty()) {
      for (const Call& call : whole.calls) ASSERT_TRUE(ParseJson(call.arguments).ok()) << text << call;
    }
  }
}

TEST(CompletionParser, StringArgumentsStreamAsTheyCome) {
  CompletionParser parser({});
  parser.Push("\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\" string=\"true\">");
  const CompletionDelta delta = parser.Push("Hello ");
  ASSERT_EQ(delta.tool_calls.size(), 1u);
  EXPECT_EQ(delta.tool_calls[0].arguments, "Hello ");
  EXPECT_FALSE(delta.tool_calls[0].starts);
}

TEST(CompletionParser, ContentIsNotHeldLongerThanNeeded) {
  CompletionParser parser({});
  EXPECT_EQ(parser.Push("a\n\n").content, "a");
  EXPECT_EQ(parser.Push("<").content, "");
  EXPECT_EQ(parser.Push("b").content, "\n\n<b");
}

TEST(CompletionParser, EndlessHeaderIsGivenUpNotBuffered) {
  CompletionParser parser({});
  parser.Push("<｜DSML｜invoke name=\"");
  for (int i = 0; i < 5000; ++i) parser.Push("x");
  EXPECT_FALSE(parser.status().ok());
}

TEST(CompletionParser, EncodedTurnsReadBackAsTheyWere) {
  std::ifstream in("tests/data/demo/golden_greedy.json");
  const Json goldens = Json::parse(in);
  int with_calls = 0;
  for (const Json& golden : goldens) {
    if (golden.contains("fim")) continue;
    std::string text = golden["text"].get<std::string>();
    text.resize(text.find(kEos));
    const Outcome outcome = ParseAll({text}, {.thinking = golden["thinking"].get<bool>()});
    EXPECT_EQ(outcome.error, "") << text;
    with_calls += !outcome.calls.empty();

    // Rendering the parsed answer gives the text again.
    Json message = {{"role", "assistant"}, {"reasoning_content", outcome.reasoning}, {"content", outcome.content}};
    for (const Call& call : outcome.calls) {
      message["tool_calls"].push_back({{"function", {{"name", call.name}, {"arguments", call.arguments}}}});
    }
    ChatOptions options;
    options.thinking = golden["thinking"].get<bool>();
    options.add_bos = false;
    EXPECT_EQ(PromptString(*EncodeMessages(Json::array({message}), options)), text + std::string(kEos));
  }
  EXPECT_EQ(with_calls, 4);
}

}  // namespace
}  // namespace millrace::text
