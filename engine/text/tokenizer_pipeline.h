// SPDX-License-Identifier: Apache-2.0
// Looking at a parsed tokenizer.json: simdjson without exceptions, and values as an error message shows them. Private
// to tokenizer_file.cc and tokenizer_pipeline.cc.
//
// A member that is absent is an error value, which every function here takes: a chain of [] needs no test between.
// Thread: any; pure functions.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
// Every conversion that could throw becomes a compile error.
#define SIMDJSON_EXCEPTIONS 0
#include "simdjson.h"

namespace millrace::text {

using JsonElement = simdjson::dom::element;
using JsonResult = simdjson::simdjson_result<JsonElement>;

// InvalidArgument `tokenizer.json: field: found X, expected Y`.
absl::Status BadTokenizer(std::string_view field, std::string_view found, std::string_view expected);

// A value for an error message: one line, never long.
std::string Show(std::string_view text);
std::string Show(JsonElement value);
std::string Show(const JsonResult& value);

bool IsNullOrAbsent(const JsonResult& value);
bool IsString(const JsonResult& value, std::string_view expected);
bool IsFalse(const JsonResult& value);

// Whether everything besides the vocabulary is what DeepSeek-V4's files say: no truncation, padding or normalizer, the
// released splits, byte-level everywhere, plain BPE. Errors: BadTokenizer.
absl::Status CheckPipeline(JsonElement root);

}  // namespace millrace::text
