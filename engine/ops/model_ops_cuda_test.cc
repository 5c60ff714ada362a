// SPDX-License-Identifier: Apache-2.0
// The device's operations against their CPU twins on the same inputs: norms, rotations, mHC, window, compressors,
// indexer, attention, gate, combination.
//
// Where both do the same IEEE operations in the same order (rotations, formats, selection, combination) bits are asked
// for. Where a sum runs over lanes in another order or an exponential is another library's, results before rounding
// differ by a few ulp of FP32, so that about one BF16 value in a thousand rounds the other way: bounds are relative
// norms well below one rounding (2^-9), each beside its check.
#include <numeric>

#include "absl/strings/str_cat.h"
#include "engine/device/buffer.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cuda_compressor.h"
#include "engine/ops/cuda_hyper_connection.h"
#include "engine/ops/cuda_indexer.h"
#include "engine/ops/cuda_moe.h"
#include "engine/ops/cuda_norm_rope.h"
#include "engine/ops/cuda_quantise.h"
#include "engine/ops/cuda_sparse_attention.h"
#include "engine/ops/cuda_test_util.h"

namespace millrace::cuda {
namespace {

constexpr double kFewRoundings = 2e-4;  // relative norm of a tensor in which one value in a thousand rounds otherwise

ModelConfig TestConfig() {
  ModelConfig c;
  c.vocab_size = 512;
  c.hidden_size = 256;
  c.num_hidden_layers = 3;
  c.num_attention_heads = 8;
  c.head_dim = 512;
  c.rope_head_dim = 64;
  c.sliding_window = 128;
  c.layer_kinds = {LayerKind::kWindow, LayerKind::kCsa, LayerKind::kHca};
  c.index_n_heads = 16;
  c.index_head_dim = 128;
  c.index_topk = 24;
  c.n_routed_experts = 16;
  c.num_experts_per_tok = 3;
  c.weight_format = WeightFormat::kFp8;
  return c;
}

RopeFrequencies TestFrequencies() {
  RopeFrequencies f;
  for (int i = 0; i < 32; ++i) f.f[i] = 1.0f / std::pow(160000.0f, static_cast<float>(2 * i) / 64);
  return f;
}

// Sequences in host memory with a device image of the same bytes: every operation runs on both.
class CudaModelOps : public CudaTest {
 protected:
  static constexpr int kPages = 40, kSlots = 4;

  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    pages_ = Buffer<uint8_t>(kPages * layout_.page_bytes);
    slots_ = Buffer<uint8_t>(kSlots * layout_.slot_bytes);
    device_pages_ = std::make_unique<DeviceArray<uint8_t>>(kPages * layout_.page_bytes);
    device_slots_ = std::make_unique<DeviceArray<uint8_t>>(kSlots * layout_.slot_bytes);
    CUDA_CHECK(cudaMemset(device_pages_->data(), 0, kPages * layout_.page_bytes));
    CUDA_CHECK(cudaMemset(device_slots_->data(), 0, kSlots * layout_.slot_bytes));
    // Scattered and interleaved pages, another order for each sequence.
    for (int s = 0; s < kSlots; ++s) {
      for (int p = 0; p < kPages / kSlots; ++p) table_.push_back((p * kSlots + s) * 7 % kPages);
    }
    for (int s = 0; s < kSlots; ++s) {
      for (int p = 0; p < kPages / kSlots; ++p) {
        host_pages_[s].push_back(pages_.data() + table_[s * kPages / kSlots + p] * layout_.page_bytes);
      }
    }
    device_table_ = std::make_unique<DeviceArray<int32_t>>(table_);
  }

  struct Part {
    int sequence;
    int64_t start, count;
  };
  // A pass over parts of sequences, as both backends describe it.
  struct BothPasses {
    std::vector<SequenceRows> sequences;
    std::vector<int64_t> positions;
    std::vector<int32_t> ids;
    Pass host() const { return {sequences, static_cast<int64_t>(ids.size()), positions.data(), ids.data()}; }
    std::unique_ptr<DeviceArray<int32_t>> device_ids, device_positions, device_row_sequence;
    std::unique_ptr<DeviceArray<SequenceView>> device_sequences;
    PassView device;
    std::vector<float> cos, sin;
    std::unique_ptr<DeviceArray<float>> device_cos, device_sin;
    RopeRows rope() const { return {cos.data(), sin.data()}; }
    RopeView rope_view() const { return {device_cos->data(), device_sin->data()}; }
  };

