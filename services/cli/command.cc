// SPDX-License-Identifier: Apache-2.0
// What every subcommand shares: error lines, help, reading input.
#include "services/cli/command.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/status.h"
#include "services/cli/terminal.h"
#include "spdlog/spdlog.h"

namespace millrace::cli {

int Fail(absl::string_view command, int exit_code, absl::string_view message) {
  // One line whatever the message holds: scripts and people read the last line of standard error.
  const std::string line = absl::StrReplaceAll(absl::StripAsciiWhitespace(message), {{"\n", " "}, {"\r", " "}});
  const bool colour = IsTerminal(STDERR_FILENO);
  std::fprintf(stderr, "%smillrace %s:%s %s\n", colour ? "\033[1;31m" : "", std::string(command).c_str(),
               colour ? "\033[0m" : "", line.c_str());
  return exit_code;
}

bool ParseOrExplain(Flags& flags, absl::string_view command, Arguments arguments, int* exit_code) {
  if (absl::Status status = flags.Parse(arguments); !status.ok()) {
    *exit_code = Fail(command, kExitUsage, status);
    return false;
  }
  if (flags.help_requested()) {
    std::fputs(flags.Help(TerminalWidth(STDOUT_FILENO)).c_str(), stdout);
    *exit_code = kExitOk;
    return false;
  }
  return true;
}

void AddCoreDumpsFlag(Flags& flags, bool* core_dumps) {
  flags.Bool("core-dumps", core_dumps,
             "Allow core dumps of this process, and debuggers of the same user. What requests say is in them.");
}

void KeepMemoryPrivate(bool core_dumps) {
  if (core_dumps) {
    spdlog::warn("a core dump of this process will hold what requests say (--core-dumps)");
    return;
  }
  CHECK(prctl(PR_SET_DUMPABLE, 0) == 0, "prctl");
}

absl::StatusOr<std::string> ReadInput(const std::string& path, int64_t max_bytes) {
  std::FILE* file = path == "-" ? stdin : std::fopen(path.c_str(), "rb");
  if (file == nullptr) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  std::string content;
  char buffer[1 << 16];
  size_t got = 0;
  while ((got = std::fread(buffer, 1, sizeof(buffer), file)) > 0) {
    content.append(buffer, got);
    if (static_cast<int64_t>(content.size()) > max_bytes) break;
  }
  const bool failed = std::ferror(file) != 0;
  const int error = errno;
  if (file != stdin) std::fclose(file);
  if (failed) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(error)));
  if (static_cast<int64_t>(content.size()) > max_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": larger than ", max_bytes, " bytes"));
  }
  return content;
}

}  // namespace millrace::cli
