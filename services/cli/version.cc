// SPDX-License-Identifier: Apache-2.0
// `millrace version`: what was built, from what, and what it can do.
#include <cstdio>

#include "engine/ops/vector_cpu.h"
#include "nlohmann/json.hpp"
#include "services/cli/command.h"

#ifndef MILLRACE_VERSION
#define MILLRACE_VERSION "0.0.0"
#endif
#ifndef MILLRACE_TRANSPORTS
#define MILLRACE_TRANSPORTS "tcp"
#endif

namespace millrace::cli {

std::string VersionLine() { return "millrace " MILLRACE_VERSION; }

int RunVersion(Arguments arguments) {
  bool json = false;
  Flags flags("version", "Prints version and build", "");
  flags.Bool("json", &json, "One JSON object.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "version", arguments, &exit_code)) return exit_code;
  if (json) {
    const nlohmann::ordered_json object = {{"version", MILLRACE_VERSION},
                                           {"compiler", __VERSION__},
                                           {"transports", MILLRACE_TRANSPORTS},
                                           {"kernels", vec::KernelSet()}};
    std::printf("%s\n", object.dump().c_str());
    return kExitOk;
  }
  std::printf("%s\ncompiler: %s\ntransports: %s\nkernels: %s\n", VersionLine().c_str(), __VERSION__,
              MILLRACE_TRANSPORTS, vec::KernelSet().c_str());
  return kExitOk;
}

}  // namespace millrace::cli
