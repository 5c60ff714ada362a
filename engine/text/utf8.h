// SPDX-License-Identifier: Apache-2.0
// One way to read UTF-8 that may be broken, shared by the tokenizer (which repairs input) and the detokenizer (which
// waits for the rest of a character).
//
// Broken input becomes one U+FFFD per maximal subpart, which is what Python's errors="replace" and Rust's
// from_utf8_lossy do, and therefore what the Hugging Face tokenizer sees and prints.
//
// Thread: any; pure functions.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace millrace::text {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

// What stands at the start of a byte string.
struct Utf8Step {
  enum class Kind {
    kCharacter,   // `length` bytes are one valid character
    kInvalid,     // `length` bytes are one maximal subpart: replace them by one U+FFFD
    kIncomplete,  // the string ends inside a character that could still become valid
  };
  Kind kind;
  size_t length;  // 1..4, never more than the string has
};

// `bytes` must not be empty.
Utf8Step NextUtf8(std::string_view bytes);

bool IsValidUtf8(std::string_view bytes);

// `bytes` with every broken part replaced.
std::string RepairUtf8(std::string_view bytes);

}  // namespace millrace::text
