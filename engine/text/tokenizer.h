// SPDX-License-Identifier: Apache-2.0
// Byte-level BPE as tokenizer.json of DeepSeek-V4 describes it: text -> token ids -> bytes.
//
// The same ids as Hugging Face `tokenizers` for every string, which the vectors in tests/data/tokenizer prove. It is
// not a general tokenizer: the released pre-tokeniser patterns, byte-level BPE and plain added tokens are all it
// accepts, and anything else in the file is refused by name. Chat markup is chat_encoding.h's, turning a stream of ids
// back into text is detokenizer.h's.
//
// Time is O(n log n) on any input: the patterns are fixed and cannot backtrack over more than one run, and merging uses
// a heap over a linked list.
//
// Thread: immutable after Load; every method may be called from any thread.
// Source: docs/model.md, "Tokenizer".
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace millrace::text {

enum class SpecialTokens {
  kMatch,  // added tokens spelt in the text become those tokens, as the Hugging Face tokenizer does
  kPlain,  // text is only text: no input yields an added token
};

// What one Encode call did. For tests that prove growth by counting instead of by the clock.
struct EncodeWork {
  int64_t regex_matches = 0;  // calls into PCRE2
  int64_t regex_bytes = 0;    // bytes from where a call started to the end of its match
  int64_t merge_steps = 0;    // heap pops and linear scans while merging
};

class Tokenizer {
 public:
  // Reads and checks `path` (a tokenizer.json). `vocab_size` is the model's, an upper bound for ids.
  // Errors: NotFound or InvalidArgument, one line `tokenizer.json: field: found X, expected Y`.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& path, int vocab_size);

  // The same from bytes already in memory.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Parse(std::string_view json, int vocab_size);

  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Broken UTF-8 is repaired first (utf8.h). Adds no BOS. `work`, if given, is added to.
  // Errors: InvalidArgument above 1 GiB of text; ResourceExhausted if PCRE2 reaches a limit, which no known input does.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, SpecialTokens special,
                                              EncodeWork* work = nullptr) const;

  // The bytes a token stands for; not always whole UTF-8 characters. Empty for ids that no entry has.
  std::string_view TokenBytes(int32_t id) const;

  // True for added tokens marked special, which Decode can skip.
  bool IsSpecial(int32_t id) const;

  // True for every added token, special or not.
  bool IsAdded(int32_t id) const;

  // All tokens' bytes as one text, broken UTF-8 repaired. Ids that no entry has add nothing.
  std::string Decode(absl::Span<const int32_t> ids, bool skip_special) const;

  // The id of an added token by its content ("</think>"), or of a vocabulary entry by its spelling in the file.
  std::optional<int32_t> TokenId(std::string_view content) const;

  // One more than the highest id; at most the model's vocab_size.
  int size() const;

  // XXH3-128 of the file, 32 hex digits; part of the compatibility hash.
  const std::string& ContentHash() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace millrace::text
