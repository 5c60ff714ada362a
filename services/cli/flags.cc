// SPDX-License-Identifier: Apache-2.0
// The table of flags.h: matching, conversion, and the help text made from the same declarations.
#include "services/cli/flags.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/status.h"

namespace millrace::cli {
namespace {

// What the user typed, fit for an error line: escaped and at most 64 bytes.
std::string Quoted(absl::string_view text) {
  const absl::string_view head = text.substr(0, 64);
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(std::string(head)), text.size() > 64 ? "..." : "", "\"");
}

size_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row[b.size()];
}

// Appends `text` to `out`, wrapped at `width` with `indent` spaces before every line but the first.
void AppendWrapped(std::string& out, absl::string_view text, size_t indent, size_t width) {
  size_t column = indent;
  bool first = true;
  for (absl::string_view word : absl::StrSplit(text, ' ', absl::SkipEmpty())) {
    if (!first && column + 1 + word.size() > width) {
      absl::StrAppend(&out, "\n", std::string(indent, ' '));
      column = indent;
      first = true;
    }
    absl::StrAppend(&out, first ? "" : " ", word);
    column += word.size() + (first ? 0 : 1);
    first = false;
  }
}

}  // namespace

Flags::Flags(std::string command, std::string summary, std::string text)
    : command_(std::move(command)), summary_(std::move(summary)), text_(std::move(text)) {}

void Flags::Positional(std::string name, std::string* value, std::string help, bool required) {
  arguments_.push_back({std::move(name), std::move(help), value, required});
}

Flags::Flag& Flags::Add(std::string name, std::string placeholder, std::string help, std::string default_text) {
  CHECK(Find(name) == nullptr, absl::StrCat("flag --", name, " declared twice"));
  Flag& flag = flags_.emplace_back();
  flag.name = std::move(name);
  flag.placeholder = std::move(placeholder);
  flag.help = std::move(help);
  flag.default_text = std::move(default_text);
  return flag;
}

void Flags::String(std::string name, std::string* value, std::string placeholder, std::string help) {
  Add(std::move(name), std::move(placeholder), std::move(help), *value).set = [value](absl::string_view text) {
    *value = std::string(text);
    return absl::OkStatus();
  };
}

void Flags::Repeated(std::string name, std::vector<std::string>* values, std::string placeholder, std::string help) {
  Flag& flag = Add(std::move(name), std::move(placeholder), std::move(help), absl::StrJoin(*values, ","));
  flag.repeated = true;
  flag.set = [values](absl::string_view text) {
    values->emplace_back(text);
    return absl::OkStatus();
  };
}

void Flags::Int(std::string name, int64_t* value, int64_t min, int64_t max, std::string help) {
  const std::string shown = absl::StrCat("--", name);
  Add(std::move(name), "N", std::move(help), absl::StrCat(*value)).set = [=](absl::string_view text) {
    int64_t parsed = 0;
    if (!absl::SimpleAtoi(text, &parsed) || parsed < min || parsed > max) {
      const std::string range = max == std::numeric_limits<int64_t>::max()
                                    ? absl::StrCat("a whole number of at least ", min)
                                    : absl::StrCat("a whole number from ", min, " to ", max);
      return absl::InvalidArgumentError(absl::StrCat(shown, ": found ", Quoted(text), ", expected ", range));
    }
    *value = parsed;
    return absl::OkStatus();
  };
}

void Flags::Double(std::string name, double* value, double min, double max, std::string help) {
  const std::string shown = absl::StrCat("--", name);
  Add(std::move(name), "X", std::move(help), absl::StrCat(*value)).set = [=](absl::string_view text) {
    double parsed = 0;
    if (!absl::SimpleAtod(text, &parsed) || !std::isfinite(parsed) || parsed < min || parsed > max) {
      return absl::InvalidArgumentError(
          absl::StrCat(shown, ": found ", Quoted(text), ", expected a number from ", min, " to ", max));
    }
    *value = parsed;
    return absl::OkStatus();
  };
}

void Flags::Bool(std::string name, bool* value, std::string help) {
  const std::string shown = absl::StrCat("--", name);
  Flag& flag = Add(std::move(name), "", std::move(help), *value ? "true" : "");
  flag.is_bool = true;
  flag.set = [=](absl::string_view text) {
    bool parsed = false;
    if (!absl::SimpleAtob(text, &parsed)) {
      return absl::InvalidArgumentError(absl::StrCat(shown, ": found ", Quoted(text), ", expected true or false"));
    }
    *value = parsed;
    return absl::OkStatus();
  };
}

void Flags::Enum(std::string name, std::string* value, std::vector<std::string> allowed, std::string help) {
  const std::string shown = absl::StrCat("--", name);
  const std::string placeholder = absl::StrJoin(allowed, "|");
  Add(std::move(name), placeholder, std::move(help), *value).set = [=](absl::string_view text) {
    if (std::find(allowed.begin(), allowed.end(), text) == allowed.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(shown, ": found ", Quoted(text), ", expected one of ", absl::StrJoin(allowed, ", ")));
    }
    *value = std::string(text);
    return absl::OkStatus();
  };
}

