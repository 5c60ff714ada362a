// SPDX-License-Identifier: Apache-2.0
// The vocabulary, added tokens and merges of tokenizer.json, checked entry by entry; what surrounds them is
// tokenizer_pipeline.cc.
#include "engine/text/tokenizer_file.h"

#include <xxhash.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <optional>
#include <utility>

#include "absl/strings/str_format.h"
#include "engine/status.h"
#include "engine/text/concat.h"
#include "engine/text/tokenizer_pipeline.h"

namespace millrace::text {
namespace {

using simdjson::dom::array;
using simdjson::dom::object;

// What a chat needs; the other control tokens are missed only by the request that uses them.
constexpr std::string_view kRequiredTokens[] = {"<｜begin▁of▁sentence｜>",
                                                "<｜end▁of▁sentence｜>",
                                                "<｜User｜>",
                                                "<｜Assistant｜>",
                                                "<think>",
                                                "</think>",
                                                "｜DSML｜"};

constexpr size_t kMaxAddedTokenBytes = 256;

// GPT-2's map of bytes to printable characters: printable Latin-1 stands for itself, the rest is moved to U+0100 on.
struct ByteAlphabet {
  std::array<std::string, 256> spelling;
  absl::flat_hash_map<std::string, uint8_t> byte;

  ByteAlphabet() {
    uint32_t moved = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
      const uint32_t c = printable ? b : moved++;
      std::string& s = spelling[b];
      if (c < 0x80) {
        s.push_back(static_cast<char>(c));
      } else {
        s.push_back(static_cast<char>(0xC0 | c >> 6));
        s.push_back(static_cast<char>(0x80 | (c & 0x3F)));
      }
      byte.emplace(s, static_cast<uint8_t>(b));
    }
  }

  // The bytes that `spelled` stands for; as the Hugging Face decoder does, the text itself if any character is not of
  // the alphabet (added tokens such as <｜User｜>).
  std::string Decode(std::string_view spelled) const {
    std::string decoded;
    for (size_t i = 0; i < spelled.size();) {
      const size_t length = static_cast<uint8_t>(spelled[i]) < 0x80 ? 1 : 2;
      const auto found = byte.find(AbslView(spelled.substr(i, length)));
      if (found == byte.end()) return std::string(spelled);
      decoded.push_back(static_cast<char>(found->second));
      i += length;
    }
    return decoded;
  }
};

class Parser {
 public:
  Parser(JsonElement root, int vocab_size) : root_(root), vocab_size_(vocab_size) {}

  absl::StatusOr<TokenizerFile> Parse() {
    RETURN_IF_ERROR(CheckPipeline(root_));
    RETURN_IF_ERROR(ReadVocab());
    RETURN_IF_ERROR(ReadAddedTokens());
    RETURN_IF_ERROR(CheckEveryIdHasAnEntry());
    RETURN_IF_ERROR(FindByteTokens());
    RETURN_IF_ERROR(ReadMerges());
    RETURN_IF_ERROR(CheckRequiredTokens());
    return std::move(file_);
  }

 private:
  absl::Status ReadVocab() {
    object vocab;
    if (root_["model"]["vocab"].get(vocab) != simdjson::SUCCESS) {
      return BadTokenizer("model.vocab", Show(root_["model"]["vocab"]), "an object");
    }
    spellings_.resize(vocab_size_);
    for (const auto& entry : vocab) {
      const std::string field = Concat("model.vocab[", Show(entry.key), "]");
      int64_t id = -1;
      if (entry.value.get(id) != simdjson::SUCCESS || id < 0 || id >= vocab_size_) {
        return BadTokenizer(field, Show(entry.value), Concat("an id from 0 to ", vocab_size_ - 1));
      }
      if (entry.key.empty()) return BadTokenizer(field, "an empty token", "at least one character");
      if (spellings_[id].has_value()) {
        return BadTokenizer(field, Concat("id ", id), Concat("an id of its own (", Show(*spellings_[id]), " has it)"));
      }
      if (!file_.ids.emplace(entry.key, id).second) return BadTokenizer(field, "a second entry", "one");
      spellings_[id] = std::string(entry.key);
    }
    return absl::OkStatus();
  }

  absl::Status ReadAddedTokens() {
    file_.special.assign(vocab_size_, false);
    file_.is_added.assign(vocab_size_, false);
    if (IsNullOrAbsent(root_["added_tokens"])) return absl::OkStatus();  // CheckRequiredTokens names what is missing
    array added;
    if (root_["added_tokens"].get(added) != simdjson::SUCCESS) {
      return BadTokenizer("added_tokens", Show(root_["added_tokens"]), "an array");
    }
    size_t index = 0;
    for (const JsonElement token : added) {
      RETURN_IF_ERROR(ReadAddedToken(token, Concat("added_tokens[", index++, "]")));
    }
    return absl::OkStatus();
  }

