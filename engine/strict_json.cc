// SPDX-License-Identifier: Apache-2.0
// JSON with limits: see strict_json.h.
#include "engine/strict_json.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace millrace {
namespace {

// Builds the tree, refusing repeated keys on the way (nlohmann's own builder keeps the last one, which lets two readers
// of one file disagree about what it says).
class TreeBuilder final : public StrictSaxHandler {
 public:
  explicit TreeBuilder(JsonLimits limits) : StrictSaxHandler(limits) {}

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t&) override { return Add(value); }
  bool string(string_t& value) override { return Count(value.size()) && Add(std::move(value)); }
  bool start_object(size_t) override { return Open(nlohmann::json::object()); }
  bool start_array(size_t) override { return Open(nlohmann::json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    if (!Count(name.size())) return false;
    if (stack_.back()->contains(name)) return Fail(absl::StrCat("found key \"", name, "\" twice, expected once"));
    key_ = std::move(name);
    return true;
  }

  nlohmann::json Take() { return std::move(root_); }

 private:
  bool Add(nlohmann::json value) {
    if (!Count()) return false;
    Place(std::move(value));
    return true;
  }
  bool Open(nlohmann::json container) {
    if (!Enter()) return false;
    stack_.push_back(Place(std::move(container)));
    return true;
  }
  bool Close() {
    stack_.pop_back();
    return Leave();
  }
  nlohmann::json* Place(nlohmann::json value) {
    if (stack_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    nlohmann::json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[key_] = std::move(value));
  }

  nlohmann::json root_;
  // Pointers stay valid: only the innermost container grows, and it is the last of the stack.
  std::vector<nlohmann::json*> stack_;
  std::string key_;
};

}  // namespace

bool StrictSaxHandler::Fail(std::string why) {
  if (error_.empty()) error_ = std::move(why);
  return false;
}

bool StrictSaxHandler::Count(size_t string_bytes) {
  if (string_bytes > limits_.max_string_bytes) {
    return Fail(
        absl::StrCat("found a string of ", string_bytes, " bytes, expected at most ", limits_.max_string_bytes));
  }
  if (++values_ > limits_.max_values) return Fail(absl::StrCat("found more than ", limits_.max_values, " values"));
  return true;
}

bool StrictSaxHandler::Enter() {
  if (++depth_ > limits_.max_depth) {
    return Fail(absl::StrCat("found nesting deeper than ", limits_.max_depth, " levels"));
  }
  return Count();
}

bool StrictSaxHandler::Leave() {
  --depth_;
  return true;
}

bool StrictSaxHandler::parse_error(size_t position, const std::string&, const nlohmann::detail::exception& error) {
  // "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error ...": keep what follows the place.
  std::string_view reason = error.what();
  if (size_t at = reason.find("] "); at != std::string_view::npos) reason.remove_prefix(at + 2);
  if (size_t at = reason.find(": "); at != std::string_view::npos) reason.remove_prefix(at + 2);
  return FailSyntax(position, std::string(reason.substr(0, 200)));
}

bool StrictSaxHandler::FailSyntax(size_t offset, std::string why) {
  syntax_error_ = true;
  offset_ = offset;
  return Fail(std::move(why));
}

bool ReadJsonEvents(std::string_view text, StrictSaxHandler& handler) {
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) {
    return handler.FailSyntax(nul, "found a NUL byte");
  }
  return nlohmann::json::sax_parse(text.begin(), text.end(), &handler);
}

absl::Status ParseJsonEvents(std::string_view text, const std::string& file, const std::string& what,
                             StrictSaxHandler& handler) {
  if (ReadJsonEvents(text, handler)) return absl::OkStatus();
  const std::string reason = absl::StrReplaceAll(handler.error(), {{"\n", " "}, {"\r", " "}});
  if (handler.syntax_error()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": invalid ", what, " at offset ", handler.offset(), ": ", reason));
  }
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", what, ": ", reason));
}

absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, const std::string& file, JsonLimits limits) {
  TreeBuilder builder(limits);
  if (absl::Status status = ParseJsonEvents(text, file, "JSON", builder); !status.ok()) return status;
  nlohmann::json root = builder.Take();
  if (!root.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": JSON: found ", root.type_name(), ", expected object"));
  }
  return root;
}

std::string JsonForError(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
  if (text.size() > 80) text = absl::StrCat(text.substr(0, 77), "...");
  return text;
}

}  // namespace millrace
