// SPDX-License-Identifier: Apache-2.0
// See machine.h.
#include "services/cli/machine.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <limits>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace millrace::cli {
namespace {

// The smallest limit on the way up from our control group, in either version of the hierarchy.
std::optional<int64_t> GroupLimit() {
  std::ifstream groups("/proc/self/cgroup");
  std::optional<int64_t> least;
  for (std::string line; std::getline(groups, line);) {
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    const bool unified = parts[1].empty();
    if (!unified && parts[1] != "memory") continue;
    const std::string root = unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    const std::string file = unified ? "/memory.max" : "/memory.limit_in_bytes";
    for (std::string path = parts[2];; path = path.substr(0, path.rfind('/'))) {
      int64_t limit = 0;
      const auto text = ReadLine(absl::StrCat(root, path == "/" ? "" : path, file));
      if (text && absl::SimpleAtoi(*text, &limit) && limit > 0) least = std::min(least.value_or(limit), limit);
      if (path.empty() || path == "/") break;
    }
  }
  return least;
}

// The driver's library as we need it: six functions, named as in cuda.h.
class Driver {
 public:
  Driver() : handle_(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {}
  ~Driver() {
    if (handle_ != nullptr) dlclose(handle_);
  }
  bool loaded() const { return handle_ != nullptr; }
  template <typename Function>
  Function* Find(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(handle_, name));
  }

 private:
  void* const handle_;
};

}  // namespace

std::optional<std::string> ReadLine(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  if (!std::getline(in, line)) return std::nullopt;
  return line;
}

MachineMemory ReadMachineMemory() {
  MachineMemory memory;
  std::ifstream in("/proc/meminfo");
  for (std::string line; std::getline(in, line);) {
    const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    int64_t kib = 0;
    if (words.size() < 2 || !absl::SimpleAtoi(words[1], &kib)) continue;
    if (words[0] == "MemTotal:") memory.total = kib << 10;
    if (words[0] == "MemAvailable:") memory.available = kib << 10;
  }
  if (const auto limit = GroupLimit(); limit && *limit < memory.total) {
    memory.total = *limit;
    memory.available = std::min(memory.available, *limit);
    memory.limited = true;
  }
  return memory;
}

GpuState ReadGpus() {
  GpuState state;
  if (const auto version = ReadLine("/proc/driver/nvidia/version")) {
    const std::vector<std::string> words = absl::StrSplit(*version, ' ', absl::SkipEmpty());
    for (const std::string& word : words) {  // "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  ..."
      if (!word.empty() && absl::ascii_isdigit(word[0]) && word.find('.') != std::string::npos) {
        state.driver = word;
        break;
      }
    }
  }
  const Driver driver;
  if (!driver.loaded()) {
    if (!state.driver.empty()) state.problem = "libcuda.so.1 cannot be opened: is the container given the driver?";
    return state;
  }
  auto* const init = driver.Find<int(unsigned)>("cuInit");
  auto* const count_of = driver.Find<int(int*)>("cuDeviceGetCount");
  auto* const get = driver.Find<int(int*, int)>("cuDeviceGet");
  auto* const name_of = driver.Find<int(char*, int, int)>("cuDeviceGetName");
  auto* const memory_of = driver.Find<int(size_t*, int)>("cuDeviceTotalMem_v2");
  auto* const attribute = driver.Find<int(int*, int, int)>("cuDeviceGetAttribute");
  int count = 0;
  if (init == nullptr || count_of == nullptr || get == nullptr || name_of == nullptr || memory_of == nullptr ||
      attribute == nullptr) {
    state.problem = "libcuda.so.1 is not the driver's library";
  } else if (const int error = init(0); error != 0) {
    state.problem = absl::StrCat("the driver refuses to start, error ", error);
  } else if (count_of(&count) != 0 || count == 0) {
    state.problem = "the driver sees no card";
  }
  constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
  for (int i = 0; i < count; ++i) {
    int device = 0;
    Gpu gpu;
    char name[256] = {};
    size_t bytes = 0;
    if (get(&device, i) != 0 || name_of(name, sizeof(name) - 1, device) != 0 || memory_of(&bytes, device) != 0)
      continue;
    gpu.name = name;
    gpu.memory_bytes = static_cast<int64_t>(bytes);
    (void)attribute(&gpu.major, kMajor, device);
    (void)attribute(&gpu.minor, kMinor, device);
    state.gpus.push_back(std::move(gpu));
  }
  return state;
}

std::optional<int64_t> ParseBytes(const std::string& text) {
  static constexpr std::pair<const char*, int64_t> kUnits[] = {
      {"tib", int64_t{1} << 40}, {"gib", int64_t{1} << 30}, {"mib", int64_t{1} << 20}, {"kib", int64_t{1} << 10},
      {"ti", int64_t{1} << 40},  {"gi", int64_t{1} << 30},  {"mi", int64_t{1} << 20},  {"ki", int64_t{1} << 10},
      {"tb", 1000000000000},     {"gb", 1000000000},        {"mb", 1000000},           {"kb", 1000}};
  std::string number = absl::AsciiStrToLower(absl::StripAsciiWhitespace(text));
  double factor = 1;
  for (const auto& [suffix, bytes] : kUnits) {
    const std::string unit = suffix;
    if (number.size() <= unit.size() || number.compare(number.size() - unit.size(), unit.size(), unit) != 0) continue;
    factor = static_cast<double>(bytes);
    number.resize(number.size() - unit.size());
    break;
  }
  double value = 0;
  if (!absl::SimpleAtod(absl::StripAsciiWhitespace(number), &value) || !(value > 0)) return std::nullopt;
  if (value * factor >= static_cast<double>(std::numeric_limits<int64_t>::max())) return std::nullopt;
  return static_cast<int64_t>(value * factor);
}

}  // namespace millrace::cli