  absl::Status ReadAddedToken(JsonElement token, const std::string& field) {
    std::string_view content;
    if (token["content"].get(content) != simdjson::SUCCESS) {
      return BadTokenizer(field + ".content", Show(token["content"]), "a string");
    }
    if (content.empty()) return BadTokenizer(field + ".content", "an empty string", "at least one character");
    if (content.size() > kMaxAddedTokenBytes) {
      return BadTokenizer(field + ".content", Concat(content.size(), " bytes"),
                          Concat("at most ", kMaxAddedTokenBytes));
    }
    if (content.find_first_of("\r\n") != std::string_view::npos) {
      return BadTokenizer(field + ".content", Show(content), "no line break");
    }
    int64_t id = -1;
    if (token["id"].get(id) != simdjson::SUCCESS || id < 0 || id >= vocab_size_) {
      return BadTokenizer(field + ".id", Show(token["id"]), Concat("an id from 0 to ", vocab_size_ - 1));
    }
    for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
      if (!IsNullOrAbsent(token[flag]) && !IsFalse(token[flag])) {
        return BadTokenizer(Concat(field, ".", flag), Show(token[flag]), "false");
      }
    }
    if (file_.is_added[id]) return BadTokenizer(field + ".id", Concat(id), "an id that no other added token has");
    // An added token may stand in the vocabulary too, but then with the same id.
    if (const auto known = file_.ids.find(AbslView(content)); known != file_.ids.end() && known->second != id) {
      return BadTokenizer(field + ".content", Concat(Show(content), ", which has id ", known->second),
                          Concat("a token of its own for id ", id));
    }
    if (spellings_[id].has_value() && *spellings_[id] != content) {
      return BadTokenizer(field + ".id", Concat(id, ", which is ", Show(*spellings_[id])), "an id of its own");
    }
    bool special = false, normalized = false;
    if (!IsNullOrAbsent(token["special"]) && token["special"].get(special) != simdjson::SUCCESS) {
      return BadTokenizer(field + ".special", Show(token["special"]), "true or false");
    }
    if (!IsNullOrAbsent(token["normalized"]) && token["normalized"].get(normalized) != simdjson::SUCCESS) {
      return BadTokenizer(field + ".normalized", Show(token["normalized"]), "true or false");
    }
    spellings_[id] = std::string(content);
    file_.ids.emplace(content, id);
    file_.is_added[id] = true;
    file_.special[id] = special;
    file_.added.push_back({static_cast<int32_t>(id), std::string(content), special, normalized});
    return absl::OkStatus();
  }

  // Entries end where the ids end; a model may have padded rows above them.
  absl::Status CheckEveryIdHasAnEntry() {
    size_t size = spellings_.size();
    while (size > 0 && !spellings_[size - 1].has_value()) --size;
    if (size == 0) return BadTokenizer("model.vocab", "no entries", "the vocabulary");
    spellings_.resize(size);
    file_.special.resize(size);
    file_.is_added.resize(size);
    for (size_t id = 0; id < size; ++id) {
      if (!spellings_[id].has_value()) {
        return BadTokenizer("model.vocab", Concat("no entry for id ", id), Concat("one for each id up to ", size - 1));
      }
      file_.bytes.push_back(alphabet_.Decode(*spellings_[id]));
    }
    return absl::OkStatus();
  }

  absl::Status FindByteTokens() {
    for (int b = 0; b < 256; ++b) {
      const auto found = file_.ids.find(alphabet_.spelling[b]);
      if (found == file_.ids.end() || file_.is_added[found->second]) {
        return BadTokenizer("model.vocab", absl::StrFormat("no entry for byte 0x%02X", b),
                            Concat("a plain token ", Show(alphabet_.spelling[b])));
      }
      file_.byte_ids[b] = found->second;
    }
    return absl::OkStatus();
  }

