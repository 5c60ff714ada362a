// SPDX-License-Identifier: Apache-2.0
// One pass over the bytes with an explicit stack of open containers.
//
// A container under construction lives in its frame and moves into its parent when it closes; appending to the frame
// directly avoids ordered_json's linear search for the key, which would make many keys quadratic. Repeated keys are
// found by sorting each object's keys once, when it closes: no hash, so no collisions to provoke.
#include "services/router/json_reader.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/charconv.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "engine/text/python_json.h"
#include "services/common/error.h"

namespace millrace::router {
namespace {

class Reader {
 public:
  Reader(std::string_view text, const JsonLimits& limits) : text_(text), limits_(limits) {}

  absl::StatusOr<Json> Read() {
    if (text_.substr(0, 3) == "\xEF\xBB\xBF") return Error("invalid_json", "A byte-order mark is not JSON", 0);
    SkipSpace();
    if (AtEnd()) return Error("invalid_json", "Expected a JSON value, found nothing", at_);
    RETURN_IF_ERROR(ReadValueAndAllItOpens());
    SkipSpace();
    if (!AtEnd()) return Error("invalid_json", "Unexpected text after the JSON value", at_);
    return std::move(result_);
  }

 private:
  struct Frame {
    bool is_object = false;
    Json::array_t items;
    Json::object_t members;
    std::vector<size_t> key_offsets;  // where each member's key starts, for the error
  };

  // The loop alternates between "a value starts here" and "a value ended here".
  absl::Status ReadValueAndAllItOpens() {
    while (true) {
      SkipSpace();
      if (AtEnd()) return Truncated();
      if (++nodes_ > limits_.max_nodes) {
        return TooLarge(absl::StrCat("More than ", limits_.max_nodes, " JSON values"));
      }
      const char c = text_[at_];
      Json value;
      if (c == '{' || c == '[') {
        if (stack_.size() >= limits_.max_depth) {
          return Error("json_too_deep", absl::StrCat("JSON nested deeper than ", limits_.max_depth), at_);
        }
        ++at_;
        stack_.emplace_back();
        stack_.back().is_object = c == '{';
        SkipSpace();
        if (AtEnd()) return Truncated();
        if (text_[at_] != (c == '{' ? '}' : ']')) {
          if (c == '{') RETURN_IF_ERROR(ReadKey());
          continue;  // the first element's value starts here
        }
        ++at_;
        ASSIGN_OR_RETURN(value, CloseContainer());
      } else {
        ASSIGN_OR_RETURN(value, ReadScalar(c));
      }
      bool more = false;
      ASSIGN_OR_RETURN(more, Attach(std::move(value)));
      if (!more) return absl::OkStatus();
    }
  }

  // Puts a finished value where it belongs and closes what closes after it. True: another value starts at at_.
  absl::StatusOr<bool> Attach(Json value) {
    while (true) {
      if (stack_.empty()) {
        result_ = std::move(value);
        return false;
      }
      Frame& frame = stack_.back();
      if (frame.is_object) {
        frame.members.back().second = std::move(value);
      } else {
        frame.items.push_back(std::move(value));
      }
      SkipSpace();
      if (AtEnd()) return Truncated();
      const char c = text_[at_];
      if (c == ',') {
        ++at_;
        if (frame.is_object) {
          SkipSpace();
          RETURN_IF_ERROR(ReadKey());
        }
        return true;
      }
      if (c != (frame.is_object ? '}' : ']')) {
        return Error("invalid_json", frame.is_object ? "Expected ',' or '}'" : "Expected ',' or ']'", at_);
      }
      ++at_;
      ASSIGN_OR_RETURN(value, CloseContainer());
    }
  }

  absl::StatusOr<Json> CloseContainer() {
    Frame frame = std::move(stack_.back());
    stack_.pop_back();
    if (!frame.is_object) return Json(std::move(frame.items));
    RETURN_IF_ERROR(CheckKeysDiffer(frame));
    return Json(std::move(frame.members));
  }

  absl::Status CheckKeysDiffer(const Frame& frame) {
    if (frame.members.size() < 2) return absl::OkStatus();
    std::vector<size_t> order(frame.members.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    const auto key = [&](size_t i) -> const std::string& { return frame.members.begin()[i].first; };
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return std::pair(std::string_view(key(a)), a) < std::pair(std::string_view(key(b)), b);
    });
    size_t first_repeat = frame.members.size();
    for (size_t i = 1; i < order.size(); ++i) {
      if (key(order[i - 1]) == key(order[i])) first_repeat = std::min(first_repeat, order[i]);
    }
    if (first_repeat == frame.members.size()) return absl::OkStatus();
    return Error("duplicate_key", absl::StrCat("Key ", QuoteInput(key(first_repeat)), " appears twice"),
                 frame.key_offsets[first_repeat]);
  }

