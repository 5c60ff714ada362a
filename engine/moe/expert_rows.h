// SPDX-License-Identifier: Apache-2.0
// Rows of activations on their way to experts and back, in the two formats that they travel and lie in.
//
// In `release` every value is one that BF16 holds, so going from one format to the other changes nothing; F32 is what
// `exact` needs and what the CPU's operations take. Pointers need no alignment. Thread: pure functions.
#pragma once

#include <cstdint>
#include <cstring>

namespace millrace {

enum class RowFormat : uint8_t { kBf16 = 1, kF32 = 2 };

inline int64_t RowBytes(RowFormat format, int64_t hidden) { return hidden * (format == RowFormat::kBf16 ? 2 : 4); }

// Copies one row. From F32 to BF16 takes the upper half: exact for values that are BF16 already.
inline void ConvertRow(const void* from, RowFormat from_format, int64_t hidden, RowFormat to_format, void* to) {
  const auto* source = static_cast<const uint8_t*>(from);
  auto* target = static_cast<uint8_t*>(to);
  if (from_format == to_format) {
    std::memcpy(target, source, static_cast<size_t>(RowBytes(to_format, hidden)));
  } else if (to_format == RowFormat::kBf16) {
    for (int64_t i = 0; i < hidden; ++i) std::memcpy(target + 2 * i, source + 4 * i + 2, 2);
  } else {
    for (int64_t i = 0; i < hidden; ++i) {
      uint16_t upper;
      std::memcpy(&upper, source + 2 * i, 2);
      const uint32_t bits = uint32_t{upper} << 16;
      std::memcpy(target + 4 * i, &bits, 4);
    }
  }
}

// No value is NaN or infinite. An exponent of all ones is their mark; collected instead of tested, to keep the loop
// straight.
inline bool RowIsFinite(const void* row, RowFormat format, int64_t hidden) {
  const auto* bytes = static_cast<const uint8_t*>(row);
  const int64_t step = format == RowFormat::kBf16 ? 2 : 4;
  uint32_t bad = 0;
  for (int64_t i = 0; i < hidden; ++i) {
    uint16_t upper;
    std::memcpy(&upper, bytes + i * step + (step - 2), 2);
    bad |= (upper & 0x7f80u) == 0x7f80u ? 1u : 0u;
  }
  return bad == 0;
}

}  // namespace millrace
