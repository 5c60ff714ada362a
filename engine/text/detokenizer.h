// SPDX-License-Identifier: Apache-2.0
// Token ids to text, one token at a time, never half a character.
//
// A token may end inside a UTF-8 character; its bytes wait for the next token. All pieces together equal
// Tokenizer::Decode of all ids, however the stream is cut: bytes that can no longer become a character turn into
// U+FFFD, and Finish does the same to a character that never ended.
//
// Thread: one stream, one thread. The tokenizer must outlive it.
#pragma once

#include <cstdint>
#include <string>

#include "engine/text/tokenizer.h"

namespace millrace::text {

class Detokenizer {
 public:
  // With `skip_special`, special tokens add no text.
  Detokenizer(const Tokenizer& tokenizer, bool skip_special) : tokenizer_(&tokenizer), skip_special_(skip_special) {}

  // The text that `id` completes; often empty inside an emoji.
  std::string Push(int32_t id);

  // What is left at the end of the stream: empty or one U+FFFD. The object is then as new.
  std::string Finish();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::string pending_;  // at most 3 bytes: the start of a character
};

}  // namespace millrace::text
