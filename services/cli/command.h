// SPDX-License-Identifier: Apache-2.0
// What main.cc knows of a subcommand: a name, a sentence, and a function from arguments to an exit status.
//
// Each subcommand is one file that defines one Run function; main.cc holds the table. A Run function parses its flags,
// does its work, prints results to standard output and at most one line of error to standard error (Fail). Exit
// statuses are those of sysexits.h where one fits, so that scripts can tell a bad model file from a busy port.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/cli/flags.h"

namespace millrace::cli {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailure = 1;        // the work was done and its result is a failure
inline constexpr int kExitUsage = 64;         // flags or arguments
inline constexpr int kExitBadModel = 65;      // a model file is missing or wrong
inline constexpr int kExitNoInput = 66;       // an input file of the user's is missing or wrong
inline constexpr int kExitUnavailable = 69;   // a peer, a port or capacity is not there
inline constexpr int kExitSoftware = 70;      // our fault
inline constexpr int kExitCantCreate = 73;    // an output could not be written
inline constexpr int kExitConfig = 78;        // the configuration document
inline constexpr int kExitInterrupted = 130;  // Ctrl-C

using Arguments = absl::Span<const absl::string_view>;

struct Command {
  absl::string_view name;
  absl::string_view summary;
  int (*run)(Arguments);
  absl::string_view group;
};

int RunUp(Arguments);
int RunRouter(Arguments);
int RunPrefill(Arguments);
int RunDecode(Arguments);
int RunExpert(Arguments);
int RunRun(Arguments);
int RunChat(Arguments);
int RunBench(Arguments);
int RunScore(Arguments);
int RunEncode(Arguments);
int RunTokenize(Arguments);
int RunDetokenize(Arguments);
int RunInspect(Arguments);
int RunKey(Arguments);
int RunConfig(Arguments);
int RunDoctor(Arguments);
int RunDrain(Arguments);
int RunExplain(Arguments);
int RunHealth(Arguments);
int RunTop(Arguments);
int RunVersion(Arguments);

// Prints "millrace run: message" as one line on standard error and returns `exit_code`.
int Fail(absl::string_view command, int exit_code, absl::string_view message);
inline int Fail(absl::string_view command, int exit_code, const absl::Status& status) {
  return Fail(command, exit_code, status.message());
}

// Parses, or prints help or the error. True: go on. False: return *exit_code.
bool ParseOrExplain(Flags& flags, absl::string_view command, Arguments arguments, int* exit_code);

// The flag of every serving role, and what it stands for: no core dump of this process, and no other process of the
// same user may read its memory, which holds what requests say. On request both, with a warning in the log.
void AddCoreDumpsFlag(Flags& flags, bool* core_dumps);
void KeepMemoryPrivate(bool core_dumps);

// Whole file as a string; "-" is standard input. NotFound names the path; refuses more than `max_bytes`.
absl::StatusOr<std::string> ReadInput(const std::string& path, int64_t max_bytes = int64_t{64} << 20);

// "millrace 0.1.0".
std::string VersionLine();

}  // namespace millrace::cli
