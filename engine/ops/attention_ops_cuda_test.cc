// SPDX-License-Identifier: Apache-2.0
// What reads and writes the cache on the device against its CPU twins: window, compressors, indexer, attention.
#include <numeric>

#include "absl/strings/str_cat.h"
#include "engine/ops/cuda_compressor.h"
#include "engine/ops/cuda_indexer.h"
#include "engine/ops/cuda_sparse_attention.h"
#include "engine/ops/model_ops_cuda_test.h"

namespace millrace::cuda {
namespace {

TEST_F(CudaModelOps, WindowHoldsTheSameKeysAndBytesForAnyCut) {
  const std::vector<float> norm = RandomF32(512, 9);
  DeviceArray<float> device_norm(norm);
  for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{1, 1, 3, 130, 1, 300}, {140, 7, 1, 1, 136, 137}}) {
    int64_t start = 0;
    for (const int64_t count : cuts) {
      UploadCache();
      auto pass = MakePass({{1, start, count}, {2, start, count}});
      const std::vector<float> kv = RandomBf16(2 * count * 512, static_cast<uint32_t>(start));
      DeviceArray<Bf16> device_kv(ToDeviceBf16(kv)), keys((2 * count + 2 * 127) * 512);
      WindowKeys window;
      ops_.WindowAppend(0, pass->host(), kv.data(), norm.data(), pass->rope(), window);
      WindowAppend(pass->device, layout_.slot_layers[0], layout_.window_slots, {device_kv.data(), 512},
                   device_norm.data(), 1e-6f, pass->rope_view(), keys.data(), stream());
      const std::vector<float> found = FromDeviceBf16(keys.Fetch());
      std::vector<float> ours, theirs;
      for (size_t i = 0; i < 2; ++i) {
        const SequenceView s{pass->sequences[i].row, count, start, nullptr, nullptr};
        if (window.first[i] == WindowKeys::kInSlot) continue;  // its bytes are compared all the same
        for (int64_t p = window.first_position[i]; p < start + count; ++p) {
          const int64_t a = WindowRow(s, static_cast<int64_t>(i), p) * 512;
          const float* b = window.rows[window.first[i] + p - window.first_position[i]];
          ours.insert(ours.end(), found.begin() + a, found.begin() + a + 512);
          theirs.insert(theirs.end(), b, b + 512);
        }
      }
      EXPECT_EQ(theirs.empty(), count <= 2);
      if (!theirs.empty()) {
        EXPECT_LT(RelativeNorm(ours, theirs), 1e-3) << "a code may round otherwise: FP8 has 3 bits";
      }
      EXPECT_LT(DifferentBytes(), 2e-3);
      start += count;
    }
  }
}

