// SPDX-License-Identifier: Apache-2.0
// What this build calls itself, to peers and operators.
#pragma once

namespace millrace {

inline constexpr char kSoftware[] = "millrace 0.1.0";

}  // namespace millrace