void Flags::Hidden(absl::string_view name) {
  Flag* flag = Find(name);
  CHECK(flag != nullptr, absl::StrCat("flag --", name, " is not declared"));
  flag->hidden = true;
}

Flags::Flag* Flags::Find(absl::string_view name) {
  for (Flag& flag : flags_) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

bool Flags::Given(absl::string_view name) const {
  for (const Flag& flag : flags_) {
    if (flag.name == name) return flag.given;
  }
  return false;
}

absl::Status Flags::Parse(absl::Span<const absl::string_view> arguments) {
  for (absl::string_view argument : arguments) {
    if (argument == "--") break;
    if (argument == "--help" || argument == "-h") {
      help_requested_ = true;
      return absl::OkStatus();
    }
  }
  size_t next_argument = 0;
  bool flags_over = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const absl::string_view argument = arguments[i];
    if (!flags_over && argument == "--") {
      flags_over = true;
    } else if (!flags_over && argument.size() > 1 && argument[0] == '-') {
      RETURN_IF_ERROR(ParseFlag(arguments, i));
    } else if (next_argument < arguments_.size()) {
      *arguments_[next_argument++].value = std::string(argument);
    } else {
      return absl::InvalidArgumentError(absl::StrCat("unexpected argument ", Quoted(argument), "; usage: ", Usage()));
    }
  }
  if (next_argument < arguments_.size() && arguments_[next_argument].required) {
    return absl::InvalidArgumentError(
        absl::StrCat("missing argument ", arguments_[next_argument].name, "; usage: ", Usage()));
  }
  return absl::OkStatus();
}

absl::Status Flags::ParseFlag(absl::Span<const absl::string_view> arguments, size_t& i) {
  absl::string_view name = arguments[i];
  if (name.substr(0, 2) != "--") return Unknown(name);
  name.remove_prefix(2);
  absl::string_view value;
  bool has_value = false;
  if (const size_t equals = name.find('='); equals != absl::string_view::npos) {
    value = name.substr(equals + 1);
    name = name.substr(0, equals);
    has_value = true;
  }
  Flag* flag = Find(name);
  if (flag == nullptr && !has_value && name.substr(0, 3) == "no-") {
    flag = Find(name.substr(3));
    if (flag != nullptr && !flag->is_bool) flag = nullptr;
    value = "false";
    has_value = true;
  }
  if (flag == nullptr) return Unknown(arguments[i].substr(0, name.size() + 2));
  if (flag->given && !flag->repeated) {
    return absl::InvalidArgumentError(absl::StrCat("--", flag->name, " is given twice"));
  }
  if (!has_value) {
    if (flag->is_bool) {
      value = "true";
    } else if (i + 1 < arguments.size()) {
      value = arguments[++i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat("--", flag->name, " needs a value: ", flag->placeholder));
    }
  }
  flag->given = true;
  return flag->set(value);
}

absl::Status Flags::Unknown(absl::string_view name) const {
  absl::string_view bare = name;
  while (!bare.empty() && bare[0] == '-') bare.remove_prefix(1);
  const Flag* nearest = nullptr;
  size_t best = bare.size() / 3 + 1;  // more edits than that is another word
  for (const Flag& flag : flags_) {
    const size_t distance = EditDistance(bare, flag.name);
    if (!flag.hidden && distance <= best) {
      best = distance;
      nearest = &flag;
    }
  }
  return absl::InvalidArgumentError(absl::StrCat("unknown flag ", Quoted(name),
                                                 nearest ? absl::StrCat("; did you mean --", nearest->name, "?") : "",
                                                 " See millrace ", command_, " --help"));
}

std::string Flags::Usage() const {
  std::string usage = absl::StrCat("millrace ", command_);
  for (const Argument& argument : arguments_) {
    absl::StrAppend(&usage, argument.required ? " " : " [", argument.name, argument.required ? "" : "]");
  }
  if (!flags_.empty()) usage += " [flags]";
  return usage;
}

std::string Flags::Help(int width) const {
  std::string out = absl::StrCat(summary_, ".\n\nUsage: ", Usage(), "\n");
  if (!text_.empty()) absl::StrAppend(&out, "\n", text_, "\n");
  constexpr size_t kIndent = 30;
  const auto entry = [&](const std::string& left, const std::string& help) {
    absl::StrAppend(&out, "  ", left);
    if (left.size() + 4 > kIndent) {
      absl::StrAppend(&out, "\n", std::string(kIndent, ' '));
    } else {
      out += std::string(kIndent - left.size() - 2, ' ');
    }
    AppendWrapped(out, help, kIndent, width);
    out += "\n";
  };
  if (!arguments_.empty()) out += "\nArguments:\n";
  for (const Argument& argument : arguments_) entry(argument.name, argument.help);
  out += "\nFlags:\n";
  for (const Flag& flag : flags_) {
    if (flag.hidden) continue;
    std::string help = flag.help;
    if (!flag.default_text.empty()) absl::StrAppend(&help, " [default: ", flag.default_text, "]");
    entry(absl::StrCat("--", flag.name, flag.placeholder.empty() ? "" : " ", flag.placeholder), help);
  }
  entry("--help", "This text.");
  return out;
}

}  // namespace millrace::cli