TEST_F(CudaModelOps, CompressorsPoolTheSameEntriesForAnyCut) {
  const auto vector = [](int64_t n, uint32_t seed) { return RandomF32(n, seed); };
  millrace::CompressorWeights main, index, hca;
  main.ape = vector(4 * 1024, 20);
  main.norm = vector(512, 21);
  index.ape = vector(4 * 256, 22);
  index.norm = vector(128, 23);
  hca.ape = vector(128 * 512, 24);
  hca.norm = vector(512, 25);
  DeviceArray<float> a0(main.ape), n0(main.norm), a1(index.ape), n1(index.norm), a2(hca.ape), n2(hca.norm);
  for (const std::vector<int64_t>& cuts :
       {std::vector<int64_t>{1, 1, 1, 1, 1, 2, 3, 5, 7, 100, 6, 1, 130}, {3, 2, 3, 260, 1, 1}, {127, 1, 1, 300}}) {
    int64_t start = 0;
    for (const int64_t count : cuts) {
      SCOPED_TRACE(absl::StrCat(count, " rows from ", start));
      UploadCache();
      auto pass = MakePass({{0, start, count}, {3, start, count}});
      const int64_t rows = 2 * count;
      const auto seed = static_cast<uint32_t>(1000 + start);
      const std::vector<float> kv = vector(rows * 1024, seed), score = vector(rows * 1024, seed + 1),
                               ikv = vector(rows * 256, seed + 2), iscore = vector(rows * 256, seed + 3);
      DeviceArray<float> d0(kv), d1(score), d2(ikv), d3(iscore);
      ops_.CompressCsa(1, pass->host(), kv.data(), score.data(), ikv.data(), iscore.data(), main, index, frequencies_);
      CompressCsa(pass->device, layout_.page_layers[1], layout_.slot_layers[1], {d0.data(), 1024}, {d1.data(), 1024},
                  {d2.data(), 256}, {d3.data(), 256}, {a0.data(), n0.data()}, {a1.data(), n1.data()}, table(), 1e-6f,
                  stream());
      ops_.CompressHca(2, pass->host(), kv.data(), score.data(), hca, frequencies_);
      CompressHca(pass->device, layout_.page_layers[2], layout_.slot_layers[2], {d0.data(), 512}, {d1.data(), 512},
                  {a2.data(), n2.data()}, table(), 1e-6f, stream());
      // Pending rows are copies; HCA's running sums differ by ulps in most of their low bytes, entries hardly ever.
      const std::vector<uint8_t> pages = device_pages_->Fetch();
      int64_t different = 0;
      for (int64_t i = 0; i < pages_.bytes(); ++i) different += pages[i] != pages_[i];
      EXPECT_LT(static_cast<double>(different), 1 + 0.004 * static_cast<double>(rows) / 4 * 700);
      const std::vector<uint8_t> slots = device_slots_->Fetch();
      for (const int s : {0, 3}) {
        const auto floats = [&](const uint8_t* base, int64_t offset, int64_t n) {
          std::vector<float> v(n);
          std::memcpy(v.data(), base + s * layout_.slot_bytes + offset, n * 4);
          for (float& x : v) {
            if (std::isinf(x)) x = -1;
          }
          return v;
        };
        const SlotLayerLayout &csa = layout_.slot_layers[1], &l = layout_.slot_layers[2];
        EXPECT_EQ(FirstDifference(floats(slots.data(), csa.csa_prev, 4096), floats(slots_.data(), csa.csa_prev, 4096)),
                  -1);
        EXPECT_EQ(FirstDifference(floats(slots.data(), csa.csa_cur, 8192), floats(slots_.data(), csa.csa_cur, 8192)),
                  -1);
        EXPECT_EQ(
            FirstDifference(floats(slots.data(), csa.index_prev, 1024), floats(slots_.data(), csa.index_prev, 1024)),
            -1);
        EXPECT_EQ(
            FirstDifference(floats(slots.data(), csa.index_cur, 2048), floats(slots_.data(), csa.index_cur, 2048)), -1);
        EXPECT_LT(RelativeNorm(floats(slots.data(), l.hca_state, 1536), floats(slots_.data(), l.hca_state, 1536)),
                  1e-5);
      }
      start += count;
    }
  }
}