  absl::Status ReadMerges() {
    array merges;
    if (root_["model"]["merges"].get(merges) != simdjson::SUCCESS) {
      return BadTokenizer("model.merges", Show(root_["model"]["merges"]), "an array");
    }
    // Counted by walking: simdjson's own count stops at 2^24.
    absl::flat_hash_map<std::pair<int32_t, int32_t>, int> seen;
    for (const JsonElement merge : merges) {
      const std::string field = Concat("model.merges[", file_.merges.size(), "]");
      // Each merge makes an entry of the vocabulary, so there cannot be more of them.
      if (file_.merges.size() == file_.bytes.size()) {
        return BadTokenizer(field, "one more merge", Concat("at most ", file_.bytes.size(), ", one per token"));
      }
      std::string_view left, right;
      RETURN_IF_ERROR(SplitMerge(merge, field, left, right));
      MergeRule rule;
      ASSIGN_OR_RETURN(rule.left, KnownToken(field, left));
      ASSIGN_OR_RETURN(rule.right, KnownToken(field, right));
      ASSIGN_OR_RETURN(rule.result, KnownToken(field, Concat(left, right)));
      // Otherwise plain text could become a control token.
      if (file_.is_added[rule.result]) {
        return BadTokenizer(field, Concat("a way to the added token ", Show(Concat(left, right))), "a plain token");
      }
      if (const auto [first, is_new] = seen.try_emplace({rule.left, rule.right}, file_.merges.size()); !is_new) {
        return BadTokenizer(field, Concat("the pair of model.merges[", first->second, "]"), "each pair once");
      }
      file_.merges.push_back(rule);
    }
    return absl::OkStatus();
  }

  // Both spellings: "a b" of older files and ["a", "b"] of newer ones.
  static absl::Status SplitMerge(JsonElement merge, const std::string& field, std::string_view& left,
                                 std::string_view& right) {
    array pair;
    if (merge.get(pair) == simdjson::SUCCESS) {
      if (pair.size() == 2 && pair.at(0).get(left) == simdjson::SUCCESS && pair.at(1).get(right) == simdjson::SUCCESS) {
        return absl::OkStatus();
      }
    } else if (std::string_view text; merge.get(text) == simdjson::SUCCESS) {
      const size_t space = text.find(' ');
      if (space != std::string_view::npos && text.find(' ', space + 1) == std::string_view::npos) {
        left = text.substr(0, space);
        right = text.substr(space + 1);
        return absl::OkStatus();
      }
    }
    return BadTokenizer(field, Show(merge), "two tokens");
  }

  absl::StatusOr<int32_t> KnownToken(const std::string& field, std::string_view spelling) {
    const auto found = file_.ids.find(AbslView(spelling));
    if (found == file_.ids.end())
      return BadTokenizer(field, Concat("unknown token ", Show(spelling)), "a vocabulary entry");
    return found->second;
  }

  absl::Status CheckRequiredTokens() {
    for (const std::string_view token : kRequiredTokens) {
      const auto found = file_.ids.find(AbslView(token));
      if (found == file_.ids.end() || !file_.is_added[found->second]) {
        return BadTokenizer("added_tokens", Concat("no ", token), "every control token of a chat");
      }
    }
    return absl::OkStatus();
  }

  const JsonElement root_;
  const int vocab_size_;
  const ByteAlphabet alphabet_;
  std::vector<std::optional<std::string>> spellings_;  // by id
  TokenizerFile file_;
};

}  // namespace

absl::StatusOr<std::string> ReadTokenizerFile(const std::string& path, int vocab_size) {
  // Each id costs at most a vocabulary entry, a merge and an added token; released files need about 60 bytes an id.
  const int64_t max_bytes = (int64_t{1} << 20) + int64_t{512} * vocab_size;
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in)
    return absl::NotFoundError(
        Concat("tokenizer.json: file: found nothing to read at ", path, ", expected a tokenizer"));
  const int64_t bytes = in.tellg();
  if (bytes < 0) return BadTokenizer("file", "something that is not a file", "a file");
  if (bytes > max_bytes) return BadTokenizer("file", Concat(bytes, " bytes"), Concat("at most ", max_bytes));
  std::string json(static_cast<size_t>(bytes), '\0');
  in.seekg(0);
  if (!in.read(json.data(), bytes)) return BadTokenizer("file", "a read error", Concat(bytes, " bytes"));
  return json;
}

absl::StatusOr<TokenizerFile> ParseTokenizerFile(std::string_view json, int vocab_size) {
  if (vocab_size <= 0) return BadTokenizer("vocab_size", Concat(vocab_size), "a positive number");
  simdjson::dom::parser parser;
  JsonElement root;
  const simdjson::error_code error = parser.parse(simdjson::padded_string(json)).get(root);
  if (error == simdjson::EMPTY) return BadTokenizer("file", "nothing", "a JSON object");
  if (error != simdjson::SUCCESS) {
    return BadTokenizer("file", Concat("broken JSON (", simdjson::error_message(error), ")"), "a JSON object");
  }
  if (!root.is_object()) return BadTokenizer("file", Show(root), "a JSON object");
  ASSIGN_OR_RETURN(TokenizerFile file, Parser(root, vocab_size).Parse());
  const XXH128_hash_t hash = XXH3_128bits(json.data(), json.size());
  file.hash = absl::StrFormat("%016x%016x", hash.high64, hash.low64);
  return file;
}

}  // namespace millrace::text