  std::unique_ptr<BothPasses> MakePass(const std::vector<Part>& parts) {
    auto p = std::make_unique<BothPasses>();
    std::vector<int32_t> positions, row_sequence;
    std::vector<SequenceView> views;
    for (const Part& part : parts) {
      const auto row = static_cast<int64_t>(p->ids.size());
      p->sequences.push_back({row, part.count, part.start, slots_.data() + part.sequence * layout_.slot_bytes,
                              &host_pages_[part.sequence]});
      views.push_back({row, part.count, part.start, device_slots_->data() + part.sequence * layout_.slot_bytes,
                       device_table_->data() + part.sequence * kPages / kSlots});
      for (int64_t i = 0; i < part.count; ++i) {
        p->ids.push_back(static_cast<int32_t>((row * 37 + i * 11) % config_.vocab_size));
        p->positions.push_back(part.start + i);
        positions.push_back(static_cast<int32_t>(part.start + i));
        row_sequence.push_back(static_cast<int32_t>(views.size()) - 1);
      }
    }
    p->device_ids = std::make_unique<DeviceArray<int32_t>>(p->ids);
    p->device_positions = std::make_unique<DeviceArray<int32_t>>(positions);
    p->device_row_sequence = std::make_unique<DeviceArray<int32_t>>(row_sequence);
    p->device_sequences = std::make_unique<DeviceArray<SequenceView>>(views);
    p->device = {static_cast<int64_t>(p->ids.size()),
                 static_cast<int>(views.size()),
                 p->device_ids->data(),
                 p->device_positions->data(),
                 p->device_row_sequence->data(),
                 p->device_sequences->data(),
                 device_pages_->data(),
                 layout_.page_bytes};
    const int64_t rows = p->device.num_rows;
    p->cos.resize(rows * 32);
    p->sin.resize(rows * 32);
    ops_.PrepareRope(frequencies_, p->positions.data(), rows, p->cos.data(), p->sin.data());
    p->device_cos = std::make_unique<DeviceArray<float>>(rows * 32);
    p->device_sin = std::make_unique<DeviceArray<float>>(rows * 32);
    PrepareRope(table(), p->device_positions->data(), rows, p->device_cos->data(), p->device_sin->data(), stream());
    return p;
  }

  RopeTable table() const {
    RopeTable t;
    std::copy_n(frequencies_.f, 32, t.f);
    return t;
  }

