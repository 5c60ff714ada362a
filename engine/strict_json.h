// SPDX-License-Identifier: Apache-2.0
// JSON that we did not write: nlohmann's parser behind limits it does not have itself. The engine's one reader.
//
// Refuses what the grammar allows but no honest text has: deep nesting, long strings, too many values, NUL bytes (the
// parser would take one for the end of the text). Three ways in: a tree for small files, without repeated keys; a
// handler base for tables too large to hold twice (safetensors headers); and text/python_json, a handler that keeps
// what Python keeps. tokenizer.json is simdjson's, request bodies are services/router/json_reader's (docs/adr/0007).
// Nothing throws. Thread: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace millrace {

struct JsonLimits {
  int max_depth = 16;
  int64_t max_values = 1 << 20;       // scalars, containers and keys together
  size_t max_string_bytes = 1 << 20;  // of a key or a string value
};

// A SAX handler that stops at the first thing it does not like and remembers why. Derive, override the events that are
// allowed and end the others with Fail(); every override first asks Count().
class StrictSaxHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit StrictSaxHandler(JsonLimits limits) : limits_(limits) {}

  bool null() override { return Fail("found null"); }
  bool boolean(bool) override { return Fail("found a boolean"); }
  bool number_integer(number_integer_t) override { return Fail("found a negative number"); }
  bool number_unsigned(number_unsigned_t) override { return Fail("found a number"); }
  bool number_float(number_float_t, const string_t&) override { return Fail("found a fraction or a huge number"); }
  bool string(string_t&) override { return Fail("found a string"); }
  bool binary(binary_t&) override { return Fail("found binary data"); }
  bool start_array(size_t) override { return Fail("found an array"); }
  bool end_array() override { return Fail("found the end of an array"); }
  bool parse_error(size_t position, const std::string& last_token, const nlohmann::detail::exception& error) override;
  bool FailSyntax(size_t offset, std::string why);

  // Empty while all is well. `syntax_error` says that the text is not JSON, with `offset` where it stops being so.
  const std::string& error() const { return error_; }
  bool syntax_error() const { return syntax_error_; }
  size_t offset() const { return offset_; }

 protected:
  bool Fail(std::string why);
  bool Count(size_t string_bytes = 0);  // one more value or key: false when a limit is reached
  bool Enter();                         // a container opens
  bool Leave();

 private:
  JsonLimits limits_;
  int depth_ = 0;
  int64_t values_ = 0;
  std::string error_;
  bool syntax_error_ = false;
  size_t offset_ = 0;
};

// Feeds `text` to `handler`: true when all of it was taken, else the handler knows why.
bool ReadJsonEvents(std::string_view text, StrictSaxHandler& handler);

// The same with the error of a file. InvalidArgument: "`file`: invalid `what` at offset N: reason" when it is not JSON,
// or
// "`file`: `what`: reason" when the handler refused it.
absl::Status ParseJsonEvents(std::string_view text, const std::string& file, const std::string& what,
                             StrictSaxHandler& handler);

// The tree of one small JSON text whose root must be an object.
absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, const std::string& file, JsonLimits limits = {});

// `value` as it should look in an error: JSON, cut to a readable length, one line.
std::string JsonForError(const nlohmann::json& value);

}  // namespace millrace
