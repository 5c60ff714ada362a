// SPDX-License-Identifier: Apache-2.0
// What tokenizer.json says, checked: the private input of Tokenizer.
//
// Every rule that encoding relies on is enforced here, so that a bad file is refused by name at start-up and never
// becomes a wrong token. Encoding itself is tokenizer.cc.
//
// Thread: any; pure functions.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"

namespace millrace::text {

struct MergeRule {
  int32_t left, right, result;
};

struct AddedToken {
  int32_t id;
  std::string content;
  bool special;     // Decode may skip it
  bool normalized;  // looked for after the others
};

struct TokenizerFile {
  std::vector<std::string> bytes;                 // by id: what the token stands for; every id has an entry
  std::vector<bool> special;                      // by id
  std::vector<bool> is_added;                     // by id
  absl::flat_hash_map<std::string, int32_t> ids;  // by spelling in the file
  std::array<int32_t, 256> byte_ids;              // the token of each single byte
  std::vector<MergeRule> merges;                  // by rank
  std::vector<AddedToken> added;
  std::string hash;  // XXH3-128 of the file, hex
};

// Errors: NotFound, or InvalidArgument for a file larger than a tokenizer of `vocab_size` entries can need.
absl::StatusOr<std::string> ReadTokenizerFile(const std::string& path, int vocab_size);

// Errors: InvalidArgument `tokenizer.json: field: found X, expected Y`, one line.
absl::StatusOr<TokenizerFile> ParseTokenizerFile(std::string_view json, int vocab_size);

// A pattern with the escapes removed that mean the character itself (\" \/ \r \n), so that two spellings compare equal.
std::string NormalizePattern(std::string_view pattern);

}  // namespace millrace::text
