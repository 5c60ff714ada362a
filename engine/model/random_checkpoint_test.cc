// SPDX-License-Identifier: Apache-2.0
// Random checkpoints open, are reproducible, and have the magnitudes they promise.
#include "engine/model/random_checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "engine/model/checkpoint.h"

namespace millrace {
namespace {

namespace fs = std::filesystem;

class RandomCheckpointTest : public ::testing::Test {
 protected:
  RandomCheckpointTest() {
    std::string name = ::testing::TempDir() + "millrace-random-XXXXXX";
    root_ = mkdtemp(name.data());
  }
  ~RandomCheckpointTest() override { fs::remove_all(root_); }

  std::unique_ptr<Checkpoint> Make(const std::string& name, PresetChanges changes,
                                   RandomCheckpointOptions options = {}) {
    const absl::Status status = MakeRandomCheckpoint(ModelPreset::kTiny, changes, root_ + "/" + name, options);
    EXPECT_TRUE(status.ok()) << status;
    auto checkpoint = Checkpoint::Open(root_ + "/" + name, {.verify_finite = true});
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return checkpoint.ok() ? *std::move(checkpoint) : nullptr;
  }

  std::string root_;
};

constexpr PresetChanges kSmall = {.layers = 3, .experts = 2};

TEST_F(RandomCheckpointTest, OpensWholeAndPlain) {
  const auto whole = Make("whole", {});
  ASSERT_NE(whole, nullptr);
  EXPECT_EQ(whole->config().num_hidden_layers, 6);
  const auto plain = Make("plain", {.layers = 3, .experts = 2, .plain = true});
  ASSERT_NE(plain, nullptr);
  EXPECT_EQ(plain->Get("layers.0.ffn.experts.1.w1.weight").dtype, DType::kBF16);
  EXPECT_EQ(plain->Get("layers.0.ffn.experts.1.w1.weight").shape, (std::vector<int64_t>{128, 256}));
}

TEST_F(RandomCheckpointTest, BytesDependOnSeedAndNameOnly) {
  const auto one = Make("one", kSmall, {.seed = 1});
  const auto sharded = Make("sharded", kSmall, {.seed = 1, .max_shard_bytes = 1 << 20});
  const auto other = Make("other", kSmall, {.seed = 2});
  const auto larger = Make("larger", {.layers = 4, .experts = 2}, {.seed = 1});
  ASSERT_TRUE(one && sharded && other && larger);
  EXPECT_EQ(one->ContentHash(), sharded->ContentHash());
  EXPECT_NE(one->ContentHash(), other->ContentHash());
  const HostTensor &a = one->Get("layers.2.attn.wq_b.weight"), &b = larger->Get("layers.2.attn.wq_b.weight");
  ASSERT_EQ(a.bytes, b.bytes);
  EXPECT_EQ(std::memcmp(a.data, b.data, static_cast<size_t>(a.bytes)), 0);
}

TEST_F(RandomCheckpointTest, MemoryHoldsWhatAFileWould) {
  const auto file = Make("file", kSmall, {.seed = 3});
  const auto memory = RandomCheckpointInMemory(PresetConfigJson(ModelPreset::kTiny, kSmall), {.seed = 3});
  ASSERT_TRUE(file != nullptr && memory.ok()) << memory.status();
  EXPECT_EQ((*memory)->ContentHash(), file->ContentHash());
  EXPECT_EQ((*memory)->total_bytes(), file->total_bytes());
  EXPECT_FALSE((*memory)->Has("layers.9.attn.wq_b.weight"));
  EXPECT_FALSE(RandomCheckpointInMemory("{}").ok());
}

TEST_F(RandomCheckpointTest, LinearsKeepTheVarianceOfTheirInput) {
  const auto checkpoint = Make("one", kSmall);
  ASSERT_NE(checkpoint, nullptr);
  const auto scale_of = [](const HostTensor& scale, int64_t row, int64_t column) {
    return std::ldexp(1.0, scale.data[row * scale.shape[1] + column] - 127);
  };
  const HostTensor &fp8 = checkpoint->Get("layers.1.attn.wq_b.weight"),
                   &fp8_scale = checkpoint->Get("layers.1.attn.wq_b.scale");
  double sum = 0;
  for (int64_t i = 0; i < fp8.bytes; ++i) {
    const int code = fp8.data[i] & 0x7f, exponent = code >> 3, mantissa = code & 7;
    const double value = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    const double scaled = value * scale_of(fp8_scale, i / fp8.shape[1] / 128, i % fp8.shape[1] / 128);
    sum += scaled * scaled;
  }
  // A quarter of the blocks doubled, a quarter halved: 1.56 times the variance 1/K on average.
  const double fp8_variance = sum / static_cast<double>(fp8.bytes) * static_cast<double>(fp8.shape[1]);
  EXPECT_GT(fp8_variance, 0.4);
  EXPECT_LT(fp8_variance, 4);

  constexpr double kE2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const HostTensor &fp4 = checkpoint->Get("layers.1.ffn.experts.0.w1.weight"),
                   &fp4_scale = checkpoint->Get("layers.1.ffn.experts.0.w1.scale");
  sum = 0;
  for (int64_t i = 0; i < fp4.bytes * 2; ++i) {
    const double value = kE2m1[(fp4.data[i / 2] >> (4 * (i % 2))) & 7];
    const double scaled = value * scale_of(fp4_scale, i / 2 / fp4.shape[1], i % (2 * fp4.shape[1]) / 32);
    sum += scaled * scaled;
  }
  const double fp4_variance = sum / static_cast<double>(fp4.bytes * 2) * static_cast<double>(2 * fp4.shape[1]);
  EXPECT_NEAR(fp4_variance, 1.56, 0.3);
}

TEST_F(RandomCheckpointTest, RefusesADirectoryWithAModelAndReportsProgress) {
  int64_t last = 0, all = 0;
  const auto made = Make("one", kSmall, {.progress = [&](int64_t done, int64_t total) {
                           EXPECT_GT(done, last);
                           last = done, all = total;
                         }});
  EXPECT_EQ(last, all);
  EXPECT_EQ(made->total_bytes(), all);
  const absl::Status again = MakeRandomCheckpoint(ModelPreset::kTiny, kSmall, root_ + "/one");
  EXPECT_EQ(again.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(MakeRandomCheckpoint("{}", root_ + "/bad").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(fs::exists(root_ + "/bad"));
}

// Fails before the first byte (or succeeds on a machine with a terabyte to spare, where it is not tried).
TEST_F(RandomCheckpointTest, W30AsksForRoomFirst) {
  if (fs::space(root_).available > 800'000'000'000) GTEST_SKIP() << "enough room for Pro here";
  const absl::Status status = MakeRandomCheckpoint(ModelPreset::kPro, {}, root_ + "/pro");
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("free space: found "));
  EXPECT_TRUE(fs::is_empty(root_ + "/pro"));
}

}  // namespace
}  // namespace millrace
