// SPDX-License-Identifier: Apache-2.0
// See process_memory.h.
#include "services/cli/process_memory.h"

#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"

namespace millrace::cli {

std::optional<ProcessMemory> ReadProcessMemory(pid_t pid) {
  std::ifstream status(absl::StrCat("/proc/", pid, "/status"));
  ProcessMemory memory;
  std::string key, unit;
  while (status >> key) {
    int64_t kib = 0;
    const bool wanted = key == "VmRSS:" || key == "RssAnon:" || key == "RssShmem:" || key == "RssFile:";
    if (wanted && status >> kib >> unit) {
      if (key == "VmRSS:") memory.resident_bytes = kib * 1024;
      if (key == "RssFile:") memory.file_bytes = kib * 1024;
      if (key == "RssAnon:" || key == "RssShmem:") memory.own_bytes += kib * 1024;
    }
    std::getline(status, unit);
  }
  if (memory.resident_bytes == 0) return std::nullopt;
  return memory;
}

}  // namespace millrace::cli
