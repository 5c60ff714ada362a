// SPDX-License-Identifier: Apache-2.0
// The attention core on the device: a row has one result, bit for bit, whether its list is walked by one block or split
// among many, and whatever other rows are in the pass; and it is the CPU twin's, but for roundings.
//
// Lists end on, before and after the boundaries of chunks and of a segment, and begin inside the window.
#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cuda_sparse_attention.h"
#include "engine/ops/cuda_test_util.h"

namespace millrace::cuda {
namespace {

constexpr int kPages = 1300, kTopK = 512;
constexpr int64_t kMaxHcaPlaces = kWindow + kPages;

ModelConfig Config() {
  ModelConfig c;
  c.hidden_size = 256;
  c.num_hidden_layers = 3;
  c.num_attention_heads = 8;
  c.head_dim = kHeadDim;
  c.rope_head_dim = kRopeDim;
  c.sliding_window = kWindow;
  c.index_head_dim = kIndexDim;
  c.layer_kinds = {LayerKind::kWindow, LayerKind::kCsa, LayerKind::kHca};
  return c;
}

// Positions around everything that can begin or end: the sequence, the window, its two chunks, the chunks of HCA
// (entry 64 k is complete at 8,192 k - 1), its second segment (1,024 entries beside the window).
std::vector<int32_t> Positions() {
  std::vector<int32_t> positions = {0,    1,    62,   63,    64,    65,    126,   127,    128,    129,   8190,
                                    8191, 8192, 8319, 16382, 16383, 65535, 65536, 131071, 131199, 166000};
  // With these there are too many rows to split.
  for (int i = 0; positions.size() < 34; ++i) positions.push_back(70000 + 700 * i);
  return positions;
}
// Numbers of selected entries around the boundaries of chunks.
constexpr int kCounts[] = {0, 1, 63, 64, 65, 512, 200, 127, 129};

class CudaSparseAttention : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    FillPages(pages_, kPages, layout_);
    std::vector<int32_t> table(kPages);
    for (int p = 0; p < kPages; ++p) {
      table[p] = p * 7 % kPages;  // 7 and 1300 share no factor
      host_pages_.push_back(pages_.data() + table[p] * layout_.page_bytes);
    }
    device_pages_ =
        std::make_unique<DeviceArray<uint8_t>>(std::vector<uint8_t>(pages_.data(), pages_.data() + pages_.bytes()));
    table_ = std::make_unique<DeviceArray<int32_t>>(table);

    positions_ = Positions();
    rows_ = static_cast<int64_t>(positions_.size());
    std::vector<int32_t> entries(rows_ * kTopK, -1);
    selection_.offset.push_back(0);
    for (int64_t r = 0; r < rows_; ++r) {
      counts_.push_back(kCounts[r % std::size(kCounts)]);
      for (int j = 0; j < counts_.back(); ++j) {
        entries[r * kTopK + j] = static_cast<int32_t>(j * 39 + r);
        selection_.entries.push_back(entries[r * kTopK + j]);
      }
      selection_.offset.push_back(static_cast<int64_t>(selection_.entries.size()));
    }
    keys_ = RandomBf16(rows_ * kWindow * kHeadDim, 1);
    cos_.resize(rows_ * 32);
    sin_.resize(rows_ * 32);
    for (int64_t i = 0; i < rows_ * 32; ++i) {
      cos_[i] = std::cos(static_cast<float>(i));
      sin_[i] = std::sin(static_cast<float>(i));
    }
    entries_ = std::make_unique<DeviceArray<int32_t>>(entries);
    device_counts_ = std::make_unique<DeviceArray<int32_t>>(counts_);
    device_positions_ = std::make_unique<DeviceArray<int32_t>>(positions_);
    std::vector<int32_t> row_sequence(rows_);
    std::iota(row_sequence.begin(), row_sequence.end(), 0);
    row_sequence_ = std::make_unique<DeviceArray<int32_t>>(row_sequence);
    device_keys_ = std::make_unique<DeviceArray<Bf16>>(ToDeviceBf16(keys_));
    device_cos_ = std::make_unique<DeviceArray<float>>(cos_);
    device_sin_ = std::make_unique<DeviceArray<float>>(sin_);
  }

  void SetHeads(int heads) {
    heads_ = heads;
    q_ = RandomBf16(rows_ * heads * kHeadDim, 2, 1.5f);
    sink_ = RandomF32(heads, 3);
    device_q_ = std::make_unique<DeviceArray<Bf16>>(ToDeviceBf16(q_));
    device_sink_ = std::make_unique<DeviceArray<float>>(sink_);
  }

