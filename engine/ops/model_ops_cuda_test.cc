// SPDX-License-Identifier: Apache-2.0
// The device's operations against their CPU twins on the same inputs: norms, rotations, mHC, gate, combination. What
// reads and writes the cache is attention_ops_cuda_test.cc.
#include "engine/ops/model_ops_cuda_test.h"

#include <numeric>

#include "absl/strings/str_cat.h"
#include "engine/ops/cuda_hyper_connection.h"
#include "engine/ops/cuda_moe.h"
#include "engine/ops/cuda_quantise.h"

namespace millrace::cuda {
namespace {

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