TEST_F(CudaModelOps, IndexerSelectsTheCpusEntries) {
  FillPages(pages_, kPages, layout_);
  UploadCache();
  // Rows that see none, fewer than top-k, exactly top-k and more; a tile smaller than the pass.
  auto pass = MakePass({{0, 0, 3}, {1, 90, 12}, {2, 1100, 40}, {3, 800, 1}});
  const int64_t rows = pass->device.num_rows;
  const int heads = config_.index_n_heads, topk = config_.index_topk;
  std::vector<float> q = RandomBf16(rows * heads * 128, 31);
  const std::vector<float> weights = RandomBf16(rows * heads, 32);
  DeviceArray<Bf16> device_q(ToDeviceBf16(q));
  DeviceArray<float> device_weights(weights);
  DeviceArray<int8_t> codes(rows * heads * 128);
  DeviceArray<float> scales(rows * heads * 4);
  constexpr int64_t kTile = 17, kEntries = 400;
  DeviceArray<uint16_t> scores(kTile * kEntries);
  DeviceArray<int32_t> entries(rows * topk), counts(rows);
  IndexSelect(pass->device, layout_.page_layers[1], {device_q.data(), int64_t{heads} * 128},
              {device_weights.data(), heads}, heads, pass->rope_view(),
              {codes.data(), scales.data(), scores.data(), kTile, kEntries}, {entries.data(), counts.data(), topk},
              stream());
  Selection selection;
  ops_.IndexSelect(1, pass->host(), q.data(), weights.data(), heads, topk, pass->rope(), selection);
  const std::vector<int32_t> found = entries.Fetch(), found_counts = counts.Fetch();
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<int32_t> expected(selection.entries.begin() + selection.offset[r],
                                        selection.entries.begin() + selection.offset[r + 1]);
    ASSERT_EQ(found_counts[r], static_cast<int32_t>(expected.size())) << "row " << r;
    ASSERT_EQ(std::vector<int32_t>(found.begin() + r * topk, found.begin() + r * topk + found_counts[r]), expected)
        << "row " << r;
  }
}

// Positions at which the offsets into keys, block table and scores are as large as they get.
TEST_F(CudaModelOps, IndexerSelectsTheCpusEntriesUpToAMillionTokens) {
  constexpr int64_t kMost = 1 << 20, kManyPages = kMost / 128, kEntries = kMost / 4;
  constexpr int kHeads = 64, kTopK = 512;
  const std::vector<int64_t> positions = {kMost - 1, kMost - 5, kMost / 2 + 2, 262143, 65536, 2048};
  const auto rows = static_cast<int64_t>(positions.size());
  const PageLayerLayout& page = layout_.page_layers[1];
  Buffer<uint8_t> pages(kManyPages * layout_.page_bytes);
  std::mt19937_64 random(35);
  std::vector<int32_t> table(kManyPages);
  std::vector<uint8_t*> host_pages;
  for (int64_t p = 0; p < kManyPages; ++p) {
    table[p] = static_cast<int32_t>(p * 4099 % kManyPages);  // scattered
    host_pages.push_back(pages.data() + table[p] * layout_.page_bytes);
    for (int64_t i = 0; i < kCsaEntriesPerPage * 64; i += 8) {
      const uint64_t bits = random();
      std::memcpy(host_pages.back() + page.index_bodies + i, &bits, 8);
    }
    for (int64_t i = 0; i < kCsaEntriesPerPage * 4; ++i) {
      host_pages.back()[page.index_scales + i] = static_cast<uint8_t>(124 + random() % 5);
    }
  }
  DeviceArray<uint8_t> device_pages(pages.bytes());
  CUDA_CHECK(cudaMemcpy(device_pages.data(), pages.data(), pages.bytes(), cudaMemcpyHostToDevice));
  DeviceArray<int32_t> device_table(table);

  // Every row is a sequence of its own over the same pages.
  std::vector<SequenceRows> sequences;
  std::vector<SequenceView> views;
  std::vector<int32_t> ids(rows, 0), device_position, row_sequence;
  for (int64_t r = 0; r < rows; ++r) {
    sequences.push_back({r, 1, positions[r], nullptr, &host_pages});
    views.push_back({r, 1, positions[r], nullptr, device_table.data()});
    device_position.push_back(static_cast<int32_t>(positions[r]));
    row_sequence.push_back(static_cast<int32_t>(r));
  }
  DeviceArray<int32_t> device_positions(device_position), device_row_sequence(row_sequence);
  DeviceArray<SequenceView> device_views(views);
  const PassView pass{rows,
                      static_cast<int>(rows),
                      nullptr,
                      device_positions.data(),
                      device_row_sequence.data(),
                      device_views.data(),
                      device_pages.data(),
                      layout_.page_bytes};
  std::vector<float> cos(rows * 32), sin(rows * 32);
  ops_.PrepareRope(frequencies_, positions.data(), rows, cos.data(), sin.data());
  DeviceArray<float> device_cos(cos), device_sin(sin);
  std::vector<float> q = RandomBf16(rows * kHeads * 128, 36);
  const std::vector<float> weights = RandomBf16(rows * kHeads, 37);
  DeviceArray<Bf16> device_q(ToDeviceBf16(q));
  DeviceArray<float> device_weights(weights);
  DeviceArray<int8_t> codes(rows * kHeads * 128);
  DeviceArray<float> scales(rows * kHeads * 4);
  DeviceArray<uint16_t> scores(rows * kEntries);
  DeviceArray<int32_t> entries(rows * kTopK), counts(rows);
  IndexSelect(pass, page, {device_q.data(), kHeads * 128}, {device_weights.data(), kHeads}, kHeads,
              {device_cos.data(), device_sin.data()}, {codes.data(), scales.data(), scores.data(), rows, kEntries},
              {entries.data(), counts.data(), kTopK}, stream());
  Selection selection;
  ops_.IndexSelect(1, {sequences, rows, positions.data(), ids.data()}, q.data(), weights.data(), kHeads, kTopK,
                   {cos.data(), sin.data()}, selection);
  const std::vector<int32_t> found = entries.Fetch(), found_counts = counts.Fetch();
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<int32_t> expected(selection.entries.begin() + selection.offset[r],
                                        selection.entries.begin() + selection.offset[r + 1]);
    ASSERT_EQ(static_cast<int64_t>(expected.size()), std::min<int64_t>(kTopK, (positions[r] + 1) / 4));
    ASSERT_EQ(found_counts[r], static_cast<int32_t>(expected.size())) << "position " << positions[r];
    ASSERT_EQ(std::vector<int32_t>(found.begin() + r * kTopK, found.begin() + r * kTopK + found_counts[r]), expected)
        << "position " << positions[r];
  }
}

