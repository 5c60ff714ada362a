// SPDX-License-Identifier: Apache-2.0
// A strict JSON reader for request bodies: everything the grammar allows, nothing it does not, within limits.
//
// General readers forgive what a public server should not: byte-order marks, repeated keys (two components that pick
// different ones disagree about the request), lone surrogates, numbers that overflow, and depth or size that is only
// bounded by memory. This one refuses them with a code and the byte offset. It is iterative, linear in the input
// whatever the keys are, and keeps the order of keys, since tool schemas go to the model as they came.
//
// What does not come as a request body is engine/strict_json's; why there are two is docs/adr/0007.
//
// Thread: any; pure functions.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string_view>

#include "absl/status/statusor.h"

namespace millrace::router {

using Json = nlohmann::ordered_json;

struct JsonLimits {
  size_t max_depth = 32;
  size_t max_nodes = 2'000'000;  // values of any kind
  size_t max_string_bytes = 8u << 20;
  size_t max_key_bytes = 256;
  size_t max_number_chars = 64;
};

// Reads exactly one value; white space may surround it. Integers beyond 64 bits keep their digits
// (text::BigInteger), since a tool's schema goes into the prompt as it was written; -0 becomes 0.
// Errors: InvalidArgument with an ApiError whose code is one of invalid_json, invalid_number, json_too_deep,
// duplicate_key, key_too_long, invalid_utf8, invalid_unicode_escape; json_too_large has HTTP status 413. The message
// ends with "at byte N", N counting from 0; at the end of a truncated input N is its length.
absl::StatusOr<Json> ReadJson(std::string_view text, const JsonLimits& limits = {});

}  // namespace millrace::router
