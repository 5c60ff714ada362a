// SPDX-License-Identifier: Apache-2.0
// Ids and decoded text equal Hugging Face `tokenizers` for the recorded strings
// (tests/golden/make_tokenizer_vectors.py, which also describes the format).
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "engine/text/detokenizer.h"
#include "engine/text/tokenizer.h"

namespace millrace::text {
namespace {

uint64_t Fnv1a(const void* data, size_t bytes) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001B3u;
  return hash;
}

// Reads the file front to back; a short file is a failure.
class Reader {
 public:
  explicit Reader(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(in), {});
  }
  bool done() const { return at_ == bytes_.size(); }
  std::string Bytes(size_t count) {
    EXPECT_LE(at_ + count, bytes_.size()) << "vectors.bin ends inside a record";
    std::string taken = bytes_.substr(at_, count);
    taken.resize(count);
    at_ = std::min(at_ + count, bytes_.size());
    return taken;
  }
  template <typename T>
  T Number() {
    T value;
    std::memcpy(&value, Bytes(sizeof value).data(), sizeof value);
    return value;
  }
  std::vector<int32_t> Ids(size_t count) {
    std::vector<int32_t> ids(count);
    for (int32_t& id : ids) id = Number<uint16_t>();
    return ids;
  }

 private:
  std::string bytes_;
  size_t at_ = 0;
};

void AppendUtf8(uint32_t c, std::string& out) {
  const auto tail = [&](int shift) { out.push_back(static_cast<char>(0x80 | (c >> shift & 0x3F))); };
  if (c < 0x80) {
    out.push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    out.push_back(static_cast<char>(0xC0 | c >> 6));
    tail(0);
  } else if (c < 0x10000) {
    out.push_back(static_cast<char>(0xE0 | c >> 12));
    tail(6);
    tail(0);
  } else {
    out.push_back(static_cast<char>(0xF0 | c >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

class TokenizerVectors : public testing::Test {
 protected:
  void SetUp() override {
    auto loaded = Tokenizer::Load("deploy/demo/model/tokenizer.json", 1536);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    tokenizer_ = *std::move(loaded);
  }

  // A text, its ids and what they decode to, at once and as a stream.
  void CheckText(Reader& reader) {
    const std::string text = reader.Bytes(reader.Number<uint32_t>());
    const auto count = reader.Number<uint32_t>();
    const std::vector<int32_t> ids = *tokenizer_->Encode(text, SpecialTokens::kMatch);
    ASSERT_EQ(ids.size(), count) << testing::PrintToString(text);
    if (count <= 96) {
      ASSERT_EQ(ids, reader.Ids(count)) << testing::PrintToString(text);
    } else {
      ASSERT_EQ(Fnv1a(ids.data(), 4 * ids.size()), reader.Number<uint64_t>()) << testing::PrintToString(text);
    }
    const std::string decoded = tokenizer_->Decode(ids, true);
    ASSERT_EQ(Fnv1a(decoded.data(), decoded.size()), reader.Number<uint64_t>()) << testing::PrintToString(text);
    ASSERT_EQ(Stream(ids), decoded);
  }

  void CheckDecoding(Reader& reader) {
    const std::vector<int32_t> ids = reader.Ids(reader.Number<uint32_t>());
    const std::string expected = reader.Bytes(reader.Number<uint32_t>());
    ASSERT_EQ(tokenizer_->Decode(ids, true), expected);
    ASSERT_EQ(Stream(ids), expected);
  }

  void CheckCodePoints(Reader& reader) {
    const std::string form = reader.Bytes(reader.Number<uint8_t>());
    const auto start = reader.Number<uint32_t>(), count = reader.Number<uint32_t>();
    std::string text;
    uint32_t c = start;
    for (int taken = 0; taken < 4096 && c < 0x110000; ++c) {
      if (c >= 0xD800 && c < 0xE000) continue;
      ++taken;
      std::string_view rest = form;
      for (size_t at; (at = rest.find("{0}")) != std::string_view::npos; rest.remove_prefix(at + 3)) {
        text += rest.substr(0, at);
        AppendUtf8(c, text);
      }
      text += rest;
    }
    const std::vector<int32_t> ids = *tokenizer_->Encode(text, SpecialTokens::kMatch);
    EXPECT_EQ(ids.size(), count) << "from code point " << start << " in " << testing::PrintToString(form);
    EXPECT_EQ(Fnv1a(ids.data(), 4 * ids.size()), reader.Number<uint64_t>()) << start;
  }

  std::string Stream(const std::vector<int32_t>& ids) {
    Detokenizer detokenizer(*tokenizer_, true);
    std::string text;
    for (const int32_t id : ids) text += detokenizer.Push(id);
    return text + detokenizer.Finish();
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(TokenizerVectors, EveryRecordEqualsHuggingFace) {
  Reader reader("tests/data/tokenizer/vectors.bin");
  ASSERT_EQ(reader.Bytes(8), "MRTV0001");
  int texts = 0, decodings = 0, points = 0;
  while (!reader.done() && !HasFatalFailure()) {
    switch (reader.Number<uint8_t>()) {
      case 0:
        ++texts, CheckText(reader);
        break;
      case 1:
        ++decodings, CheckDecoding(reader);
        break;
      case 2:
        ++points, CheckCodePoints(reader);
        break;
      default:
        FAIL() << "unknown record";
    }
  }
  EXPECT_GE(texts, 20000);
  EXPECT_GE(decodings, 1000);
  EXPECT_GE(points, 900);
}

}  // namespace
}  // namespace millrace::text
