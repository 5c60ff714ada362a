// SPDX-License-Identifier: Apache-2.0
// However the text is cut, a stop string ends it at the same byte and no part of one is let out.
#include "engine/text/stop_matcher.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace millrace::text {
namespace {

struct Outcome {
  std::string text;
  bool stopped = false;
  std::string matched;
  bool operator==(const Outcome&) const = default;
};

Outcome MatchAll(std::vector<std::string> stops, const std::vector<std::string>& pieces) {
  StopMatcher matcher(std::move(stops));
  Outcome outcome;
  for (const std::string& piece : pieces) outcome.text += matcher.Push(piece);
  outcome.text += matcher.Finish();
  outcome.stopped = matcher.stopped();
  if (outcome.stopped) outcome.matched = matcher.matched();
  return outcome;
}

TEST(StopMatcher, StopStringAcrossTokensIsCutWhole) {
  EXPECT_EQ(MatchAll({"STOP"}, {"go on S", "T", "OP and more"}), (Outcome{"go on ", true, "STOP"}));
}

TEST(StopMatcher, OutputEqualToTheStopStringIsEmpty) {
  EXPECT_EQ(MatchAll({"STOP"}, {"STOP"}), (Outcome{"", true, "STOP"}));
}

TEST(StopMatcher, PartOfAStopStringAtTheEndIsText) {
  EXPECT_EQ(MatchAll({"STOP"}, {"a STO"}), (Outcome{"a STO", false, ""}));
}

TEST(StopMatcher, NothingIsLetOutThatMayBelongToAStopString) {
  StopMatcher matcher({"aab"});
  EXPECT_EQ(matcher.Push("xaa"), "x");
  EXPECT_EQ(matcher.Push("a"), "a");  // "aaa": the first a is certain now
  EXPECT_EQ(matcher.Push("b"), "");
  EXPECT_TRUE(matcher.stopped());
  EXPECT_EQ(matcher.Push("never"), "");
}

TEST(StopMatcher, FirstToCompleteWinsAndThenTheLongest) {
  EXPECT_EQ(MatchAll({"abc", "b"}, {"abc"}), (Outcome{"a", true, "b"}));
  EXPECT_EQ(MatchAll({"c", "abc"}, {"abc"}), (Outcome{"", true, "abc"}));
}

TEST(StopMatcher, EmptyStopStringsNeverMatch) { EXPECT_EQ(MatchAll({"", ""}, {"text"}), (Outcome{"text", false, ""})); }

TEST(StopMatcher, MultiByteAndInvalidPrefixesAreHeldToo) {
  EXPECT_EQ(MatchAll({"🏠"}, {"a\xF0\x9F", "\x8F\xA0z"}), (Outcome{"a", true, "🏠"}));
  EXPECT_EQ(MatchAll({"\uFFFDx"}, {"a\uFFFD", "x"}), (Outcome{"a", true, "\uFFFDx"}));
  EXPECT_EQ(MatchAll({"🏠"}, {"a\xF0\x9F", "z"}), (Outcome{"a\xF0\x9Fz", false, ""}));
}

TEST(StopMatcher, EverySplitGivesTheSameOutcome) {
  const std::vector<std::vector<std::string>> stop_sets = {{"aab"},        {"abab"},       {"\n\n"}, {"ab", "ba"},
                                                           {"abba", "bb"}, {"</s>", "</"}, {"zz"}};
  for (const std::string text : {"aaaab", "ababab", "x\n\ny", "abba", "aabbaa", "a</s>", "a</b</s>", "bbbb", ""}) {
    for (const auto& stops : stop_sets) {
      const Outcome whole = MatchAll(stops, {text});
      for (uint32_t cuts = 0; !text.empty() && cuts < 1u << (text.size() - 1); ++cuts) {
        std::vector<std::string> pieces(1);
        for (size_t i = 0; i < text.size(); ++i) {
          pieces.back().push_back(text[i]);
          if (cuts >> i & 1) pieces.emplace_back();
        }
        EXPECT_EQ(MatchAll(stops, pieces), whole) << text;
      }
    }
  }
}

}  // namespace
}  // namespace millrace::text