  static int64_t MaxPlaces(LayerKind kind) {
    return kind == LayerKind::kWindow ? kWindow : kind == LayerKind::kCsa ? kWindow + kTopK : kMaxHcaPlaces;
  }

  // Rows first .. first + count as a pass of their own, each a sequence of one row, so that a row's window is the 128
  // keys that are its own.
  std::vector<float> Run(int layer, int64_t first, int64_t count, bool may_split) {
    const LayerKind kind = config_.layer_kinds[layer];
    std::vector<SequenceView> views;
    for (int64_t r = 0; r < count; ++r) views.push_back({r, 1, positions_[first + r], nullptr, table_->data()});
    DeviceArray<SequenceView> sequences(views);
    DeviceArray<Bf16> out(count * heads_ * kHeadDim);
    DeviceArray<uint8_t> workspace(SparseAttentionWorkspaceBytes(count, heads_, MaxPlaces(kind)));
    const PassView pass{count,
                        static_cast<int>(count),
                        nullptr,
                        device_positions_->data() + first,
                        row_sequence_->data(),
                        sequences.data(),
                        device_pages_->data(),
                        layout_.page_bytes};
    SparseAttention(kind, pass, layout_.page_layers[layer], device_q_->data() + first * heads_ * kHeadDim, heads_,
                    device_sink_->data(), device_keys_->data() + first * kWindow * kHeadDim,
                    {entries_->data() + first * kTopK, device_counts_->data() + first, kTopK},
                    {device_cos_->data() + first * 32, device_sin_->data() + first * 32}, MaxPlaces(kind),
                    may_split ? workspace.data() : nullptr, out.data(), stream());
    return FromDeviceBf16(out.Fetch());
  }

  std::vector<float> RowOf(const std::vector<float>& all, int64_t row) const {
    return {all.begin() + row * heads_ * kHeadDim, all.begin() + (row + 1) * heads_ * kHeadDim};
  }

  // The CPU twin over all rows.
  std::vector<float> Twin(int layer) {
    std::vector<SequenceRows> sequences;
    std::vector<int64_t> positions(positions_.begin(), positions_.end());
    const std::vector<int32_t> ids(rows_, 0);
    WindowKeys window;
    window.rows.Reserve(rows_ * kWindow, kHeadDim);
    std::copy(keys_.begin(), keys_.end(), window.rows.at(0));
    for (int64_t r = 0; r < rows_; ++r) {
      sequences.push_back({r, 1, positions[r], nullptr, &host_pages_});
      const int64_t oldest = positions[r] - (kWindow - 1);
      window.first_position.push_back(std::max<int64_t>(oldest, 0));
      window.first.push_back(r * kWindow + window.first_position.back() - oldest);
    }
    const Pass pass{sequences, rows_, positions.data(), ids.data()};
    std::vector<float> out(rows_ * heads_ * kHeadDim);
    ops_.SparseAttention(layer, pass, q_.data(), heads_, sink_.data(), window, selection_, {cos_.data(), sin_.data()},
                         out.data());
    return out;
  }

  const ModelConfig config_ = Config();
  const CacheLayout layout_ = CacheLayout::Make(config_, Numerics::kRelease, false);
  ThreadPool pool_{2};
  CpuOps ops_{config_, layout_, Rounding::All(), pool_, /*tiles=*/false};
  Buffer<uint8_t> pages_{kPages * layout_.page_bytes};
  std::vector<uint8_t*> host_pages_;
  std::unique_ptr<DeviceArray<uint8_t>> device_pages_;
  std::unique_ptr<DeviceArray<int32_t>> table_, entries_, device_counts_, device_positions_, row_sequence_;
  std::unique_ptr<DeviceArray<Bf16>> device_keys_, device_q_;
  std::unique_ptr<DeviceArray<float>> device_cos_, device_sin_, device_sink_;
  int heads_ = 0;
  int64_t rows_ = 0;
  std::vector<int32_t> positions_, counts_;
  Selection selection_;
  std::vector<float> keys_, q_, sink_, cos_, sin_;
};