  // A key, its colon, and a member waiting for its value.
  absl::Status ReadKey() {
    if (AtEnd()) return Truncated();
    const size_t start = at_;
    if (text_[at_] != '"') return Error("invalid_json", "Expected a key in double quotes", at_);
    std::string key;
    RETURN_IF_ERROR(ReadString(limits_.max_key_bytes, /*is_key=*/true, key));
    SkipSpace();
    if (AtEnd()) return Truncated();
    if (text_[at_] != ':') return Error("invalid_json", "Expected ':'", at_);
    ++at_;
    // Past ordered_map's own emplace, which searches.
    static_cast<Json::object_t::Container&>(stack_.back().members).emplace_back(std::move(key), nullptr);
    stack_.back().key_offsets.push_back(start);
    return absl::OkStatus();
  }

  absl::StatusOr<Json> ReadScalar(char c) {
    if (c == '"') {
      std::string value;
      RETURN_IF_ERROR(ReadString(limits_.max_string_bytes, /*is_key=*/false, value));
      return Json(std::move(value));
    }
    if (c == '-' || (c >= '0' && c <= '9')) return ReadNumber();
    if (Accept("true")) return Json(true);
    if (Accept("false")) return Json(false);
    if (Accept("null")) return Json(nullptr);
    for (const std::string_view word : {"true", "false", "null"}) {
      const std::string_view rest = text_.substr(at_);
      if (rest.size() < word.size() && word.substr(0, rest.size()) == rest) return Truncated();
    }
    for (const std::string_view word : {"NaN", "Infinity", "+", "."}) {
      if (text_.substr(at_, word.size()) == word) return Error("invalid_number", "Not a JSON number", at_);
    }
    return Error("invalid_json", "Expected a JSON value", at_);
  }

  absl::StatusOr<Json> ReadNumber() {
    const size_t start = at_;
    const auto bad = [&] { return AtEnd() ? Truncated() : Error("invalid_number", "Not a JSON number", start); };
    const auto digits = [&] {
      const size_t from = at_;
      while (!AtEnd() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
      return at_ - from;
    };
    bool is_integer = true;
    if (text_[at_] == '-') ++at_;
    const size_t first_digit = at_;
    const size_t whole = digits();
    if (whole == 0) return bad();
    if (whole > 1 && text_[first_digit] == '0') return Error("invalid_number", "A number may not start with 0", start);
    if (!AtEnd() && text_[at_] == '.') {
      is_integer = false;
      ++at_;
      if (digits() == 0) return bad();
    }
    if (!AtEnd() && (text_[at_] == 'e' || text_[at_] == 'E')) {
      is_integer = false;
      ++at_;
      if (!AtEnd() && (text_[at_] == '+' || text_[at_] == '-')) ++at_;
      if (digits() == 0) return bad();
    }
    // Letters glued to a number (0x1F, 1f) are one wrong number, not a number and something else.
    if (!AtEnd() && (std::isalpha(static_cast<unsigned char>(text_[at_])) || text_[at_] == '.')) return bad();
    const std::string_view token = text_.substr(start, at_ - start);
    if (token.size() > limits_.max_number_chars) {
      return Error("invalid_number", absl::StrCat("Number longer than ", limits_.max_number_chars, " characters"),
                   start);
    }
    return ConvertNumber(token, is_integer, start);
  }

  absl::StatusOr<Json> ConvertNumber(std::string_view token, bool is_integer, size_t start) {
    const char* const end = token.data() + token.size();
    if (is_integer) {
      if (int64_t value = 0; std::from_chars(token.data(), end, value).ec == std::errc()) return Json(value);
      if (uint64_t value = 0; token[0] != '-' && std::from_chars(token.data(), end, value).ec == std::errc()) {
        return Json(value);
      }
      return text::BigInteger(token);
    }
    double value = 0;
    const auto result = absl::from_chars(token.data(), end, value);
    if (result.ec == std::errc::result_out_of_range && !(value > -1 && value < 1)) {  // underflow to 0 is fine
      return Error("invalid_number", "Number out of range", start);
    }
    return Json(value);
  }

  // From the opening quote past the closing one.
  absl::Status ReadString(size_t max_bytes, bool is_key, std::string& out) {
    ++at_;
    while (true) {
      // The common case in one sweep: printable ASCII that needs no decision.
      const size_t from = at_;
      while (at_ < text_.size() && IsPlain(text_[at_])) ++at_;
      out.append(text_, from, at_ - from);
      if (out.size() > max_bytes) {
        if (is_key) return Error("key_too_long", absl::StrCat("Key longer than ", max_bytes, " bytes"), from);
        return TooLarge(absl::StrCat("String longer than ", max_bytes, " bytes"));
      }
      if (AtEnd()) return Truncated();
      const unsigned char c = text_[at_];
      if (c == '"') {
        ++at_;
        return absl::OkStatus();
      }
      if (c == '\\') {
        RETURN_IF_ERROR(ReadEscape(out));
      } else if (c < 0x20) {
        return Error("invalid_json", "Control characters in strings must be escaped", at_);
      } else {
        RETURN_IF_ERROR(ReadUtf8(out));
      }
    }
  }

  static bool IsPlain(char c) { return static_cast<unsigned char>(c) - 0x20u < 0x60 && c != '"' && c != '\\'; }

  absl::Status ReadEscape(std::string& out) {
    const size_t start = at_++;
    if (AtEnd()) return Truncated();
    switch (text_[at_++]) {
      case '"':
        out += '"';
        return absl::OkStatus();
      case '\\':
        out += '\\';
        return absl::OkStatus();
      case '/':
        out += '/';
        return absl::OkStatus();
      case 'b':
        out += '\b';
        return absl::OkStatus();
      case 'f':
        out += '\f';
        return absl::OkStatus();
      case 'n':
        out += '\n';
        return absl::OkStatus();
      case 'r':
        out += '\r';
        return absl::OkStatus();
      case 't':
        out += '\t';
        return absl::OkStatus();
      case 'u':
        break;
      default:
        return Error("invalid_json", "Unknown escape in a string", start);
    }
    uint32_t code = 0;
    ASSIGN_OR_RETURN(code, ReadHex4());
    if (code >= 0xDC00 && code <= 0xDFFF) return LoneSurrogate(start);
    if (code >= 0xD800 && code <= 0xDBFF) {
      if (AtEnd() || (text_[at_] == '\\' && at_ + 1 == text_.size())) return Truncated();
      if (text_[at_] != '\\' || text_[at_ + 1] != 'u') return LoneSurrogate(start);
      at_ += 2;
      uint32_t low = 0;
      ASSIGN_OR_RETURN(low, ReadHex4());
      if (low < 0xDC00 || low > 0xDFFF) return LoneSurrogate(start);
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    AppendUtf8(code, out);
    return absl::OkStatus();
  }

  absl::StatusOr<uint32_t> ReadHex4() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      if (AtEnd()) return Truncated();
      const char c = text_[at_];
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) return Error("invalid_unicode_escape", "\\u needs four hexadecimal digits", at_);
      code = code * 16 + static_cast<uint32_t>(digit);
    }
    return code;
  }

