// SPDX-License-Identifier: Apache-2.0
// std::string_view for Abseil's functions: Debian 12 builds Abseil with a string_view of its own.
#pragma once

#include <string_view>

#include "absl/strings/string_view.h"

namespace millrace {

inline absl::string_view AbslView(std::string_view text) { return absl::string_view(text.data(), text.size()); }

}  // namespace millrace
