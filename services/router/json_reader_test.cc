// SPDX-License-Identifier: Apache-2.0
// The reader accepts what RFC 8259 does and nothing else, names what it refuses, and stays linear and flat on hostile
// input.
#include "services/router/json_reader.h"

#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "services/common/error.h"

namespace millrace::router {
namespace {

std::string CodeOf(std::string_view text, const JsonLimits& limits = {}) {
  const auto json = ReadJson(text, limits);
  return json.ok() ? "ok" : GetApiError(json.status()).value_or(ApiError{.code = "no code"}).code;
}

size_t OffsetOf(std::string_view text) {
  const auto json = ReadJson(text);
  if (json.ok()) return std::string::npos;
  const std::string message(json.status().message());
  return std::stoul(message.substr(message.rfind("at byte ") + 8));
}

TEST(JsonReader, ReadsWhatTheGrammarAllows) {
  const std::string text =
      " {\"a\" : [1, -2, 3.5, 1e3, 1E-2, -0, 0.0e0, true, false, null, {}, [], \"\"], \"\" : \"\\u00e9\\ud83d\\ude00\\n"
      "\\/\", \"\xE2\x80\xA8\":\"\xF0\x9F\x98\x80\x7f\"} \r\n\t";
  const auto json = ReadJson(text);
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ(*json, Json::parse(text));
  EXPECT_EQ((*json)["a"][3], 1000);
  EXPECT_EQ((*json)["a"][5], 0);
}

TEST(JsonReader, KeepsTheOrderOfKeys) {
  EXPECT_EQ(ReadJson(R"({"z":1,"a":2,"m":3})")->dump(), R"({"z":1,"a":2,"m":3})");
}

TEST(JsonReader, KeepsNulAndSeparatorsInStrings) {
  const auto json = ReadJson("[\"a\\u0000b\xE2\x80\xA8\"]");
  ASSERT_TRUE(json.ok());
  EXPECT_EQ((*json)[0].get<std::string>(), std::string("a\0b\xE2\x80\xA8", 6));
}

TEST(JsonReader, RefusesWithACode) {
  const std::pair<std::string, std::string> cases[] = {
      {"", "invalid_json"},
      {"   ", "invalid_json"},
      {"[1,]", "invalid_json"},
      {"{\"a\":1,}", "invalid_json"},
      {"{'a':1}", "invalid_json"},
      {"{\"a\" 1}", "invalid_json"},
      {"[1 2]", "invalid_json"},
      {"{} x", "invalid_json"},
      {"{}}", "invalid_json"},
      {"// c\n{}", "invalid_json"},
      {"[\"\x01\"]", "invalid_json"},
      {"[\"a\nb\"]", "invalid_json"},
      {"[\"\\x\"]", "invalid_json"},
      {"[True]", "invalid_json"},
      {"\xEF\xBB\xBF{}", "invalid_json"},
      {"[NaN]", "invalid_number"},
      {"[Infinity]", "invalid_number"},
      {"[-Infinity]", "invalid_number"},
      {"[1e999]", "invalid_number"},
      {"[1E400]", "invalid_number"},
      {"[1.]", "invalid_number"},
      {"[.5]", "invalid_number"},
      {"[01]", "invalid_number"},
      {"[+1]", "invalid_number"},
      {"[0x1F]", "invalid_number"},
      {"[-]", "invalid_number"},
      {absl::StrCat("[", std::string(10'000, '7'), "]"), "invalid_number"},
      {"[\"\x80\"]", "invalid_utf8"},
      {"[\"\xC0\x80\"]", "invalid_utf8"},
      {"[\"\xF5\x80\x80\x80\"]", "invalid_utf8"},
      {"[\"\xFF\"]", "invalid_utf8"},
      {"[\"\xED\xA0\x80\"]", "invalid_utf8"},
      {"[\"\xE2\x82\"]", "invalid_utf8"},
      {"[\"\\uD800\"]", "invalid_unicode_escape"},
      {"[\"\\uDC00\\uD800\"]", "invalid_unicode_escape"},
      {"[\"\\uD800\\u0041\"]", "invalid_unicode_escape"},
      {"[\"\\u12G4\"]", "invalid_unicode_escape"},
      {R"({"model":1,"model":2})", "duplicate_key"},
      {R"({"a":{"b":1,"c":2,"b":3}})", "duplicate_key"},
      {R"({"a":1,"\u0061":2})", "duplicate_key"},
      {absl::StrCat("{\"", std::string(257, 'k'), "\":1}"), "key_too_long"},
  };
  for (const auto& [text, code] : cases) EXPECT_EQ(CodeOf(text), code) << text.substr(0, 40);
  EXPECT_EQ(CodeOf("[-0.0]"), "ok");
  EXPECT_EQ(CodeOf(absl::StrCat("{\"", std::string(256, 'k'), "\":1}")), "ok");
}

TEST(JsonReader, NamesTheByte) {
  EXPECT_EQ(OffsetOf("[\"ab\xFF\"]"), 4u);
  EXPECT_EQ(OffsetOf("{\"a\":1,\"a\":2}"), 7u);
  EXPECT_EQ(OffsetOf("[1, 2"), 5u);
  EXPECT_EQ(OffsetOf("{} x"), 3u);
}

TEST(JsonReader, EveryTruncationOfAValidRequestIsRefusedAtItsEnd) {
  const std::string text = R"({"model":"m","messages":[{"role":"user","content":"h\u00e9\ud83d\ude00 \"x\""}],)"
                           "\"t\":-1.5e+3,\"b\":[true,false,null],\"e\":\"\xF0\x9F\x98\x80\"}";
  ASSERT_EQ(CodeOf(text), "ok");
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_EQ(CodeOf(text.substr(0, length)), "invalid_json") << length;
    EXPECT_EQ(OffsetOf(text.substr(0, length)), length);
  }
}

// JSONTestSuite's name of a text, and the text.
std::vector<std::pair<std::string, std::string>> TestSuite() {
  std::vector<std::pair<std::string, std::string>> suite;
  std::ifstream in("tests/data/json/json_test_suite.txt");
  const auto decode = [](absl::string_view text) {
    std::string bytes;
    EXPECT_TRUE(absl::Base64Unescape(text, &bytes)) << text;
    return bytes;
  };
  for (std::string line; std::getline(in, line);) {
    if (line.empty() || line[0] == '#') continue;
    const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(line, absl::MaxSplits(' ', 1));
    const auto [name, content] = parts;
    int count = 1;
    absl::string_view piece = content, tail;
    if (const size_t star = content.find('*'); star != absl::string_view::npos) {
      EXPECT_TRUE(absl::SimpleAtoi(content.substr(0, star), &count)) << line;
      const std::pair<absl::string_view, absl::string_view> two = absl::StrSplit(content.substr(star + 1), '+');
      std::tie(piece, tail) = two;
    }
    std::string text;
    for (int i = 0; i < count; ++i) text += decode(piece);
    suite.emplace_back(name, text + decode(tail));
  }
  return suite;
}

TEST(JsonReader, AgreesWithTheWholeOfJsonTestSuite) {
  // What the grammar allows and we do not: a key given twice, and a number of more than 64 characters.
  const std::set<std::string> refused = {"y_object_duplicated_key", "y_object_duplicated_key_and_value",
                                         "y_number_double_close_to_zero"};
  // What the grammar leaves open and we take: integers of any size as they are written, and what rounds to zero.
  const std::set<std::string> taken = {"i_number_too_big_pos_int", "i_number_too_big_neg_int",
                                       "i_number_very_big_negative_int", "i_number_double_huge_neg_exp",
                                       "i_number_real_underflow"};
  std::map<char, int> counts;
  for (const auto& [name, text] : TestSuite()) {
    const bool expected = name[0] == 'y' ? !refused.contains(name) : taken.contains(name);
    EXPECT_EQ(ReadJson(text).ok(), expected) << name << ": " << CodeOf(text);
    ++counts[name[0]];
  }
  EXPECT_EQ(counts, (std::map<char, int>{{'i', 35}, {'n', 188}, {'y', 95}}));
}

TEST(JsonReader, DepthIsBounded) {
  const auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_EQ(CodeOf(nested(32)), "ok");
  EXPECT_EQ(CodeOf(nested(33)), "json_too_deep");
  EXPECT_EQ(CodeOf(std::string(100'000, '[')), "json_too_deep");
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  EXPECT_EQ(CodeOf(objects), "json_too_deep");
}

TEST(JsonReader, SizesAreBounded) {
  EXPECT_EQ(CodeOf("[\"12345\"]", {.max_string_bytes = 4}), "json_too_large");
  EXPECT_EQ(CodeOf("[\"1234\"]", {.max_string_bytes = 4}), "ok");
  EXPECT_EQ(CodeOf("[1,2,3]", {.max_nodes = 4}), "ok");
  EXPECT_EQ(CodeOf("[1,2,3]", {.max_nodes = 3}), "json_too_large");
  EXPECT_EQ(CodeOf(absl::StrCat("\"", std::string((8u << 20) + 1, 'x'), "\"")), "json_too_large");
  std::string many = "[0";
  for (int i = 0; i < 2'000'000; ++i) many += ",0";
  EXPECT_EQ(CodeOf(many + "]"), "json_too_large");
}

TEST(JsonReader, ManyKeysTakeLinearithmicTime) {
  std::string text = "{\"k0\":0";
  for (int i = 1; i < 100'000; ++i) absl::StrAppend(&text, ",\"k", i, "\":0");
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(CodeOf(text + "}"), "ok");
  EXPECT_EQ(CodeOf(text + ",\"k50000\":1}"), "duplicate_key");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));  // quadratic takes minutes
}

}  // namespace
}  // namespace millrace::router