  static void AppendUtf8(uint32_t code, std::string& out) {
    const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
    if (code < 0x80) {
      put(code);
    } else if (code < 0x800) {
      put(0xC0 | code >> 6), put(0x80 | (code & 63));
    } else if (code < 0x10000) {
      put(0xE0 | code >> 12), put(0x80 | (code >> 6 & 63)), put(0x80 | (code & 63));
    } else {
      put(0xF0 | code >> 18), put(0x80 | (code >> 12 & 63)), put(0x80 | (code >> 6 & 63)), put(0x80 | (code & 63));
    }
  }

  // One multi-byte character. The range of the second byte is what excludes overlong forms, surrogates and > U+10FFFF.
  absl::Status ReadUtf8(std::string& out) {
    const size_t start = at_;
    const unsigned char lead = text_[at_];
    size_t length = 0;
    unsigned char low = 0x80, high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
      length = 2;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
      length = 3;
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      length = 4;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    } else {
      return Error("invalid_utf8", "Invalid UTF-8", start);
    }
    for (size_t i = 1; i < length; ++i) {
      if (start + i >= text_.size()) {
        at_ = text_.size();
        return Truncated();
      }
      const unsigned char c = text_[start + i];
      if (c < low || c > high) return Error("invalid_utf8", "Invalid UTF-8", start + i);
      low = 0x80, high = 0xBF;
    }
    out.append(text_, start, length);
    at_ = start + length;
    return absl::OkStatus();
  }

  bool Accept(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  bool AtEnd() const { return at_ >= text_.size(); }

  void SkipSpace() {
    while (!AtEnd() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) ++at_;
  }

  absl::Status Truncated() const { return Error("invalid_json", "JSON ends too early", text_.size()); }
  absl::Status LoneSurrogate(size_t at) const {
    return Error("invalid_unicode_escape", "\\u escape is half of a surrogate pair", at);
  }

  absl::Status Error(std::string_view code, absl::string_view what, size_t at) const {
    return InvalidRequest(code, "", absl::StrCat(what, " at byte ", at, "."));
  }

  absl::Status TooLarge(absl::string_view what) const {
    return MakeError(absl::StatusCode::kInvalidArgument, absl::StrCat(what, " at byte ", at_, "."),
                     {.code = "json_too_large", .http_status = 413});
  }

  const std::string_view text_;
  const JsonLimits& limits_;
  size_t at_ = 0;
  size_t nodes_ = 0;
  std::vector<Frame> stack_;
  Json result_;
};

}  // namespace

absl::StatusOr<Json> ReadJson(std::string_view text, const JsonLimits& limits) { return Reader(text, limits).Read(); }

}  // namespace millrace::router
