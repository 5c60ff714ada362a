// SPDX-License-Identifier: Apache-2.0
// Long contexts at the widths of the release: a card prefills up to a million tokens, and at lengths on the way the CPU
// takes its state over and both go on.
//
// What a card alone cannot show is whether the entries it selects, the places it finds them at and the positions it
// rotates by are right so far out. The state is the same bytes for both backends, so the CPU needs no prefill of its
// own. Weights are random, made in memory: few layers, every width. Without a card the same runs between two CPU
// engines on a tiny model, where bits are asked for.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "engine/model/random_checkpoint.h"
#include "engine/status.h"
#include "tests/golden/carried_state.h"
#include "tests/golden/teacher_forcing.h"

namespace millrace::golden {
namespace {

constexpr int kContinued = 3;  // tokens that both engines take at a length: the last completes an entry now and then

template <typename T>
T Require(absl::StatusOr<T> value) {
  CHECK(value.ok(), value.status().ToString());
  return *std::move(value);
}

std::shared_ptr<const Checkpoint> RandomModel(ModelPreset preset, PresetChanges changes) {
  return Require(RandomCheckpointInMemory(PresetConfigJson(preset, changes), {.seed = 7}));
}

std::unique_ptr<Engine> MakeLongEngine(std::shared_ptr<const Checkpoint> model, DeviceKind device, int64_t tokens,
                                       int max_batch_tokens) {
  EngineOptions options;
  options.device = device;
  options.cache_pages = (tokens + 127) / 128;
  options.max_sequences = 1;
  options.max_context_tokens = tokens;
  options.max_batch_tokens = max_batch_tokens;
  options.num_threads = 2;
  options.notice = [](const std::string& line) { printf("%s\n", line.c_str()); };
  return Require(Engine::Create(std::move(model), options));
}

int32_t TokenAt(int64_t position, int64_t vocab) {
  return static_cast<int32_t>((static_cast<uint64_t>(position) * 0x9e3779b97f4a7c15u >> 33) %
                              static_cast<uint64_t>(vocab));
}

std::vector<int32_t> TokensAt(int64_t first, int64_t count, int64_t vocab) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(TokenAt(first + i, vocab));
  return tokens;
}

// Shares of one list found in the other; both are ascending.
double Overlap(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  std::vector<int32_t> common;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(common));
  return static_cast<double>(common.size()) / static_cast<double>(std::max(a.size(), b.size()));
}

struct LongBounds {
  double overlap = 1;  // of a row's selection, at least
  double streams = 0;  // relative norm after any layer, at most
};

// `source` prefills one sequence; at each length `target` takes its state over and both continue.
void ExpectTargetGoesOnAlike(Engine& source, Engine& target, const std::vector<int64_t>& lengths,
                             const LongBounds& bounds) {
  const int64_t vocab = source.config().vocab_size, topk = source.config().index_topk;
  const int64_t most = lengths.back() + kContinued;
  const SequenceId sequence = Require(source.NewSequence(most));
  for (const int64_t length : lengths) {
    SCOPED_TRACE(absl::StrCat("length ", length));
    while (source.Length(sequence) < length) {
      const int64_t at = source.Length(sequence);
      const std::vector<int32_t> tokens =
          TokensAt(at, std::min<int64_t>(length - at, source.options().max_batch_tokens), vocab);
      const Chunk chunk{.sequence = sequence, .tokens = tokens};
      Require(source.Forward({&chunk, 1}));
    }
    const SequenceId copy = Require(target.NewSequence(length + kContinued));
    CarryState(source, sequence, target, copy, length + kContinued, length);
    const std::vector<int32_t> next = TokensAt(length, kContinued, vocab);
    const Observed expected = Continue(target, copy, {.tokens = next, .observe_layers = true});
    const Observed found = Continue(source, sequence, {.tokens = next, .observe_layers = true});
    target.Release(copy);

    ASSERT_EQ(found.streams.size(), expected.streams.size());
    for (size_t layer = 0; layer < found.streams.size(); ++layer) {
      EXPECT_LE(RelativeNorm(found.streams[layer], expected.streams[layer]), bounds.streams) << "layer " << layer;
    }
    ASSERT_EQ(found.selections.size(), expected.selections.size());
    EXPECT_EQ(found.selections.empty(), (length + kContinued) / 4 <= topk) << "selection bites where there are more";
    double least = 1;
    for (const auto& [where, entries] : expected.selections) {
      const auto at = found.selections.find(where);
      ASSERT_NE(at, found.selections.end());
      ASSERT_EQ(static_cast<int64_t>(at->second.size()), topk);
      ASSERT_LT(at->second.back(), (where.second + 1) / 4) << "an entry that is not there yet";
      least = std::min(least, Overlap(at->second, entries));
    }
    EXPECT_GE(least, bounds.overlap);
    printf("length %ld: least overlap of %zu selections %.4f, streams after the last layer differ by %.2e\n",
           static_cast<long>(length), found.selections.size(), least,
           RelativeNorm(found.streams.back(), expected.streams.back()));
  }
  source.Release(sequence);
}

TEST(LongContext, AnotherEngineGoesOnWithTheSameBits) {
  const auto model = RandomModel(ModelPreset::kTiny, {.layers = 5});
  const auto source = MakeLongEngine(model, DeviceKind::kCpu, 4096, 512);
  const auto target = MakeLongEngine(model, DeviceKind::kCpu, 4096, 16);
  ExpectTargetGoesOnAlike(*source, *target, {60, 511, 2048, 4096 - kContinued}, {});
}

// Bounds of two right implementations that sum in another order; where scores are random many lie near the last chosen.
constexpr LongBounds kCardBounds = {0.9, 0.025};

TEST(CudaLongContext, ATinyModelGoesOnAsTheCpuDoes) {
  if (!CudaMissing().empty()) GTEST_SKIP() << CudaMissing();
  const auto model = RandomModel(ModelPreset::kTiny, {.layers = 5});
  const auto card = MakeLongEngine(model, DeviceKind::kCuda, 65536, 2048);
  const auto cpu = MakeLongEngine(model, DeviceKind::kCpu, 65536, 16);
  ExpectTargetGoesOnAlike(*card, *cpu, {511, 4096, 30001, 65536 - kContinued}, kCardBounds);
}

TEST(CudaLongContext, AMillionTokensOfFlashWidthsGoOnAsTheCpuDoes) {
  if (!CudaMissing().empty()) GTEST_SKIP() << CudaMissing();
  constexpr int64_t kMost = 1048576;
  const auto model = RandomModel(ModelPreset::kFlash, {.layers = 4, .experts = 8});
  const auto card = MakeLongEngine(model, DeviceKind::kCuda, kMost, 2048);
  const auto cpu = MakeLongEngine(model, DeviceKind::kCpu, kMost, 16);
  ExpectTargetGoesOnAlike(*card, *cpu, {4095, 65536, 262144 - 1, kMost / 2 + 77, kMost - kContinued}, kCardBounds);
}

}  // namespace
}  // namespace millrace::golden