  // Makes both caches hold the host's bytes, so that the next operation starts from the same state.
  void UploadCache() {
    CUDA_CHECK(cudaMemcpy(device_pages_->data(), pages_.data(), pages_.bytes(), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(device_slots_->data(), slots_.data(), slots_.bytes(), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());
  }

  // Share of bytes of the cache that differ.
  double DifferentBytes() {
    const std::vector<uint8_t> pages = device_pages_->Fetch(), slots = device_slots_->Fetch();
    int64_t different = 0, written = 0;
    for (int64_t i = 0; i < pages_.bytes(); ++i) {
      different += pages[i] != pages_[i];
      written += pages_[i] != 0 || pages[i] != 0;
    }
    for (int64_t i = 0; i < slots_.bytes(); ++i) {
      different += slots[i] != slots_[i];
      written += slots_[i] != 0 || slots[i] != 0;
    }
    return static_cast<double>(different) / static_cast<double>(std::max<int64_t>(written, 1));
  }

  const ModelConfig config_ = TestConfig();
  const CacheLayout layout_ = CacheLayout::Make(config_, Numerics::kRelease, true);
  const RopeFrequencies frequencies_ = TestFrequencies();
  ThreadPool pool_{2};
  CpuOps ops_{config_, layout_, Rounding::All(), pool_, /*tiles=*/false};
  Buffer<uint8_t> pages_, slots_;
  std::unique_ptr<DeviceArray<uint8_t>> device_pages_, device_slots_;
  std::vector<int32_t> table_;
  std::unique_ptr<DeviceArray<int32_t>> device_table_;
  std::vector<uint8_t*> host_pages_[kSlots];
};

TEST_F(CudaModelOps, RopeTableHasTheCpusBits) {
  std::vector<Part> parts = {{0, 0, 300}};
  auto pass = MakePass(parts);
  EXPECT_EQ(FirstDifference(pass->device_cos->Fetch(), pass->cos), -1);
  EXPECT_EQ(FirstDifference(pass->device_sin->Fetch(), pass->sin), -1);
  // Up to the last position there can be.
  std::vector<int64_t> positions;
  std::vector<int32_t> narrow;
  for (int64_t p = 1; p < 1 << 20; p += 1009) {
    positions.push_back(p);
    narrow.push_back(static_cast<int32_t>(p));
  }
  const auto rows = static_cast<int64_t>(positions.size());
  std::vector<float> cos(rows * 32), sin(rows * 32);
  ops_.PrepareRope(frequencies_, positions.data(), rows, cos.data(), sin.data());
  DeviceArray<int32_t> device_positions(narrow);
  DeviceArray<float> device_cos(rows * 32), device_sin(rows * 32);
  PrepareRope(table(), device_positions.data(), rows, device_cos.data(), device_sin.data(), stream());
  EXPECT_EQ(FirstDifference(device_cos.Fetch(), cos), -1);
  EXPECT_EQ(FirstDifference(device_sin.Fetch(), sin), -1);
}

TEST_F(CudaModelOps, EmbedAndNormsAgree) {
  for (const int64_t dim : {128, 256, 4096}) {
    constexpr int64_t kRows = 19;
    HostRows rows;
    rows.dim = dim;
    rows.bf16 = Buffer<uint16_t>(64 * dim);
    const std::vector<float> values = RandomBf16(64 * dim, 1);
    for (size_t i = 0; i < values.size(); ++i) rows.bf16[static_cast<int64_t>(i)] = EncodeBf16(values[i]);
    std::vector<int32_t> ids(kRows);
    for (int64_t r = 0; r < kRows; ++r) ids[r] = static_cast<int32_t>(r * 3 % 64);
    std::vector<float> expected(kRows * 4 * dim);
    ops_.Embed(rows, ids.data(), kRows, 4, expected.data());
    DeviceArray<Bf16> embed_table(ToDeviceBf16(values)), streams(kRows * 4 * dim);
    DeviceArray<int32_t> device_ids(ids);
    Embed(embed_table.data(), device_ids.data(), kRows, 4, dim, streams.data(), stream());
    EXPECT_EQ(FirstDifference(FromDeviceBf16(streams.Fetch()), expected), -1);

    const std::vector<float> weight = RandomF32(dim, 2);
    DeviceArray<float> device_weight(weight);
    std::vector<float> normed(kRows * dim);
    ops_.RmsNorm(values.data(), weight.data(), kRows, dim, normed.data());
    DeviceArray<Bf16> out(kRows * dim);
    RmsNorm(embed_table.data(), device_weight.data(), kRows, dim, 1e-6f, out.data(), stream());
    EXPECT_LT(RelativeNorm(FromDeviceBf16(out.Fetch()), normed), kFewRoundings);
  }
}

TEST_F(CudaModelOps, QueryNormRopeAgrees) {
  auto pass = MakePass({{0, 1000, 9}});
  std::vector<float> q = RandomBf16(9 * 8 * 512, 3);
  DeviceArray<Bf16> device_q(ToDeviceBf16(q));
  ops_.QueryNormRope(q.data(), 8, pass->rope(), 9);
  QueryNormRope({device_q.data(), 8 * 512}, 8, pass->rope_view(), 9, 1e-6f, device_q.data(), stream());
  EXPECT_LT(RelativeNorm(FromDeviceBf16(device_q.Fetch()), q), kFewRoundings);
}

TEST_F(CudaModelOps, HyperConnectionsAgree) {
  // Clusters of 2, 1, 16 and 14 CTAs; the last walks its part of fn in two passes.
  for (const int64_t dim : {256, 96, 4096, 7168}) {
    ModelConfig config = config_;
    config.hidden_size = static_cast<int>(dim);
    CpuOps ops(config, layout_, Rounding::All(), pool_);
    const int64_t flat = 4 * dim;
    for (const int64_t rows : {1, 5, 33}) {
      SCOPED_TRACE(absl::StrCat(rows, " rows of ", dim));
      std::vector<float> streams = RandomBf16(rows * flat, 4, 2.0f);
      const std::vector<float> fn = RandomF32(24 * flat, 5, 0.05f), base = RandomF32(24, 6), scale = {0.9f, 1.1f, 0.7f};
      const std::vector<float> norm = RandomF32(dim, 7), out = RandomBf16(rows * dim, 8);
      const std::vector<float> old_post = RandomF32(rows * 4, 9), old_comb = RandomF32(rows * 16, 10, 0.3f);
      millrace::HyperConnectionWeights host{PackedLinear::FromF32(fn.data(), 24, flat), base, scale};
      DeviceArray<float> device_fn(fn), device_base(base), device_scale(scale), device_norm(norm);
      const HyperWeights device{device_fn.data(), device_base.data(), device_scale.data()};

      // With a sublayer's result to fold in, whose coefficients the new ones overwrite.
      DeviceArray<Bf16> device_streams(ToDeviceBf16(streams)), device_u(rows * dim), device_out(ToDeviceBf16(out));
      DeviceArray<float> post(old_post), comb(old_comb);
      DeviceArray<Bf16> rounded(rows * dim), wanted_rounded(rows * dim);
      HyperConnectionPre(device_streams.data(), {device_out.data(), nullptr, 0, post.data(), comb.data()}, device,
                         device_norm.data(), {}, rows, dim, {device_u.data(), rounded.data()}, post.data(), comb.data(),
                         stream());
      ops.HyperConnectionPost(out.data(), old_post.data(), old_comb.data(), rows, streams.data());
      EXPECT_LT(RelativeNorm(FromDeviceBf16(device_streams.Fetch()), streams), kFewRoundings);

      // From here on with the device's own streams.
      const std::vector<float> same = FromDeviceBf16(device_streams.Fetch());
      std::vector<float> u(rows * dim), host_post(rows * 4), host_comb(rows * 16);
      ops.HyperConnectionPre(same.data(), host, norm.data(), rows, u.data(), host_post.data(), host_comb.data());
      EXPECT_LT(RelativeNorm(post.Fetch(), host_post), 1e-5);
      EXPECT_LT(RelativeNorm(comb.Fetch(), host_comb), 1e-5);
      const std::vector<float> found = FromDeviceBf16(device_u.Fetch());
      // One row of 96 values is too few for an ulp here and there not to show.
      EXPECT_LT(RelativeNorm(found, u), rows == 1 ? 2 * kFewRoundings : kFewRoundings);
      RoundRows({device_u.data(), dim}, rows, dim, wanted_rounded.data(), stream());
      EXPECT_EQ(FirstDifference(FromDeviceBf16(rounded.Fetch()), FromDeviceBf16(wanted_rounded.Fetch())), -1);

      millrace::HyperConnectionWeights host_head{
          PackedLinear::FromF32(fn.data(), 4, flat), {base.begin(), base.begin() + 4}, {0.9f}};
      std::vector<float> z(rows * dim);
      ops.HyperHead(same.data(), host_head, norm.data(), rows, z.data());
      HyperHead(device_streams.data(), device, device_norm.data(), {}, rows, dim, device_u.data(), stream());
      EXPECT_LT(RelativeNorm(FromDeviceBf16(device_u.Fetch()), z), rows == 1 ? 2 * kFewRoundings : kFewRoundings);
    }
  }
}

// Folding apart and on the way, one row and many: the same bits.
TEST_F(CudaModelOps, HyperConnectionsOfARowHaveTheSameBitsWhateverElseIsThere) {
  constexpr int64_t kRows = 300, kDim = 4096;
  constexpr int kTop = 3;
  const std::vector<float> fn = RandomF32(24 * 4 * kDim, 5, 0.05f), base = RandomF32(24, 6), scale = {0.9f, 1.1f, 0.7f};
  DeviceArray<float> device_fn(fn), device_base(base), device_scale(scale), norm(RandomF32(kDim, 7));
  const HyperWeights w{device_fn.data(), device_base.data(), device_scale.data()};
  const std::vector<float> streams = RandomBf16(kRows * 4 * kDim, 4, 2.0f);
  DeviceArray<Bf16> out(ToDeviceBf16(RandomBf16(kRows * kDim, 8))),
      experts(ToDeviceBf16(RandomBf16(kRows * kTop * kDim, 11)));
  DeviceArray<float> old_post(RandomF32(kRows * 4, 9)), old_comb(RandomF32(kRows * 16, 10, 0.3f));
  struct Result {
    std::vector<float> streams, u, post, comb;
  };
  const auto run = [&](int64_t first, int64_t rows, bool apart) {
    const std::vector<float> mine(streams.begin() + first * 4 * kDim, streams.begin() + (first + rows) * 4 * kDim);
    DeviceArray<Bf16> x(ToDeviceBf16(mine)), u(rows * kDim), rounded(rows * kDim);
    DeviceArray<float> post(rows * 4), comb(rows * 16);
    HyperUpdate update{out.data() + first * kDim, experts.data() + first * kTop * kDim, kTop,
                       old_post.data() + first * 4, old_comb.data() + first * 16};
    if (apart) {
      HyperConnectionPost(update, rows, kDim, x.data(), stream());
      update = {};
    }
    HyperConnectionPre(x.data(), update, w, norm.data(), {}, rows, kDim, {u.data(), rounded.data()}, post.data(),
                       comb.data(), stream());
    return Result{FromDeviceBf16(x.Fetch()), FromDeviceBf16(u.Fetch()), post.Fetch(), comb.Fetch()};
  };
  const Result all = run(0, kRows, false);
  const auto expect_part = [&](const Result& part, int64_t first, int64_t rows) {
    const auto same = [&](const std::vector<float>& some, const std::vector<float>& whole, int64_t width) {
      return std::memcmp(some.data(), whole.data() + first * width, rows * width * 4) == 0;
    };
    EXPECT_TRUE(same(part.streams, all.streams, 4 * kDim));
    EXPECT_TRUE(same(part.u, all.u, kDim));
    EXPECT_TRUE(same(part.post, all.post, 4));
    EXPECT_TRUE(same(part.comb, all.comb, 16));
  };
  for (const bool apart : {false, true}) {
    for (const auto& [first, rows] : {std::pair{0, 1}, {17, 1}, {299, 1}, {5, 40}, {0, 300}}) {
      SCOPED_TRACE(absl::StrCat(rows, " from ", first, apart ? ", folded apart" : ""));
      expect_part(run(first, rows, apart), first, rows);
    }
  }
}

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

TEST_F(CudaModelOps, GateChoosesTheCpusExperts) {
  for (const int experts : {16, 256, 384}) {
    constexpr int64_t kRows = 61, kHidden = 256;
    constexpr int kTop = 6;
    const std::vector<float> u = RandomBf16(kRows * kHidden, 70), w = RandomBf16(experts * kHidden, 71, 0.1f),
                             bias = RandomF32(experts, 72, 0.1f);
    std::vector<uint16_t> bits(w.size());
    std::transform(w.begin(), w.end(), bits.begin(), EncodeBf16);
    const PackedLinear packed = PackedLinear::FromBf16(bits.data(), experts, kHidden);
    std::vector<int32_t> ids(kRows), tid2eid(512 * kTop);
    for (int64_t r = 0; r < kRows; ++r) ids[r] = static_cast<int32_t>(r * 5 % 512);
    for (int t = 0; t < 512; ++t) {
      for (int j = 0; j < kTop; ++j) tid2eid[t * kTop + j] = (t * 7 + (kTop - j) * 3) % experts;
    }
    DeviceArray<Bf16> device_u(ToDeviceBf16(u)), device_w(ToDeviceBf16(w));
    DeviceArray<float> device_bias(bias), logits(kRows * experts), weights(kRows * kTop);
    DeviceArray<int32_t> device_ids(ids), device_table(tid2eid), chosen(kRows * kTop);
    for (const bool hash : {false, true}) {
      std::vector<int32_t> expected(kRows * kTop);
      std::vector<float> expected_weights(kRows * kTop);
      ops_.Gate(u.data(), packed, hash ? nullptr : bias.data(), hash ? tid2eid.data() : nullptr, ids.data(), kRows,
                kTop, 1.5f, expected.data(), expected_weights.data());
      LinearBf16({WeightKind::kBf16, experts, kHidden, device_w.data()}, {device_u.data(), kHidden}, kRows,
                 {logits.data(), experts}, stream());
      Gate(logits.data(), experts, hash ? nullptr : device_bias.data(), hash ? device_table.data() : nullptr,
           device_ids.data(), kRows, kTop, 1.5f, chosen.data(), weights.data(), stream());
      EXPECT_EQ(chosen.Fetch(), expected);
      EXPECT_LT(RelativeNorm(weights.Fetch(), expected_weights), 1e-6);
    }
  }
}

TEST_F(CudaModelOps, CombinationHasTheCpusBits) {
  constexpr int64_t kRows = 9, kDim = 320;
  constexpr int kTop = 5;
  const std::vector<float> rows = RandomBf16(kRows * kTop * kDim, 80), shared = RandomBf16(kRows * kDim, 81);
  std::vector<float> expected(kRows * kDim);
  ops_.CombineExperts(rows.data(), shared.data(), kRows, kTop, kDim, expected.data());
  DeviceArray<Bf16> device_rows(ToDeviceBf16(rows)), device_shared(ToDeviceBf16(shared)),
      streams(ToDeviceBf16(std::vector<float>(kRows * 4 * kDim, 0.0f)));
  // Coefficients of one: every stream becomes the sum.
  DeviceArray<float> post(std::vector<float>(kRows * 4, 1.0f)), comb(std::vector<float>(kRows * 16, 0.0f));
  HyperConnectionPost({device_shared.data(), device_rows.data(), kTop, post.data(), comb.data()}, kRows, kDim,
                      streams.data(), stream());
  const std::vector<float> found = FromDeviceBf16(streams.Fetch());
  for (int64_t r = 0; r < kRows; ++r) {
    EXPECT_EQ(std::memcmp(found.data() + r * 4 * kDim, expected.data() + r * kDim, kDim * 4), 0);
  }
}

}  // namespace
}  // namespace millrace::cuda
