// SPDX-License-Identifier: Apache-2.0
// Expected strings are what CPython prints for json.dumps(json.loads(x), ensure_ascii=False).
#include "engine/text/python_json.h"

#include <gtest/gtest.h>

#include <string>

namespace millrace::text {
namespace {

std::string Redump(std::string_view text) {
  const auto parsed = ParseJson(text);
  return parsed.ok() ? DumpPythonJson(*parsed) : std::string(parsed.status().message());
}

TEST(PythonJson, SpacingAndKeyOrder) {
  EXPECT_EQ(Redump(R"({"b":[1,2,{"a":null}],"a":true,"c":{},"d":[]})"),
            R"({"b": [1, 2, {"a": null}], "a": true, "c": {}, "d": []})");
  EXPECT_EQ(Redump(R"({"a":1,"b":2,"a":3})"), R"({"a": 3, "b": 2})");
  EXPECT_EQ(Redump(" \"x\" "), R"("x")");
}

TEST(PythonJson, OnlyControlCharactersQuotesAndBackslashesAreEscaped) {
  EXPECT_EQ(Redump(R"("\u00e9\u4f60 \ud83c\udfe0 \/ \" \\ \b\f\n\r\t\u0001\u001f\u007f\u2028")"),
            "\"é你 🏠 / \\\" \\\\ \\b\\f\\n\\r\\t\\u0001\\u001f\x7f\u2028\"");
}

TEST(PythonJson, NumbersAsPythonPrintsThem) {
  for (const auto& [given, expected] : std::initializer_list<std::pair<const char*, const char*>>{
           {"0", "0"},
           {"-0", "0"},
           {"-0.0", "-0.0"},
           {"1.0", "1.0"},
           {"1.10", "1.1"},
           {"1e5", "100000.0"},
           {"1E16", "1e+16"},
           {"123456789012345680.0", "1.2345678901234568e+17"},
           {"9999999999999998.0", "9999999999999998.0"},
           {"0.0001", "0.0001"},
           {"0.00001", "1e-05"},
           {"0.000012345", "1.2345e-05"},
           {"1.5e300", "1.5e+300"},
           {"5e-324", "5e-324"},
           {"0.1", "0.1"},
           {"-2.50", "-2.5"},
           {"3.141592653589793", "3.141592653589793"},
           {"9223372036854775807", "9223372036854775807"},
           {"-9223372036854775808", "-9223372036854775808"},
           {"18446744073709551615", "18446744073709551615"},
           {"123456789012345678901234567890", "123456789012345678901234567890"},
           {"-123456789012345678901234567890", "-123456789012345678901234567890"}}) {
    EXPECT_EQ(Redump(given), expected);
  }
}

TEST(PythonJson, BrokenTextIsAnErrorWithItsPlace) {
  for (const char* broken :
       {"", "{", "[1,]", "{\"a\":}", "nul", "1 2", "\"\xFF\"", "\"\\ud800\"", "1e999", "01", "'a'"}) {
    EXPECT_FALSE(ParseJson(broken).ok()) << broken;
  }
  // The library would take a NUL for the end of the text and never look at what follows.
  EXPECT_FALSE(ParseJson(std::string_view("[1]\0]", 5)).ok());
  EXPECT_NE(std::string(ParseJson("[1, x]").status().message()).find("byte 5"), std::string::npos)
      << ParseJson("[1, x]").status();
}

TEST(PythonJson, DepthIsBoundedAndNeverRecurses) {
  EXPECT_TRUE(ParseJson(std::string(256, '[') + std::string(256, ']')).ok());
  EXPECT_FALSE(ParseJson(std::string(257, '[') + std::string(257, ']')).ok());
  EXPECT_FALSE(ParseJson(std::string(1000000, '[')).ok());
  const auto deep = ParseJson(std::string(200000, '[') + std::string(200000, ']'), 1 << 20);
  ASSERT_TRUE(deep.ok());
  EXPECT_EQ(DumpPythonJson(*deep).size(), 400000u);
}

TEST(PythonJson, ManyKeysTakeLinearTime) {
  std::string text = "{";
  for (int i = 0; i < 200000; ++i) text += "\"key" + std::to_string(i) + "\": 1, ";
  text += "\"key7\": 2}";
  const auto parsed = ParseJson(text);
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(parsed->size(), 200000u);
}

}  // namespace
}  // namespace millrace::text
