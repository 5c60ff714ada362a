// SPDX-License-Identifier: Apache-2.0
// What the equality suites share: subjects (a model in one numerics on one device), tokens, cuts, and the comparison of
// bits.
//
// The suites are equality_test.cc (how tokens are cut, what shares a pass, where experts run), and
// state_transfer_test.cc (where the state is carried). MILLRACE_LONG_TESTS=1 tries more cuts, batches and lengths.
// Thread: the test's.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "engine/engine.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"
#include "tests/golden/teacher_forcing.h"

namespace millrace::golden {

inline bool LongTests() { return std::getenv("MILLRACE_LONG_TESTS") != nullptr; }

struct Subject {
  const char* name;
  const char* model;
  Numerics numerics;
  DeviceKind device = DeviceKind::kCpu;
};
// ctest shows it; the default would be the bytes of pointers.
inline void PrintTo(const Subject& subject, std::ostream* out) { *out << subject.name; }

// Room for the longest one-shot pass; everything else about the engine is its default.
inline EngineOptions Options(const Subject& subject) {
  return {.numerics = subject.numerics,
          .device = subject.device,
          .cache_pages = 64,
          .max_sequences = 8,
          .max_batch_tokens = 768};
}

// Text the demo model was trained on (a note with codes in it), so that routing and selection are as in use.
inline std::vector<int32_t> NoteTokens(const Subject& subject, int n) {
  std::ifstream file(absl::StrCat(kDemoGoldens, "/golden_greedy.json"));
  auto tokens = nlohmann::json::parse(file)[18]["prompt_ids"].get<std::vector<int32_t>>();
  CHECK(static_cast<int>(tokens.size()) >= n);
  tokens.resize(n);
  const auto vocab = static_cast<int32_t>(OpenModel(subject.model)->config().vocab_size);
  for (int32_t& token : tokens) token %= vocab;
  return tokens;
}

inline std::vector<int32_t> RandomTokens(const Subject& subject, int n, uint32_t seed) {
  std::mt19937 random(seed);
  const auto vocab = static_cast<uint32_t>(OpenModel(subject.model)->config().vocab_size);
  std::vector<int32_t> tokens(n);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % vocab);
  return tokens;
}

// Rows `first`.. of the reference against all rows of `found`; names the first row that differs.
inline void ExpectSameBits(absl::Span<const float> found, const Observed& reference, int first, int64_t vocab) {
  const absl::Span<const float> expected = absl::MakeConstSpan(reference.logits).subspan(first * vocab, found.size());
  ASSERT_FALSE(found.empty());
  ASSERT_EQ(found.size(), expected.size());
  const int64_t at = FirstDifferentBit(found, expected);
  EXPECT_EQ(at, -1) << "position " << first + at / vocab << ", id " << at % vocab << ": " << found[at] << " instead of "
                    << expected[at];
}

inline void ExpectSameMtp(const Observed& found, const Observed& reference, int first, int end) {
  for (int position = first; position < end; ++position) {
    const auto ours = found.mtp_logits.find(position), theirs = reference.mtp_logits.find(position);
    ASSERT_NE(theirs, reference.mtp_logits.end()) << position;
    ASSERT_NE(ours, found.mtp_logits.end()) << "no MTP logits at position " << position;
    ASSERT_EQ(FirstDifferentBit(ours->second, theirs->second), -1) << "MTP logits at position " << position;
  }
}

// Sizes that sum to n: `first`, then `step` as long as they fit.
inline std::vector<int> Cut(int n, int first, int step) {
  std::vector<int> sizes{std::min(first, n)};
  for (int left = n - sizes[0]; left > 0; left -= sizes.back()) sizes.push_back(std::min(left, step));
  return sizes;
}

inline std::vector<int> RandomCut(int n, std::mt19937& random) {
  // Short and long chunks alike, and often a length that ends on or beside a boundary.
  constexpr int kLengths[] = {1, 2, 3, 4, 5, 7, 8, 31, 33, 63, 64, 65, 127, 128, 129, 130, 200, 256, 257};
  std::vector<int> sizes;
  for (int left = n; left > 0; left -= sizes.back())
    sizes.push_back(
        std::min<int>(left, random() % 3 == 0 ? 1 + random() % 300 : kLengths[random() % std::size(kLengths)]));
  return sizes;
}

// Leaves the free pages of an engine scattered: what a server's pool looks like after an hour.
inline void ScatterPages(Engine& engine) {
  std::vector<SequenceId> held;
  for (int i = 0; i < engine.options().max_sequences; ++i) held.push_back(*engine.NewSequence(1 + 128 * (i % 3)));
  std::mt19937 random(3);
  std::shuffle(held.begin(), held.end(), random);
  for (const SequenceId sequence : held) engine.Release(sequence);
}

class Equality : public testing::TestWithParam<Subject> {
 protected:
  void SetUp() override {
    if (GetParam().device == DeviceKind::kCuda && !CudaMissing().empty()) GTEST_SKIP() << CudaMissing();
  }

  static constexpr int kTokens = 700;

  int64_t vocab(const Engine& engine) const { return engine.config().vocab_size; }
};

// The demo model in both numerics, and the tiny model, whose indexer selects 16 entries and therefore bites from token
// 68 on. CUDA subjects are instantiated apart: their names begin with Cuda (label gpu), and they skip without a card.
inline constexpr Subject kSubjects[] = {{"DemoExact", kDemoModel, Numerics::kExact},
                                        {"DemoRelease", kDemoModel, Numerics::kRelease},
                                        {"TinyExact", "tests/data/tiny-a", Numerics::kExact}};
inline constexpr Subject kCudaSubjects[] = {{"DemoRelease", kDemoModel, Numerics::kRelease, DeviceKind::kCuda}};

}  // namespace millrace::golden
