// SPDX-License-Identifier: Apache-2.0
// Flags and arguments of one subcommand, as a table: parsing, checking and --help come from the same lines.
//
// A subcommand declares where each value goes, its allowed range and one sentence about it; Parse() fills the variables
// or says in one line what is wrong and what would be right. Written here because Abseil's flags are global to the
// program, and thirteen subcommands in one program each have their own.
//
// Accepted: --name=value, --name value, -h, --help; booleans as --name, --name=true|false, --no-name; `--` ends flags.
// A flag given twice is an error, except repeated ones. Thread: none in particular; build, parse, drop.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace millrace::cli {

class Flags {
 public:
  // `command` as typed ("run"); `summary` one sentence without a full stop; `text` whole paragraphs, examples included.
  Flags(std::string command, std::string summary, std::string text);

  // Positional arguments, in order of declaration. An optional one leaves *value as it is.
  void Positional(std::string name, std::string* value, std::string help, bool required = true);

  // The value of *value at declaration is the default that --help shows.
  void String(std::string name, std::string* value, std::string placeholder, std::string help);
  void Repeated(std::string name, std::vector<std::string>* values, std::string placeholder, std::string help);
  void Int(std::string name, int64_t* value, int64_t min, int64_t max, std::string help);
  void Double(std::string name, double* value, double min, double max, std::string help);
  void Bool(std::string name, bool* value, std::string help);
  void Enum(std::string name, std::string* value, std::vector<std::string> allowed, std::string help);
  // For tests and scripts: accepted, not listed by --help.
  void Hidden(absl::string_view name);

  // InvalidArgument with one line that names the flag, what was given and what is allowed. When --help was asked for
  // nothing is required and help_requested() is true.
  absl::Status Parse(absl::Span<const absl::string_view> arguments);
  bool help_requested() const { return help_requested_; }
  // Whether the flag was on the command line (not its default).
  bool Given(absl::string_view name) const;

  std::string Help(int width = 100) const;
  std::string Usage() const;  // one line

 private:
  struct Flag {
    std::string name, placeholder, help, default_text;
    bool is_bool = false, repeated = false, hidden = false, given = false;
    std::function<absl::Status(absl::string_view)> set;
  };
  struct Argument {
    std::string name, help;
    std::string* value;
    bool required;
  };
  Flag& Add(std::string name, std::string placeholder, std::string help, std::string default_text);
  Flag* Find(absl::string_view name);
  absl::Status ParseFlag(absl::Span<const absl::string_view> arguments, size_t& i);
  absl::Status Unknown(absl::string_view name) const;

  std::string command_, summary_, text_;
  std::vector<Flag> flags_;
  std::vector<Argument> arguments_;
  bool help_requested_ = false;
};

}  // namespace millrace::cli
