// SPDX-License-Identifier: Apache-2.0
// Sizes rounded up to a multiple: of a page, a tile, a line. No kernel code; those divide where they launch.
#pragma once

#include <cstdint>

namespace millrace {

// The least multiple of `to` that is not below `n`. n >= 0, to > 0.
constexpr int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace millrace
