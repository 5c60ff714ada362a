// SPDX-License-Identifier: Apache-2.0
// The log of a role: JSON lines on standard error, one object per line.
#pragma once

#include <string>

namespace millrace::cli {

// `level`: debug, info, warn or error. `name` is in every line. On a terminal lines are plain text for people.
void SetUpLogging(const std::string& name, const std::string& level);

}  // namespace millrace::cli