TEST_F(CudaModelOps, TopKIsExactOnHostileScores) {
  constexpr int kTopK = 512;
  constexpr int64_t kMost = 20000;
  std::mt19937 random(40);
  std::vector<std::vector<float>> rows;
  for (const int64_t n : {int64_t{0}, int64_t{1}, int64_t{511}, int64_t{512}, int64_t{513}, int64_t{5000}, kMost}) {
    rows.push_back(std::vector<float>(n, 1.5f));  // all equal
    std::vector<float> two(n), ascending(n), noise(n), negative(n);
    for (int64_t i = 0; i < n; ++i) {
      two[i] = random() % 2 == 0 ? -1.0f : 1.0f;
      ascending[i] = RoundBf16(static_cast<float>(i));
      noise[i] = RoundBf16(static_cast<float>(random() % 100000) / 1000 - 50);
      negative[i] = -std::abs(noise[i]);
    }
    for (const auto& row : {two, ascending, noise, negative}) rows.push_back(row);
  }
  std::vector<uint16_t> scores(rows.size() * kMost, 0x7f80);
  std::vector<int32_t> lengths;
  for (size_t r = 0; r < rows.size(); ++r) {
    std::transform(rows[r].begin(), rows[r].end(), scores.begin() + r * kMost, EncodeBf16);
    lengths.push_back(static_cast<int32_t>(rows[r].size()));
  }
  DeviceArray<uint16_t> device_scores(scores);
  DeviceArray<int32_t> device_lengths(lengths), entries(rows.size() * kTopK), counts(rows.size());
  TopK(device_scores.data(), kMost, device_lengths.data(), static_cast<int64_t>(rows.size()),
       {entries.data(), counts.data(), kTopK}, stream());
  const std::vector<int32_t> found = entries.Fetch(), found_counts = counts.Fetch();
  for (size_t r = 0; r < rows.size(); ++r) {
    std::vector<int32_t> expected(rows[r].size());
    std::iota(expected.begin(), expected.end(), 0);
    std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) { return rows[r][a] > rows[r][b]; });
    expected.resize(std::min<size_t>(expected.size(), kTopK));
    std::sort(expected.begin(), expected.end());
    ASSERT_EQ(found_counts[r], static_cast<int32_t>(expected.size())) << "row " << r;
    ASSERT_EQ(std::vector<int32_t>(found.begin() + r * kTopK, found.begin() + r * kTopK + found_counts[r]), expected)
        << "row " << r;
  }
}

