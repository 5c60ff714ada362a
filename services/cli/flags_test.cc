// SPDX-License-Identifier: Apache-2.0
// Flags: what is accepted, and that every refusal is one line that says what would be right.
#include "services/cli/flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace millrace::cli {
namespace {

using ::testing::HasSubstr;

struct Values {
  std::string model, name = "a", numerics;
  int64_t count = 3;
  double share = 0.5;
  bool json = false, drop = true;
  std::vector<std::string> more;
};

absl::Status Parse(const std::vector<absl::string_view>& arguments, Values& v, bool* help = nullptr) {
  Flags flags("try", "Tries flags", "");
  flags.Positional("MODEL", &v.model, "A folder.");
  flags.String("name", &v.name, "NAME", "A name.");
  flags.Enum("numerics", &v.numerics, {"exact", "release"}, "Which.");
  flags.Int("count", &v.count, 1, 10, "How many.");
  flags.Double("share", &v.share, 0, 1, "How much.");
  flags.Bool("json", &v.json, "As JSON.");
  flags.Bool("drop-thinking", &v.drop, "Forget.");
  flags.Repeated("more", &v.more, "X", "Any number.");
  const absl::Status status = flags.Parse(arguments);
  if (help != nullptr) *help = flags.help_requested();
  return status;
}

TEST(Flags, AcceptsEverySpellingOfAValue) {
  Values v;
  ASSERT_TRUE(
      Parse({"m", "--name=b", "--count", "7", "--json", "--drop-thinking=false", "--more=1", "--more", "2"}, v).ok());
  EXPECT_EQ(v.model, "m");
  EXPECT_EQ(v.name, "b");
  EXPECT_EQ(v.count, 7);
  EXPECT_TRUE(v.json);
  EXPECT_FALSE(v.drop);
  EXPECT_EQ(v.more, (std::vector<std::string>{"1", "2"}));
}

TEST(Flags, NoPrefixSwitchesABooleanOff) {
  Values v;
  ASSERT_TRUE(Parse({"m", "--no-drop-thinking"}, v).ok());
  EXPECT_FALSE(v.drop);
}

TEST(Flags, DashDashEndsFlags) {
  Values v;
  ASSERT_TRUE(Parse({"--", "--json"}, v).ok());
  EXPECT_EQ(v.model, "--json");
}

TEST(Flags, ALoneDashIsAnArgument) {
  Values v;
  ASSERT_TRUE(Parse({"-"}, v).ok());
  EXPECT_EQ(v.model, "-");
}

TEST(Flags, HelpNeedsNothingElse) {
  Values v;
  bool help = false;
  ASSERT_TRUE(Parse({"--help"}, v, &help).ok());
  EXPECT_TRUE(help);
}

TEST(Flags, RefusalsNameTheFlagAndWhatIsAllowed) {
  const struct {
    std::vector<absl::string_view> arguments;
    const char* expected;
  } kCases[] = {
      {{}, "missing argument MODEL"},
      {{"m", "n"}, "unexpected argument \"n\""},
      {{"m", "--nmae=x"}, "did you mean --name?"},
      {{"m", "-j"}, "unknown flag \"-j\""},
      {{"m", "--count=0"}, "--count: found \"0\", expected a whole number from 1 to 10"},
      {{"m", "--count=1.5"}, "expected a whole number"},
      {{"m", "--count="}, "expected a whole number"},
      {{"m", "--count=99999999999999999999"}, "expected a whole number"},
      {{"m", "--share=nan"}, "expected a number from 0 to 1"},
      {{"m", "--share=1.01"}, "expected a number from 0 to 1"},
      {{"m", "--numerics=fast"}, "expected one of exact, release"},
      {{"m", "--json=perhaps"}, "expected true or false"},
      {{"m", "--name"}, "--name needs a value"},
      {{"m", "--name=a", "--name=b"}, "--name is given twice"},
      {{"m", "--no-name"}, "unknown flag"},
  };
  for (const auto& c : kCases) {
    Values v;
    const absl::Status status = Parse(c.arguments, v);
    EXPECT_FALSE(status.ok()) << c.expected;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.expected));
    EXPECT_EQ(status.message().find('\n'), absl::string_view::npos);
  }
}

TEST(Flags, WhatTheUserTypedIsQuotedShortAndEscaped) {
  Values v;
  const std::string argument = "--count=" + std::string(1000, '\x01');
  const absl::Status status = Parse({"m", argument}, v);
  EXPECT_LT(status.message().size(), 400u);
  EXPECT_EQ(status.message().find('\x01'), absl::string_view::npos);
}

TEST(Flags, HelpShowsDefaultsAndWraps) {
  int64_t n = 42;
  Flags flags("try", "Tries", "Text.");
  flags.Int("n", &n, 0, 100, std::string(300, 'x').replace(150, 1, " "));
  const std::string help = flags.Help(100);
  EXPECT_THAT(help, HasSubstr("[default: 42]"));
  EXPECT_THAT(help, HasSubstr("Usage: millrace try [flags]"));
}

}  // namespace
}  // namespace millrace::cli
