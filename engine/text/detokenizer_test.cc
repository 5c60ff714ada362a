// SPDX-License-Identifier: Apache-2.0
// No piece ever holds half a character, and the pieces together are what Decode says (random ids:
// tokenizer_vectors_test.cc).
#include "engine/text/detokenizer.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "engine/text/utf8.h"

namespace millrace::text {
namespace {

const Tokenizer& Demo() {
  static const Tokenizer* tokenizer = Tokenizer::Load("deploy/demo/model/tokenizer.json", 1536)->release();
  return *tokenizer;
}

// The ids of single bytes, so that characters break at every place.
std::vector<int32_t> ByteIds(const std::string& bytes) {
  std::vector<int32_t> ids;
  for (const char c : bytes) {
    for (int32_t id = 0; id < Demo().size(); ++id) {
      if (Demo().TokenBytes(id) == std::string(1, c)) {
        ids.push_back(id);
        break;
      }
    }
  }
  return ids;
}

std::vector<std::string> Pieces(const std::vector<int32_t>& ids) {
  Detokenizer detokenizer(Demo(), true);
  std::vector<std::string> pieces;
  for (const int32_t id : ids) pieces.push_back(detokenizer.Push(id));
  pieces.push_back(detokenizer.Finish());
  return pieces;
}

TEST(Detokenizer, CharacterAppearsWithItsLastByte) {
  EXPECT_EQ(Pieces(ByteIds("é🏠x")), (std::vector<std::string>{"", "é", "", "", "", "🏠", "x", ""}));
}

TEST(Detokenizer, InvalidBytesBecomeReplacementCharactersAsSoonAsTheyAreCertain) {
  EXPECT_EQ(Pieces(ByteIds("\xF0\x9Fz")), (std::vector<std::string>{"", "", "\uFFFDz", ""}));
  EXPECT_EQ(Pieces(ByteIds("\x80")), (std::vector<std::string>{"\uFFFD", ""}));
  EXPECT_EQ(Pieces(ByteIds("\xED\xA0\x80")), (std::vector<std::string>{"", "\uFFFD\uFFFD", "\uFFFD", ""}));
}

TEST(Detokenizer, UnfinishedCharacterBecomesOneReplacementAtTheEnd) {
  EXPECT_EQ(Pieces(ByteIds("a\xF0\x9F\x8F")), (std::vector<std::string>{"a", "", "", "", "\uFFFD"}));
}

TEST(Detokenizer, SpecialTokensAreSkippedOrShown) {
  Detokenizer skipping(Demo(), true), showing(Demo(), false);
  EXPECT_EQ(skipping.Push(1), "");
  EXPECT_EQ(showing.Push(1), "<｜end▁of▁sentence｜>");
}

TEST(Detokenizer, EveryPieceOfAnyByteStringIsValidUtf8) {
  uint32_t x = 7;
  for (int round = 0; round < 300; ++round) {
    std::string bytes;
    for (int i = 0; i < 12; ++i) {
      x = x * 1664525 + 1013904223;
      // Mostly bytes that start or continue characters.
      bytes.push_back(static_cast<char>(x >> 30 ? 0x80 | (x >> 22 & 0x7F) : x >> 23 & 0x7F));
    }
    std::string joined;
    for (const std::string& piece : Pieces(ByteIds(bytes))) {
      EXPECT_TRUE(IsValidUtf8(piece));
      joined += piece;
    }
    EXPECT_EQ(joined, RepairUtf8(bytes));
    EXPECT_EQ(joined, Demo().Decode(ByteIds(bytes), true));
  }
}

}  // namespace
}  // namespace millrace::text