TEST_F(CudaModelOps, AttentionAgreesForEveryLayerKind) {
  FillPages(pages_, kPages, layout_);
  UploadCache();
  const std::vector<float> norm = RandomF32(512, 50), sink = RandomF32(8, 51);
  DeviceArray<float> device_norm(norm), device_sink(sink);
  auto pass = MakePass({{0, 0, 5}, {1, 120, 10}, {2, 1200, 6}, {3, 127, 1}});
  const int64_t rows = pass->device.num_rows;
  const std::vector<float> kv = RandomBf16(rows * 512, 52), q = RandomBf16(rows * 8 * 512, 53);
  DeviceArray<Bf16> device_kv(ToDeviceBf16(kv)), device_q(ToDeviceBf16(q)), keys((rows + 4 * 127) * 512);
  // The rings hold zeros so far: fill them with something by a pass that ends where this one begins.
  for (const auto& [sequence, start] : {std::pair{1, 120}, {2, 1200}, {3, 127}}) {
    auto before = MakePass({{sequence, std::max(0, start - 127), std::min(start, 127)}});
    const std::vector<float> old = RandomBf16(before->device.num_rows * 512, 54);
    WindowKeys window;
    for (int layer = 0; layer < 3; ++layer) {
      ops_.WindowAppend(layer, before->host(), old.data(), norm.data(), before->rope(), window);
    }
  }
  UploadCache();
  for (int layer = 0; layer < 3; ++layer) {
    SCOPED_TRACE(absl::StrCat("layer ", layer));
    WindowKeys window;
    ops_.WindowAppend(layer, pass->host(), kv.data(), norm.data(), pass->rope(), window);
    WindowAppend(pass->device, layout_.slot_layers[layer], layout_.window_slots, {device_kv.data(), 512},
                 device_norm.data(), 1e-6f, pass->rope_view(), keys.data(), stream());
    // Every second visible entry.
    Selection selection;
    selection.offset.push_back(0);
    const int topk = 160;
    std::vector<int32_t> entries(rows * topk), counts;
    for (int64_t r = 0; r < rows; ++r) {
      int32_t n = 0;
      for (int32_t e = 0; e < (pass->positions[r] + 1) / 4; e += 2) {
        selection.entries.push_back(e);
        entries[r * topk + n++] = e;
      }
      counts.push_back(n);
      selection.offset.push_back(static_cast<int64_t>(selection.entries.size()));
    }
    DeviceArray<int32_t> device_entries(entries), device_counts(counts);
    std::vector<float> expected(rows * 8 * 512);
    ops_.SparseAttention(layer, pass->host(), q.data(), 8, sink.data(), window, selection, pass->rope(),
                         expected.data());
    DeviceArray<Bf16> out(rows * 8 * 512);
    SparseAttention(config_.layer_kinds[layer], pass->device, layout_.page_layers[layer], device_q.data(), 8,
                    device_sink.data(), keys.data(), {device_entries.data(), device_counts.data(), topk},
                    pass->rope_view(), kWindow + topk, nullptr, out.data(), stream());
    // P is rounded to BF16 relative to a maximum that differs by an ulp: more values round otherwise than elsewhere.
    EXPECT_LT(RelativeNorm(FromDeviceBf16(out.Fetch()), expected), 2e-3);
  }
}

