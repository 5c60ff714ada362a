// SPDX-License-Identifier: Apache-2.0
// What a process on this machine occupies, from the kernel's own counts. Linux only; elsewhere nothing is found.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>

namespace millrace::cli {

struct ProcessMemory {
  int64_t resident_bytes = 0;
  int64_t own_bytes = 0;   // anonymous and shared-memory pages: weights, cache, buffers, stacks
  int64_t file_bytes = 0;  // the program, its libraries and mapped files, which processes share
};

std::optional<ProcessMemory> ReadProcessMemory(pid_t pid);

}  // namespace millrace::cli
