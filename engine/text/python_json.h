// SPDX-License-Identifier: Apache-2.0
// JSON written the way Python writes it, since the model was trained on json.dumps(x, ensure_ascii=False).
//
// `, ` and `: ` between things, keys in the order received, non-ASCII raw, floats as Python's repr. Reading keeps what
// writing needs: key order, the last of two equal keys at the place of the first, and integers of any size.
//
// Thread: any; pure functions. Neither recurses: depth is bounded by the reader and harmless to the writer.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace millrace::text {

using Json = nlohmann::ordered_json;

// An integer beyond 64 bits: its digits (and sign) in a binary value that only DumpPythonJson understands, so that it
// comes out as it went in.
Json BigInteger(std::string_view digits);
// Those digits; empty for any other value.
std::string BigIntegerDigits(const Json& value);

// Reads one JSON document; integers beyond 64 bits become BigInteger.
// Errors: InvalidArgument with the byte offset; also deeper than `max_depth`.
absl::StatusOr<Json> ParseJson(std::string_view text, int max_depth = 256);

std::string DumpPythonJson(const Json& value);

// One JSON string, quoted. Broken UTF-8 is passed through: callers cut streams at any byte.
std::string QuotePythonString(std::string_view text);

// Python's repr of a float: shortest digits that read back, exponent form below 1e-4 and from 1e16.
std::string PythonFloatRepr(double value);

}  // namespace millrace::text
