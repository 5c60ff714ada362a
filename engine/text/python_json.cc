// SPDX-License-Identifier: Apache-2.0
// The reader is a handler of strict_json that builds the document itself, because nlohmann's own would round large
// integers and takes quadratic time for objects with many keys.
#include "engine/text/python_json.h"

#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "engine/status.h"
#include "engine/strict_json.h"
#include "engine/text/concat.h"

namespace millrace::text {
namespace {

// Marks a binary value whose bytes are the digits of an integer.
constexpr uint64_t kBigIntegerSubtype = 1;

class Builder : public StrictSaxHandler {
 public:
  // Only depth is bounded: how long a text may be is its caller's to say.
  Builder(Json& root, int max_depth)
      : StrictSaxHandler({.max_depth = max_depth,
                          .max_values = std::numeric_limits<int64_t>::max(),
                          .max_string_bytes = std::numeric_limits<size_t>::max()}),
        root_(root) {}

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t& digits) override {
    if (digits.find_first_of(".eE") != std::string::npos) return Add(value);
    return Add(BigInteger(digits));
  }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool start_object(size_t) override { return Open(Json::object()); }
  bool end_object() override { return Close(); }
  bool start_array(size_t) override { return Open(Json::array()); }
  bool end_array() override { return Close(); }
  bool key(string_t& key) override {
    Frame& frame = open_.back();
    // A plain vector under its map interface: append, and look keys up in the frame's own index.
    Json::object_t::Container& members = frame.value->get_ref<Json::object_t&>();
    const auto [known, is_new] = frame.keys.try_emplace(key, members.size());
    if (is_new) members.emplace_back(std::move(key), nullptr);
    slot_ = &members[known->second].second;
    return true;
  }

 private:
  struct Frame {
    Json* value;
    absl::flat_hash_map<std::string, size_t> keys;
  };

  template <typename Value>
  bool Add(Value&& value) {
    *Place() = std::forward<Value>(value);
    return true;
  }
  bool Open(Json container) {
    if (!Enter()) return false;
    Json* place = Place();
    *place = std::move(container);
    open_.push_back({place, {}});
    return true;
  }
  bool Close() {
    open_.pop_back();
    return Leave();
  }
  // Where the next value goes. A container that holds an open one does not grow, so the pointers stay good.
  Json* Place() {
    if (open_.empty()) return &root_;
    Json& parent = *open_.back().value;
    if (parent.is_object()) return slot_;
    parent.push_back(nullptr);
    return &parent.back();
  }

  Json& root_;
  std::vector<Frame> open_;
  Json* slot_ = nullptr;  // the value of the key last read
};

void AppendScalar(const Json& value, std::string& out) {
  switch (value.type()) {
    case Json::value_t::boolean:
      out += value.get<bool>() ? "true" : "false";
      break;
    case Json::value_t::number_integer:
      out += std::to_string(value.get<int64_t>());
      break;
    case Json::value_t::number_unsigned:
      out += std::to_string(value.get<uint64_t>());
      break;
    case Json::value_t::number_float:
      out += PythonFloatRepr(value.get<double>());
      break;
    case Json::value_t::string:
      out += QuotePythonString(value.get_ref<const std::string&>());
      break;
    case Json::value_t::binary: {
      const auto& digits = value.get_binary();
      CHECK(digits.has_subtype() && digits.subtype() == kBigIntegerSubtype, "binary value that ParseJson did not make");
      out.append(digits.begin(), digits.end());
      break;
    }
    default:
      out += "null";
  }
}

}  // namespace

Json BigInteger(std::string_view digits) {
  return Json::binary(Json::binary_t::container_type(digits.begin(), digits.end()), kBigIntegerSubtype);
}

std::string BigIntegerDigits(const Json& value) {
  if (!value.is_binary()) return "";
  const auto& digits = value.get_binary();
  return std::string(digits.begin(), digits.end());
}

absl::StatusOr<Json> ParseJson(std::string_view text, int max_depth) {
  Json root;
  Builder builder(root, max_depth);
  if (!ReadJsonEvents(text, builder)) {
    const std::string place = builder.syntax_error() ? Concat("at byte ", builder.offset(), ": ") : "";
    return absl::InvalidArgumentError(Concat("JSON: ", place, builder.error()));
  }
  return root;
}

std::string DumpPythonJson(const Json& value) {
  struct Frame {
    const Json* container;
    Json::const_iterator next;
  };
  std::string out;
  std::vector<Frame> open;
  const auto begin = [&](const Json& item) {
    if (!item.is_structured()) return AppendScalar(item, out);
    out += item.is_object() ? '{' : '[';
    open.push_back({&item, item.cbegin()});
  };
  begin(value);
  while (!open.empty()) {
    Frame& frame = open.back();
    const bool is_object = frame.container->is_object();
    if (frame.next == frame.container->cend()) {
      out += is_object ? '}' : ']';
      open.pop_back();
      continue;
    }
    if (frame.next != frame.container->cbegin()) out += ", ";
    if (is_object) {
      out += QuotePythonString(frame.next.key());
      out += ": ";
    }
    const Json& item = *frame.next++;
    begin(item);  // may move `frame`
  }
  return out;
}

std::string QuotePythonString(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string quoted = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        quoted += "\\\"";
        break;
      case '\\':
        quoted += "\\\\";
        break;
      case '\b':
        quoted += "\\b";
        break;
      case '\f':
        quoted += "\\f";
        break;
      case '\n':
        quoted += "\\n";
        break;
      case '\r':
        quoted += "\\r";
        break;
      case '\t':
        quoted += "\\t";
        break;
      default:
        if (static_cast<uint8_t>(c) >= 0x20) {
          quoted += c;
        } else {
          quoted += "\\u00";
          quoted += kHex[c >> 4];
          quoted += kHex[c & 15];
        }
    }
  }
  quoted += '"';
  return quoted;
}

std::string PythonFloatRepr(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
  char buffer[32];
  // d[.ddd]e±xx with the fewest digits that read back.
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  const std::string_view scientific(buffer, end - buffer);
  const size_t e = scientific.find('e');
  int exponent = 0;
  const size_t exponent_at = e + (scientific[e + 1] == '+' ? 2 : 1);
  std::from_chars(scientific.data() + exponent_at, end, exponent);
  // Python leaves plain notation where the decimal point would be more than 16 digits to the right or 4 to the left.
  if (exponent < -4 || exponent >= 16) return std::string(scientific);

  std::string sign, digits;
  for (const char c : scientific.substr(0, e)) {
    if (c == '-') sign = "-";
    if (c >= '0' && c <= '9') digits += c;
  }
  if (exponent < 0) return Concat(sign, "0.", std::string(-exponent - 1, '0'), digits);
  const size_t whole = static_cast<size_t>(exponent) + 1;
  if (digits.size() < whole) digits.append(whole - digits.size(), '0');
  const std::string fraction = digits.substr(whole);
  return Concat(sign, digits.substr(0, whole), ".", fraction.empty() ? "0" : fraction);
}

}  // namespace millrace::text
