// SPDX-License-Identifier: Apache-2.0
// What this machine is, as far as our commands care: memory, processors, limits, cards. Linux only.
//
// Everything is read, nothing is changed, and what cannot be read is absent rather than guessed. Thread: any.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace millrace::cli {

struct MachineMemory {
  int64_t total = 0;      // of the machine, or of this control group if that is less
  int64_t available = 0;  // now, by the kernel's estimate
  bool limited = false;   // the control group's limit is the smaller one
};
MachineMemory ReadMachineMemory();

struct Gpu {
  std::string name;
  int64_t memory_bytes = 0;
  int major = 0, minor = 0;  // compute capability
};
struct GpuState {
  std::string driver;   // version of the kernel's driver; empty: none is loaded
  std::string problem;  // why no card can be used although there is a driver
  std::vector<Gpu> gpus;
};
// Through the driver's library, which is opened for the call; no library of CUDA is needed.
GpuState ReadGpus();

std::optional<std::string> ReadLine(const std::string& path);  // the first line of a small file

// "8 GiB", "512 MiB", "1000000": bytes. Nothing: not a size.
std::optional<int64_t> ParseBytes(const std::string& text);

}  // namespace millrace::cli
