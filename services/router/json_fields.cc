// SPDX-License-Identifier: Apache-2.0
// See json_fields.h.
#include "services/router/json_fields.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "engine/text/concat.h"
#include "engine/text/python_json.h"
#include "services/common/error.h"

namespace millrace::router {

using text::Concat;

std::string DescribeJson(const Json* value) {
  if (value == nullptr) return "nothing";
  switch (value->type()) {
    case Json::value_t::null:
      return "null";
    case Json::value_t::boolean:
      return value->get<bool>() ? "true" : "false";
    case Json::value_t::string:
      return Concat("the string ", QuoteInput(value->get_ref<const std::string&>()));
    case Json::value_t::array:
      return "an array";
    case Json::value_t::object:
      return "an object";
    case Json::value_t::binary:
      return Concat("the number ", text::BigIntegerDigits(*value));
    default:
      return Concat("the number ", value->dump());
  }
}

absl::Status WrongType(std::string_view param, std::string_view expected, const Json* found) {
  return InvalidRequest("invalid_type", param,
                        Concat(param, ": expected ", expected, ", got ", DescribeJson(found), "."));
}

absl::Status Unsupported(std::string_view param, std::string_view what) {
  return InvalidRequest("unsupported_parameter", param, Concat(param, ": ", what, "."));
}

absl::Status WrongValue(std::string_view param, std::string_view expected, const Json* found) {
  return InvalidRequest("invalid_value", param,
                        Concat(param, ": expected ", expected, ", got ", DescribeJson(found), "."));
}

JsonFields::JsonFields(const Json& object, std::string prefix) : object_(object), prefix_(std::move(prefix)) {
  CHECK(object.is_object());
}

const Json* JsonFields::Get(std::string_view name) {
  known_.push_back(name);
  const auto it = object_.find(std::string(name));
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

absl::Status JsonFields::Read(std::string_view name, bool& out) {
  const Json* value = Get(name);
  if (value == nullptr) return absl::OkStatus();
  if (!value->is_boolean()) return WrongType(Path(name), "true or false", value);
  out = value->get<bool>();
  return absl::OkStatus();
}

absl::Status JsonFields::Read(std::string_view name, std::string& out, size_t max_bytes) {
  const Json* value = Get(name);
  if (value == nullptr) return absl::OkStatus();
  if (!value->is_string()) return WrongType(Path(name), "a string", value);
  const auto& text = value->get_ref<const std::string&>();
  if (text.size() > max_bytes) {
    return InvalidRequest("string_too_long", Path(name),
                          Concat(Path(name), ": has ", text.size(), " bytes, the limit is ", max_bytes, "."));
  }
  out = text;
  return absl::OkStatus();
}

absl::Status JsonFields::ReadInteger(std::string_view name, int64_t low, int64_t high, int64_t& out) {
  const Json* value = Get(name);
  if (value == nullptr) return absl::OkStatus();
  const std::string expected = Concat("an integer from ", low, " to ", high);
  if (value->is_binary()) return WrongValue(Path(name), expected, value);  // an integer beyond 64 bits
  if (!value->is_number()) return WrongType(Path(name), expected, value);
  const auto integer = AsInteger(*value);
  if (!integer || *integer < low || *integer > high) return WrongValue(Path(name), expected, value);
  out = *integer;
  return absl::OkStatus();
}

absl::Status JsonFields::ReadNumber(std::string_view name, double low, double high, double& out) {
  const Json* value = Get(name);
  if (value == nullptr) return absl::OkStatus();
  const std::string expected = Concat("a number from ", low, " to ", high);
  if (value->is_binary()) return WrongValue(Path(name), expected, value);
  if (!value->is_number()) return WrongType(Path(name), expected, value);
  const double number = value->get<double>();
  if (!(number >= low && number <= high)) return WrongValue(Path(name), expected, value);
  out = number;
  return absl::OkStatus();
}

std::vector<std::string> JsonFields::Unknown() const {
  std::vector<std::string> unknown;
  for (const auto& [name, value] : object_.items()) {
    if (std::find(known_.begin(), known_.end(), name) == known_.end()) unknown.push_back(name);
  }
  return unknown;
}

std::optional<int64_t> AsInteger(const Json& value) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (!value.is_number_float()) return std::nullopt;
  const double number = value.get<double>();
  // Beyond 2^53 a double may stand for a neighbour of what was written.
  if (number != std::trunc(number) || !(std::abs(number) <= 0x1p53)) return std::nullopt;
  return static_cast<int64_t>(number);
}

}  // namespace millrace::router
