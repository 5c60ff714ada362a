// SPDX-License-Identifier: Apache-2.0
// Loops of vector_cpu.h against the scalar definitions of rounding.h.
#include "engine/ops/vector_cpu.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <random>
#include <vector>

#include "engine/ops/rounding.h"

namespace millrace::vec {
namespace {

TEST(LoadKvEntry, GivesEveryCodeAndScaleItsValueInOrder) {
  constexpr int kPlain = 448, kRope = 64;
  std::mt19937 draw(5);
  for (int first_scale = 1; first_scale < 250; first_scale += 7) {
    std::vector<uint8_t> body(kPlain + 2 * kRope), scales(kPlain / 64);
    for (int i = 0; i < kPlain; ++i) {
      body[i] = static_cast<uint8_t>(i + first_scale);
      if ((body[i] & 0x7f) == 0x7f) body[i] = 0;  // NaN is never stored
    }
    for (size_t g = 0; g < scales.size(); ++g) scales[g] = static_cast<uint8_t>(std::min<int>(first_scale + g, 240));
    std::vector<float> want;
    for (int i = 0; i < kPlain; ++i) want.push_back(DecodeE4m3(body[i]) * DecodeE8m0(scales[i / 64]));
    for (int i = 0; i < kRope; ++i) {
      const auto bits = static_cast<uint16_t>(draw());
      std::memcpy(body.data() + kPlain + 2 * i, &bits, 2);
      want.push_back(DecodeBf16(bits));
    }
    std::vector<float> out(kPlain + kRope);
    LoadKvEntry(body.data(), scales.data(), kPlain, kRope, out.data());
    for (size_t i = 0; i < out.size(); ++i) {
      ASSERT_EQ(std::bit_cast<uint32_t>(out[i]), std::bit_cast<uint32_t>(want[i])) << i << ", scale " << first_scale;
    }
  }
}

}  // namespace
}  // namespace millrace::vec
