// SPDX-License-Identifier: Apache-2.0
// What a tokenizer file may say, that user text never becomes a control token, and that work grows linearly.
#include "engine/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/text/tokenizer_file.h"

namespace millrace::text {
namespace {

using nlohmann::ordered_json;
using testing::HasSubstr;

constexpr int kVocabSize = 1536;

std::string DemoJson() {
  std::ifstream in("deploy/demo/model/tokenizer.json", std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

const Tokenizer& Demo() {
  static const Tokenizer* tokenizer = Tokenizer::Load("deploy/demo/model/tokenizer.json", kVocabSize)->release();
  return *tokenizer;
}

// The error of the demo file after a change.
std::string ErrorAfter(const std::function<void(ordered_json&)>& change, int vocab_size = kVocabSize) {
  ordered_json file = ordered_json::parse(DemoJson());
  change(file);
  const auto loaded = Tokenizer::Parse(file.dump(), vocab_size);
  const std::string message(loaded.status().message());
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  return message;
}

TEST(TokenizerFile, UnchangedDemoLoads) {
  EXPECT_EQ(ErrorAfter([](ordered_json&) {}), "");
  EXPECT_EQ(Demo().size(), kVocabSize);
  EXPECT_EQ(Demo().ContentHash().size(), 32u);
}

TEST(TokenizerFile, MissingAndBrokenFilesAreNamed) {
  EXPECT_THAT(std::string(Tokenizer::Load("/nonexistent/tokenizer.json", 8).status().message()),
              HasSubstr("/nonexistent/tokenizer.json"));
  for (const char* broken : {"", "null", "[]", "{", "{}", "\"x\"", "{\"pre_tokenizer\": 7}", "\xFF"}) {
    const auto loaded = Tokenizer::Parse(broken, 8);
    EXPECT_EQ(loaded.status().code(), absl::StatusCode::kInvalidArgument) << broken;
    EXPECT_THAT(std::string(loaded.status().message()), testing::StartsWith("tokenizer.json: ")) << broken;
  }
}

TEST(TokenizerFile, VocabularyEntriesAreRefusedByName) {
  const auto vocab = [](ordered_json& f) -> ordered_json& { return f["model"]["vocab"]; };
  EXPECT_THAT(ErrorAfter([&](auto& f) { vocab(f)["Compare"] = 300; }),
              HasSubstr("model.vocab[\"Compare\"]: found id 300"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { vocab(f)["new"] = kVocabSize; }),
              HasSubstr("model.vocab[\"new\"]: found 1536"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { vocab(f)["new"] = -1; }), HasSubstr("model.vocab[\"new\"]: found -1"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { vocab(f)["new"] = "x"; }), HasSubstr("model.vocab[\"new\"]: found \"x\""));
  EXPECT_THAT(ErrorAfter([&](auto& f) { vocab(f)["new"] = 1540; }, 2000), HasSubstr("found no entry for id 1536"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { vocab(f) = 3; }), HasSubstr("model.vocab: found 3"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { f["model"].erase("vocab"); }), HasSubstr("model.vocab: found nothing"));
  // A byte without a token: every text that holds it would be lost.
  EXPECT_THAT(ErrorAfter([&](auto& f) {
                const int id = vocab(f)["a"];
                vocab(f).erase("a");
                vocab(f)["unheard"] = id;
              }),
              HasSubstr("found no entry for byte 0x61"));
}

TEST(TokenizerFile, VocabularySpeltTwiceIsRefused) {
  std::string json = DemoJson();
  const size_t at = json.find("\"vocab\"");
  json.insert(json.find('{', at) + 1, "\"Compare\": 1533, ");
  EXPECT_THAT(std::string(Tokenizer::Parse(json, kVocabSize).status().message()), HasSubstr("\"Compare\""));
}

TEST(TokenizerFile, MergesAreRefusedByName) {
  const auto merges = [](ordered_json& f) -> ordered_json& { return f["model"]["merges"]; };
  EXPECT_THAT(ErrorAfter([&](auto& f) {
                merges(f)[7] = {"nope", "e"};
              }),
              HasSubstr("model.merges[7]: found unknown token"));
  EXPECT_THAT(ErrorAfter([&](auto& f) {
                merges(f)[7] = {"e", "@"};
              }),
              HasSubstr("model.merges[7]: found unknown token \"e@\""));
  EXPECT_THAT(ErrorAfter([&](auto& f) { merges(f)[7] = {"a"}; }), HasSubstr("model.merges[7]"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { merges(f)[7] = "a b c"; }), HasSubstr("model.merges[7]"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { merges(f)[7] = merges(f)[3]; }), HasSubstr("the pair of model.merges[3]"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { merges(f) = "x"; }), HasSubstr("model.merges: found \"x\""));
  // More merges than tokens cannot be; the loop stops there, not at ten million.
  EXPECT_THAT(ErrorAfter([&](auto& f) {
                for (int i = 0; i < 1000; ++i) merges(f).push_back({"a", "a"});
              }),
              HasSubstr("model.merges["));
}

TEST(TokenizerFile, MergeThatSpellsAControlTokenIsRefused) {
  const std::string error = ErrorAfter([](ordered_json& f) {
    f["added_tokens"].push_back({{"id", f["model"]["vocab"]["the"]}, {"content", "the"}});
  });
  EXPECT_THAT(error, HasSubstr("added token \"the\""));
}

TEST(TokenizerFile, OldSpellingOfMergesGivesTheSameTokens) {
  ordered_json file = ordered_json::parse(DemoJson());
  for (ordered_json& merge : file["model"]["merges"]) {
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  const auto old = Tokenizer::Parse(file.dump(), kVocabSize);
  ASSERT_TRUE(old.ok()) << old.status();
  const std::string text = "Once there was a bright falcon who lived at the market.";
  EXPECT_EQ(*(*old)->Encode(text, SpecialTokens::kPlain), *Demo().Encode(text, SpecialTokens::kPlain));
}

TEST(TokenizerFile, OnlyTheReleasedPatternsAreAccepted) {
  const auto pattern = [](ordered_json& f, int i) -> ordered_json& {
    return f["pre_tokenizer"]["pretokenizers"][i]["pattern"]["Regex"];
  };
  EXPECT_THAT(ErrorAfter([&](auto& f) { pattern(f, 0) = "(a+)+"; }),
              HasSubstr("pretokenizers[0].pattern.Regex: found \"(a+)+\", expected the released pattern"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { pattern(f, 2) = pattern(f, 2).template get<std::string>() + "|x"; }),
              HasSubstr("pretokenizers[2]"));
  // The released file writes line breaks as characters and the quote without a backslash.
  EXPECT_EQ(ErrorAfter([&](auto& f) { pattern(f, 2) = NormalizePattern(pattern(f, 2).template get<std::string>()); }),
            "");
  EXPECT_THAT(ErrorAfter([](auto& f) { f["pre_tokenizer"]["pretokenizers"][1]["behavior"] = "Removed"; }),
              HasSubstr("pretokenizers[1].behavior"));
  EXPECT_THAT(ErrorAfter([](auto& f) { f["pre_tokenizer"]["pretokenizers"][3]["use_regex"] = true; }),
              HasSubstr("pretokenizers[3].use_regex: found true"));
  EXPECT_THAT(ErrorAfter([](auto& f) { f["pre_tokenizer"] = nullptr; }), HasSubstr("pre_tokenizer.type"));
}

TEST(TokenizerFile, OtherTokenizersAreRefused) {
  EXPECT_THAT(ErrorAfter([](auto& f) { f["normalizer"] = {{"type", "NFC"}}; }), HasSubstr("normalizer"));
  EXPECT_EQ(ErrorAfter([](auto& f) {
              f["normalizer"] = {{"type", "Sequence"}, {"normalizers", ordered_json::array()}};
            }),
            "");
  EXPECT_THAT(ErrorAfter([](auto& f) { f["model"]["type"] = "Unigram"; }), HasSubstr("model.type: found \"Unigram\""));
  EXPECT_THAT(ErrorAfter([](auto& f) { f["model"]["dropout"] = 0.1; }), HasSubstr("model.dropout"));
  EXPECT_THAT(ErrorAfter([](auto& f) { f["model"]["byte_fallback"] = true; }), HasSubstr("model.byte_fallback"));
  EXPECT_THAT(ErrorAfter([](auto& f) { f["model"]["ignore_merges"] = true; }), HasSubstr("model.ignore_merges"));
  EXPECT_THAT(ErrorAfter([](auto& f) { f["decoder"]["type"] = "Metaspace"; }), HasSubstr("decoder"));
  EXPECT_THAT(ErrorAfter([](auto& f) {
                f["post_processor"] = {{"type", "TemplateProcessing"}};
              }),
              HasSubstr("post_processor"));
  EXPECT_THAT(ErrorAfter([](auto& f) { f["truncation"] = {{"max_length", 8}}; }), HasSubstr("truncation"));
}

TEST(TokenizerFile, AddedTokensAreRefusedByName) {
  const auto added = [](ordered_json& f) -> ordered_json& { return f["added_tokens"]; };
  EXPECT_THAT(ErrorAfter([&](auto& f) { added(f)[9]["content"] = ""; }),
              HasSubstr("added_tokens[9].content: found an empty string"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { added(f)[9]["content"] = "<think>"; }), HasSubstr("added_tokens[9].content"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { added(f)[9]["content"] = "a\nb"; }), HasSubstr("added_tokens[9].content"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { added(f)[9]["id"] = 3; }), HasSubstr("added_tokens[9].id"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { added(f)[9]["id"] = 1 << 20; }), HasSubstr("added_tokens[9].id"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { added(f)[9]["lstrip"] = true; }),
              HasSubstr("added_tokens[9].lstrip: found true"));
  EXPECT_THAT(ErrorAfter([&](auto& f) { added(f)[9] = 4; }), HasSubstr("added_tokens[9]"));
  for (const char* token : {"<｜User｜>", "｜DSML｜", "</think>"}) {
    EXPECT_THAT(ErrorAfter([&](auto& f) {
                  for (size_t i = 0; i < added(f).size(); ++i) {
                    if (added(f)[i]["content"] == token) added(f).erase(i);
                  }
                }),
                HasSubstr(std::string("added_tokens: found no ") + token));
  }
}

TEST(Tokenizer, EverySpecialTokenInPlainTextRoundTripsAsText) {
  for (int32_t id = 0; id < Demo().size(); ++id) {
    if (!Demo().IsAdded(id)) continue;
    const std::string content(Demo().TokenBytes(id));
    const std::string text = "before " + content + content + " after";
    const std::vector<int32_t> ids = *Demo().Encode(text, SpecialTokens::kPlain);
    for (const int32_t plain : ids) EXPECT_FALSE(Demo().IsAdded(plain)) << content;
    EXPECT_EQ(Demo().Decode(ids, true), text);
    EXPECT_EQ(*Demo().Encode(content, SpecialTokens::kMatch), std::vector<int32_t>{id});
    EXPECT_EQ(Demo().TokenId(content), id);
  }
  EXPECT_EQ(Demo().TokenId("<｜no such｜>"), std::nullopt);
}

TEST(Tokenizer, UnknownIdsAreEmpty) {
  for (const int32_t id : {-1, kVocabSize, 1 << 30}) {
    EXPECT_EQ(Demo().TokenBytes(id), "");
    EXPECT_FALSE(Demo().IsSpecial(id));
    EXPECT_EQ(Demo().Decode({id}, false), "");
  }
  EXPECT_EQ(*Demo().Encode("", SpecialTokens::kMatch), std::vector<int32_t>());
}

TEST(Tokenizer, PrefersTheLongestAddedTokenAtTheLeftmostPlace) {
  ordered_json file = ordered_json::parse(DemoJson());
  file["added_tokens"].push_back({{"id", 1536}, {"content", "<think>!"}});
  file["added_tokens"].push_back({{"id", 1537}, {"content", "x<thi"}, {"normalized", true}});
  const auto tokenizer = *Tokenizer::Parse(file.dump(), 1538);
  EXPECT_EQ(*tokenizer->Encode("<think>!<think>", SpecialTokens::kMatch), (std::vector<int32_t>{1536, 5}));
  // Tokens marked `normalized` come second, wherever they start.
  EXPECT_EQ(tokenizer->Encode("x<think>", SpecialTokens::kMatch)->back(), 5);
  EXPECT_EQ(*tokenizer->Encode("x<thi", SpecialTokens::kMatch), std::vector<int32_t>{1537});
}

// Counted, not timed: bytes that the patterns walk over and steps of the merge loop, at three sizes.
TEST(Tokenizer, WorkOnHostileTextGrowsLinearly) {
  const auto repeat = [](std::string unit, size_t bytes) {
    std::string text;
    while (text.size() < bytes) text += unit;
    return text;
  };
  std::string random_letters;
  for (uint32_t x = 1; random_letters.size() < 400000;) {
    x = x * 1664525 + 1013904223;
    random_letters.push_back(static_cast<char>('a' + (x >> 24) % 26));
  }
  const std::vector<std::pair<std::string, std::function<std::string(size_t)>>> kinds = {
      {"a", [&](size_t n) { return repeat("a", n); }},
      {"^", [&](size_t n) { return repeat("^", n); }},
      {"digits", [&](size_t n) { return repeat("1234567890", n); }},
      {"spaces", [&](size_t n) { return repeat(" ", n); }},
      {"spaces and a letter", [&](size_t n) { return repeat(" ", n) + "x"; }},
      {"newlines", [&](size_t n) { return repeat("\n", n); }},
      {"newline runs", [&](size_t n) { return repeat("     \n \n", n); }},
      {"zero bytes", [&](size_t n) { return repeat(std::string(1, '\0'), n); }},
      {"combining marks", [&](size_t n) { return "e" + repeat("\u0301", n); }},
      {"CJK", [&](size_t n) { return repeat("苍鹭", n); }},
      {"almost special", [&](size_t n) { return repeat("<｜begin▁of▁sentence", n); }},
      {"open brackets", [&](size_t n) { return repeat("<", n); }},
      {"broken", [&](size_t n) { return repeat("\xF0\x9F", n); }},
      {"random letters", [&](size_t n) { return random_letters.substr(0, n); }},
  };
  for (const auto& [name, make] : kinds) {
    int64_t base = 0;
    for (const size_t scale : {1, 2, 4}) {
      EncodeWork work;
      const auto ids = Demo().Encode(make(scale * 100000), SpecialTokens::kMatch, &work);
      ASSERT_TRUE(ids.ok()) << name << ids.status();
      const int64_t total = work.regex_matches + work.regex_bytes + work.merge_steps;
      if (scale == 1) base = total;
      EXPECT_LE(total, base * static_cast<int64_t>(scale) * 21 / 20 + 100) << name << " at " << scale;
      // Each byte is walked once per pattern, and merged away at most once with two stale entries beside it.
      EXPECT_LE(total, static_cast<int64_t>(scale) * 100000 * 40) << name;
    }
  }
}

TEST(Tokenizer, FiveMegabytesOfOneLetterAreOnePiece) {
  EncodeWork work;
  const auto ids = Demo().Encode(std::string(5000000, 'a'), SpecialTokens::kPlain, &work);
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_LE(work.regex_matches, 6);
  EXPECT_LE(work.merge_steps, 15000000);
  EXPECT_EQ(Demo().Decode(*ids, false).size(), 5000000u);
}

}  // namespace
}  // namespace millrace::text