// More entries than two of the CPU's segments hold: 1,152 places are 128 of the window and 1,024 entries.
TEST_F(CudaModelOps, AttentionMergesSegmentsAsTheCpuDoes) {
  ModelConfig config = TestConfig();
  config.layer_kinds = {LayerKind::kHca, LayerKind::kCsa};
  config.num_hidden_layers = 2;
  const CacheLayout layout = CacheLayout::Make(config, Numerics::kRelease, false);
  CpuOps ops(config, layout, Rounding::All(), pool_, /*tiles=*/false);
  constexpr int64_t kEntries = 2500, kStart = kEntries * 4;
  constexpr int kManyPages = kEntries / 32 + 1;
  Buffer<uint8_t> pages(kManyPages * layout.page_bytes), slot(layout.slot_bytes);
  FillPages(pages, kManyPages, layout);
  std::vector<uint8_t*> host_pages;
  std::vector<int32_t> block_table(kManyPages);
  for (int p = 0; p < kManyPages; ++p) {
    block_table[p] = kManyPages - 1 - p;
    host_pages.push_back(pages.data() + block_table[p] * layout.page_bytes);
  }
  DeviceArray<uint8_t> device_pages(std::vector<uint8_t>(pages.data(), pages.data() + pages.bytes()));
  DeviceArray<uint8_t> device_slot(std::vector<uint8_t>(slot.data(), slot.data() + slot.bytes()));
  DeviceArray<int32_t> device_block_table(block_table), positions(std::vector<int32_t>{kStart}),
      row_sequence(std::vector<int32_t>{0}), ids(std::vector<int32_t>{0});
  DeviceArray<SequenceView> views(
      std::vector<SequenceView>{{0, 1, kStart, device_slot.data(), device_block_table.data()}});
  const PassView device{
      1, 1, ids.data(), positions.data(), row_sequence.data(), views.data(), device_pages.data(), layout.page_bytes};
  const std::vector<SequenceRows> sequences{{0, 1, kStart, slot.data(), &host_pages}};
  const int64_t position = kStart;
  const int32_t id = 0;
  const Pass host{sequences, 1, &position, &id};
  std::vector<float> cos(32), sin(32);
  ops.PrepareRope(frequencies_, &position, 1, cos.data(), sin.data());
  DeviceArray<float> device_cos(cos), device_sin(sin);
  const std::vector<float> norm = RandomF32(512, 60), sink = RandomF32(8, 61), kv = RandomBf16(512, 62),
                           q = RandomBf16(8 * 512, 63);
  DeviceArray<float> device_norm(norm), device_sink(sink);
  DeviceArray<Bf16> device_kv(ToDeviceBf16(kv)), device_q(ToDeviceBf16(q)), keys(128 * 512), out(8 * 512);
  WindowKeys window;
  ops.WindowAppend(1, host, kv.data(), norm.data(), {cos.data(), sin.data()}, window);
  WindowAppend(device, layout.slot_layers[1], layout.window_slots, {device_kv.data(), 512}, device_norm.data(), 1e-6f,
               {device_cos.data(), device_sin.data()}, keys.data(), stream());
  Selection all{false, {0, kEntries}, std::vector<int32_t>(kEntries)};
  std::iota(all.entries.begin(), all.entries.end(), 0);
  DeviceArray<int32_t> entries(all.entries), counts(std::vector<int32_t>{kEntries});
  constexpr int64_t kPlaces = kWindow + kEntries;
  DeviceArray<uint8_t> workspace(SparseAttentionWorkspaceBytes(1, 8, kPlaces));
  std::vector<float> expected(8 * 512);
  ops.SparseAttention(1, host, q.data(), 8, sink.data(), window, all, {cos.data(), sin.data()}, expected.data());
  SparseAttention(LayerKind::kCsa, device, layout.page_layers[1], device_q.data(), 8, device_sink.data(), keys.data(),
                  {entries.data(), counts.data(), static_cast<int>(kEntries)}, {device_cos.data(), device_sin.data()},
                  kPlaces, workspace.data(), out.data(), stream());
  // P is rounded to BF16 relative to a maximum that differs by an ulp: more values round otherwise than elsewhere.
  EXPECT_LT(RelativeNorm(FromDeviceBf16(out.Fetch()), expected), 2e-3);
}

}  // namespace
}  // namespace millrace::cuda
