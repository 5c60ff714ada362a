// SPDX-License-Identifier: Apache-2.0
// Typed access to the fields of a request object, with errors that name the field, what was expected and what came.
//
// Values are never converted silently: "10" is not 10, 1 is not true, 1.5 is no integer. A whole number may be written
// any way JSON allows (1e3). null means absent, as client libraries send it. Every field asked for is noted, and what
// is left over is what the caller did not know.
//
// Thread: one request, one thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "services/router/json_reader.h"

namespace millrace::router {

// "a string", "the number 1.5" ...: for "found" in messages.
std::string DescribeJson(const Json* value);

absl::Status WrongType(std::string_view param, std::string_view expected, const Json* found);
// A field that this server will not honour, and ignoring it would change the answer.
absl::Status Unsupported(std::string_view param, std::string_view what);
absl::Status WrongValue(std::string_view param, std::string_view expected, const Json* found);

class JsonFields {
 public:
  // `prefix` names the object: "" for the request, "messages[2]." for a part of it. CHECK-fails unless it is an object.
  JsonFields(const Json& object, std::string prefix);

  // The value, or null if absent or null.
  const Json* Get(std::string_view name);
  std::string Path(std::string_view name) const { return prefix_ + std::string(name); }

  // Each leaves `out` as it is when the field is absent. Bounds are inclusive.
  absl::Status Read(std::string_view name, bool& out);
  absl::Status Read(std::string_view name, std::string& out, size_t max_bytes);
  absl::Status ReadInteger(std::string_view name, int64_t low, int64_t high, int64_t& out);
  absl::Status ReadNumber(std::string_view name, double low, double high, double& out);

  // Fields nobody asked for, in order.
  std::vector<std::string> Unknown() const;

 private:
  const Json& object_;
  const std::string prefix_;
  std::vector<std::string_view> known_;
};

// A whole number in any spelling, or nothing.
std::optional<int64_t> AsInteger(const Json& value);

}  // namespace millrace::router