TEST_F(CudaSparseAttention, ARowHasTheSameBitsAloneAmongManySplitAndWhole) {
  for (const int heads : {8, 16, 64, 128}) {
    SetHeads(heads);
    for (int layer = 0; layer < 3; ++layer) {
      SCOPED_TRACE(absl::StrCat(heads, " heads, layer ", layer));
      const int64_t max_places = MaxPlaces(config_.layer_kinds[layer]);
      ASSERT_EQ(SparseAttentionGroups(rows_, heads, max_places), 1) << "all rows together are walked whole";
      const std::vector<float> all = Run(layer, 0, rows_, true);
      const int64_t most = MaxSplitAttentionRows(heads);
      if (layer > 0) {
        // A row alone has a block for each chunk, as many rows as are split at all have several chunks a block.
        ASSERT_EQ(SparseAttentionGroups(1, heads, max_places), SparseAttentionChunks(max_places));
        ASSERT_LT(SparseAttentionGroups(most, heads, max_places), SparseAttentionChunks(max_places));
        ASSERT_GT(SparseAttentionGroups(most, heads, max_places), 1);
      }
      for (int64_t r = 0; r < rows_; ++r) {
        ASSERT_EQ(FirstDifference(Run(layer, r, 1, true), RowOf(all, r)), -1) << "split, row " << r;
      }
      ASSERT_EQ(FirstDifference(Run(layer, rows_ - 1, 1, false), RowOf(all, rows_ - 1)), -1) << "whole";
      for (int64_t r = 0; r < rows_; r += most) {
        const int64_t count = std::min(most, rows_ - r);
        const std::vector<float> some = Run(layer, r, count, true);
        for (int64_t i = 0; i < count; ++i) {
          ASSERT_EQ(FirstDifference(RowOf(some, i), RowOf(all, r + i)), -1) << "row " << r + i << " of " << count;
        }
      }
    }
  }
}

TEST_F(CudaSparseAttention, AgreesWithTheTwin) {
  for (const int heads : {8, 16, 64, 128}) {
    SetHeads(heads);
    for (int layer = 0; layer < 3; ++layer) {
      SCOPED_TRACE(absl::StrCat(heads, " heads, layer ", layer));
      const std::vector<float> all = Run(layer, 0, rows_, true), twin = Twin(layer);
      // A logit's last bits move a probability in a few thousand over a rounding boundary, and that an output.
      // Probabilities rounded relative to another maximum would be 1e-3 apart.
      for (int64_t r = 0; r < rows_; ++r) EXPECT_LT(RelativeNorm(RowOf(all, r), RowOf(twin, r)), 7e-4) << "row " << r;
    }
  }
}

// Pure, so without a card.
TEST(SparseAttentionPlan, SplitsFewRowsOfLongListsAndNoOthers) {
  constexpr int64_t kCsa = 640;
  EXPECT_EQ(SparseAttentionGroups(1, 64, kCsa), 10) << "a block a chunk";
  EXPECT_EQ(SparseAttentionGroups(8, 64, kCsa), 8);
  EXPECT_EQ(SparseAttentionGroups(16, 64, kCsa), 4);
  EXPECT_EQ(SparseAttentionGroups(17, 64, kCsa), 1);
  EXPECT_EQ(SparseAttentionGroups(512, 64, kCsa), 1);
  EXPECT_EQ(SparseAttentionGroups(1, 64, kWindow), 1) << "two chunks";
  EXPECT_EQ(SparseAttentionGroups(1, 64, 1 << 20), 1) << "more than the workspace may take";
  EXPECT_EQ(SparseAttentionGroups(1, 64, kWindow + (1 << 13)), 64) << "HCA at a million tokens";
  EXPECT_EQ(SparseAttentionWorkspaceBytes(1, 64, kWindow), 0);
}

TEST(SparseAttentionPlan, WorkspaceHoldsEverySmallerPassThatIsSplit) {
  for (const int heads : {8, 64, 128}) {
    for (const int64_t rows : {1, 5, 16, 40}) {
      for (const int64_t places : {640, 8320, 100000}) {
        const int64_t bytes = SparseAttentionWorkspaceBytes(rows, heads, places);
        EXPECT_LE(bytes, kMaxAttentionWorkspaceBytes);
        for (int64_t r = 1; r <= rows; ++r) {
          for (const int64_t p : {int64_t{128}, int64_t{640}, places / 2, places}) {
            if (p > places || SparseAttentionGroups(r, heads, p) == 1) continue;
            EXPECT_GE(bytes, SplitAttentionBytes(r, heads, p)) << r << " rows, " << p << " places";
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace millrace::cuda
