// SPDX-License-Identifier: Apache-2.0
// The attention core over more entries than two segments hold. A single row keeps the keys of a segment in a ring, a
// pass of several rows widens all entries once: the same row must come out of both with the same bits.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "engine/ops/cpu_ops.h"
#include "engine/ops/rounding.h"

namespace millrace {
namespace {

TEST(SparseAttention, ARowAloneSeesTheKeysOfItsWholeSegment) {
  ModelConfig config;
  config.hidden_size = 64;
  config.num_hidden_layers = 1;
  config.num_attention_heads = 4;
  config.head_dim = 512;
  config.rope_head_dim = 64;
  config.sliding_window = 128;
  config.index_head_dim = 128;
  config.layer_kinds = {LayerKind::kHca};
  const CacheLayout layout = CacheLayout::Make(config, Numerics::kRelease, false);
  ThreadPool pool(1);
  CpuOps ops(config, layout, Rounding::All(), pool);

  // 1,152 places are a segment, 128 of them the window's: entries 1024 and 2176 begin the second and the third.
  constexpr int64_t kEntries = 2400, kRows = 3, kStart = kEntries * 128;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Buffer<uint8_t> pages((kEntries + 1) * layout.page_bytes), slot(layout.slot_bytes);
  std::vector<uint8_t*> block_table;
  for (int64_t p = 0; p <= kEntries; ++p) {
    uint8_t* page = pages.data() + p * layout.page_bytes;
    block_table.push_back(page);
    for (int i = 0; i < 448; ++i) page[i] = static_cast<uint8_t>(random() % 64 | (random() & 0x80));
    std::memset(page + layout.page_layers[0].scales, 127, 7);
  }
  std::vector<float> kv(kRows * 512), q(kRows * 4 * 512), norm(512, 1.0f), sink(4, 0.0f), cos(kRows * 32, 1.0f),
      sin(kRows * 32, 0.0f);
  for (std::vector<float>* values : {&kv, &q}) {
    for (float& v : *values) v = RoundBf16(0.1f * normal(random));
  }
  const auto attend = [&](int64_t first, int64_t count) {
    const std::vector<SequenceRows> sequences{{0, count, kStart + first, slot.data(), &block_table}};
    std::vector<int64_t> positions(count);
    std::iota(positions.begin(), positions.end(), kStart + first);
    const std::vector<int32_t> ids(count, 0);
    const Pass pass{sequences, count, positions.data(), ids.data()};
    WindowKeys window;
    ops.WindowAppend(0, pass, kv.data() + first * 512, norm.data(), {cos.data(), sin.data()}, window);
    std::vector<float> out(count * 4 * 512);
    ops.SparseAttention(0, pass, q.data() + first * 4 * 512, 4, sink.data(), window, {.all = true},
                        {cos.data(), sin.data()}, out.data());
    return out;
  };
  const std::vector<float> together = attend(0, kRows);
  std::memset(slot.data(), 0, layout.slot_bytes);
  for (int64_t r = 0; r < kRows; ++r) {
    const std::vector<float> alone = attend(r, 1);
    EXPECT_EQ(std::memcmp(alone.data(), together.data() + r * 4 * 512, alone.size() * 4), 0) << "row " << r;
  }
}

}  // namespace
}  // namespace millrace
