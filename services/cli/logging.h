// SPDX-License-Identifier: Apache-2.0
// The log of a role, on standard error: JSON lines, one object per line, or plain text.
//
// A line has `time`, `level`, `role`, `worker`, `thread`, `message`, and where it is about a request `request_id` and
// `trace_id` (services/common/log_scope.h), so that the lines of one request can be joined over processes.
#pragma once

#include <string>

namespace millrace::cli {

struct LogOptions {
  std::string role;    // "router", "decode"
  std::string name;    // of this process
  std::string level;   // "debug", "info", "warn", "error"
  std::string format;  // "json", "text"; empty: text on a terminal, else json
};
void SetUpLogging(const LogOptions& options);

}  // namespace millrace::cli
