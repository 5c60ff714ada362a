// SPDX-License-Identifier: Apache-2.0
// A sequence whose state was carried elsewhere continues with the bits of one that stayed: what a hand-off rests on.
//
// Carried means exported extents copied byte by byte into another engine's memory, at every length around a boundary of
// a compressed block. On CUDA two more: a state that crosses backends, and steps that are replayed as graphs. Cutting,
// batching and experts are equality_test.cc.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/device/device_copy.h"
#include "tests/golden/carried_state.h"
#include "tests/golden/equality_support.h"

namespace millrace::golden {
namespace {

// The first length from which a continuation crosses two CSA boundaries and one HCA boundary, and sees past them.
int ContinueUntil(int n) { return std::max(n + 9, (n / 128 + 1) * 128 + 2); }

class StateTransfer : public testing::TestWithParam<Subject> {
 protected:
  void SetUp() override {
    if (GetParam().device == DeviceKind::kCuda && !CudaMissing().empty()) GTEST_SKIP() << CudaMissing();
    EngineOptions options = Options(GetParam());
    options.mtp = true;  // its window and the last streams are part of the state
    source_ = MakeEngine(GetParam().model, options);
    target_ = MakeEngine(GetParam().model, options);
    ScatterPages(*target_);
    tokens_ = NoteTokens(GetParam(), ContinueUntil(LastLength()));
    reference_ = RunFresh(*source_, {.tokens = tokens_});
  }

  static int LastLength() { return LongTests() ? 600 : 300; }

  // Carries the state at `n` over, continues there (three steps, then the rest in one chunk) and compares.
  void ExpectContinues(SequenceId from, int n) {
    SCOPED_TRACE(absl::StrCat("state of ", n, " tokens"));
    const auto max_tokens = static_cast<int64_t>(tokens_.size());
    const absl::StatusOr<SequenceId> to = target_->NewSequence(max_tokens);
    ASSERT_TRUE(to.ok()) << to.status().ToString();
    CarryState(*source_, from, *target_, *to, max_tokens, n);
    if (HasFatalFailure()) return;
    const int end = ContinueUntil(n);
    const Observed found = Continue(
        *target_, *to, {.tokens = absl::MakeConstSpan(tokens_).subspan(n, end - n), .chunks = {1, 1, 1, end - n - 3}});
    ExpectSameBits(found.logits, reference_, n, target_->config().vocab_size);
    ExpectSameMtp(found, reference_, n - 1, end - 1);
    target_->Release(*to);
  }

  std::unique_ptr<Engine> source_, target_;
  std::vector<int32_t> tokens_;
  Observed reference_;
};

TEST_P(StateTransfer, AtEveryLengthContinuesWithTheBitsOfUninterrupted) {
  const SequenceId from = *source_->NewSequence(static_cast<int64_t>(tokens_.size()));
  for (int n = 1; n <= LastLength(); ++n) {
    const Observed step = Continue(*source_, from, {.tokens = absl::MakeConstSpan(tokens_).subspan(n - 1, 1)});
    ExpectSameBits(step.logits, reference_, n - 1, source_->config().vocab_size);
    ExpectContinues(from, n);
    if (HasFailure()) break;
  }
}

TEST_P(StateTransfer, OfAPromptPrefilledAtOnceContinuesWithTheBitsOfUninterrupted) {
  std::vector<int> lengths{1, 2, 3, 4, 5, 6, 7, 8, 127, 128, 129, 130, 131, 132, 135, 136, 255, 256, 257, 260, 300};
  if (LongTests()) lengths = Positions(1, LastLength());
  for (const int n : lengths) {
    const SequenceId from = *source_->NewSequence(n);
    Continue(*source_, from, {.tokens = absl::MakeConstSpan(tokens_).first(n)});
    ExpectContinues(from, n);
    source_->Release(from);
    if (HasFailure()) break;
  }
}

TEST_P(StateTransfer, ExtentsDependOnNothingButTheLength) {
  const auto max_tokens = static_cast<int64_t>(tokens_.size());
  const SequenceId longer = *source_->NewSequence(max_tokens), other = *target_->NewSequence(max_tokens);
  Continue(*source_, longer, {.tokens = tokens_});
  for (const int n : {1, 127, 128, 129, 256, 300}) {
    const std::vector<CacheExtent> a = source_->Extents(longer, n), b = target_->Extents(other, n);
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_EQ(a[i].index, b[i].index);
      EXPECT_EQ(a[i].bytes, b[i].bytes);
      EXPECT_EQ(a[i].page, b[i].page);
      EXPECT_EQ(a[i].layer_begin, b[i].layer_begin);
      EXPECT_EQ(a[i].layer_end, b[i].layer_end);
    }
  }
}

TEST_P(StateTransfer, NothingOfAnEarlierOwnerIsInANewSequence) {
  const auto max_tokens = static_cast<int64_t>(tokens_.size());
  const SequenceId earlier = *target_->NewSequence(max_tokens);
  const std::vector<CacheExtent> before = target_->Extents(earlier, max_tokens);
  for (const CacheExtent& extent : before) FillExtent(*target_, extent, 0xff);
  target_->Release(earlier);
  const std::vector<CacheExtent> after = target_->Extents(*target_->NewSequence(max_tokens), max_tokens);
  ASSERT_EQ(after.size(), before.size());
  for (size_t i = 0; i < after.size(); ++i) {
    ASSERT_EQ(after[i].data, before[i].data) << "the same memory";
    std::vector<uint8_t> bytes(after[i].bytes, 0xff);
    if (target_->options().device == DeviceKind::kCuda) {
      ASSERT_TRUE(CopyFromDevice(bytes.data(), after[i].data, after[i].bytes).ok());
    } else {
      std::memcpy(bytes.data(), after[i].data, bytes.size());
    }
    ASSERT_EQ(std::count(bytes.begin(), bytes.end(), 0), after[i].bytes) << "extent " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(All, StateTransfer, testing::ValuesIn(kSubjects),
                         [](const auto& param_info) { return param_info.param.name; });
INSTANTIATE_TEST_SUITE_P(Cuda, StateTransfer, testing::ValuesIn(kCudaSubjects),
                         [](const auto& param_info) { return param_info.param.name; });

// One layout, one set of bytes: a prompt prefilled by one backend is decoded by the other. Not the same bits as one
// backend alone (their sums differ in order), but the same answer.
TEST(CudaStateTransfer, BetweenBackendsContinuesWithTheSameAnswer) {
  if (!CudaMissing().empty()) GTEST_SKIP() << CudaMissing();
  EngineOptions options = Options({"", kDemoModel, Numerics::kRelease});
  options.mtp = true;
  const std::unique_ptr<Engine> cpu = MakeEngine(kDemoModel, options);
  options.device = DeviceKind::kCuda;
  const std::unique_ptr<Engine> cuda = MakeEngine(kDemoModel, options);
  ASSERT_EQ(cpu->layout().Id(), cuda->layout().Id());
  ASSERT_NE(cpu->CompatibilityHash(), cuda->CompatibilityHash()) << "they must not pair by themselves";
  constexpr int kTotal = 620;
  const std::vector<int32_t> tokens = NoteTokens({"", kDemoModel, Numerics::kRelease}, kTotal);
  const Observed reference = RunFresh(*cpu, {.tokens = tokens});
  const int64_t vocab = cpu->config().vocab_size;
  for (const int n : {1, 127, 130, 258, 600}) {
    for (const bool to_cuda : {true, false}) {
      SCOPED_TRACE(absl::StrCat(n, to_cuda ? " tokens to CUDA" : " tokens to the CPU"));
      Engine &source = to_cuda ? *cpu : *cuda, &target = to_cuda ? *cuda : *cpu;
      const SequenceId from = *source.NewSequence(kTotal), to = *target.NewSequence(kTotal);
      Continue(source, from, {.tokens = absl::MakeConstSpan(tokens).first(n)});
      CarryState(source, from, target, to, kTotal, n);
      ASSERT_FALSE(HasFatalFailure());
      const Observed found = Continue(target, to, {.tokens = absl::MakeConstSpan(tokens).subspan(n, 20)});
      double difference = 0;
      for (int i = 0; i < 20; ++i) {
        const auto row = [&](const std::vector<float>& logits, int at) {
          return LogProbabilities(absl::MakeConstSpan(logits).subspan(at * vocab, vocab));
        };
        const std::vector<double> ours = row(found.logits, i), theirs = row(reference.logits, n + i);
        const auto best = std::max_element(theirs.begin(), theirs.end()) - theirs.begin();
        difference += std::abs(ours[best] - theirs[best]) / 20;
      }
      EXPECT_LT(difference, 0.02) << "log-probability of the best token, mean of 20";
      source.Release(from);
      target.Release(to);
    }
  }
}

// A decode step on CUDA is a replayed graph over a padded batch, and its tokens are drawn on the device. The reference
// is the same sequence alone, its logits brought back and sampled here.
TEST(CudaSteps, ReplayedAndPaddedStepsDrawTheTokensOfLaunchesAlone) {
  if (!CudaMissing().empty()) GTEST_SKIP() << CudaMissing();
  const Subject subject{"", kDemoModel, Numerics::kRelease, DeviceKind::kCuda};
  for (const bool mtp : {false, true}) {
    EngineOptions options = Options(subject);
    options.max_sequences = 20;
    options.mtp = mtp;
    const std::unique_ptr<Engine> engine = MakeEngine(kDemoModel, options);
    const int64_t vocab = engine->config().vocab_size;
    constexpr int kSteps = 8;
    for (const size_t batch : {1, 2, 9, 11, 17}) {
      SCOPED_TRACE(absl::StrCat(batch, " sequences, ", mtp ? "with" : "without", " MTP"));
      std::vector<SequenceId> sequences, alone;
      std::vector<std::vector<int32_t>> tokens;
      for (size_t i = 0; i < batch; ++i) {
        tokens.push_back(RandomTokens(subject, 3 + static_cast<int>(i * 29 % 140), static_cast<uint32_t>(i)));
        sequences.push_back(*engine->NewSequence(200));
        Continue(*engine, sequences[i], {.tokens = tokens[i]});
      }
      std::vector<std::vector<int32_t>> drawn(batch);
      std::vector<std::vector<float>> logprobs(batch);
      const auto request = [&](size_t i, int step) {
        SamplingRequest r;
        r.params.temperature = i % 3 == 0 ? 0.0f : i % 3 == 1 ? 1.0f : 0.7f;
        r.params.seed = i;
        r.params.top_k = i % 5 == 4 ? 20 : 0;  // those are drawn on the host, in the same step
        r.token_index = static_cast<uint64_t>(step);
        return r;
      };
      for (int step = 0; step < kSteps; ++step) {
        std::vector<SamplingRequest> requests;
        for (size_t i = 0; i < batch; ++i) requests.push_back(request(i, step));
        std::vector<Chunk> chunks;
        for (size_t i = 0; i < batch; ++i) {
          const std::vector<int32_t>& from = step == 0 ? tokens[i] : drawn[i];
          chunks.push_back({.sequence = sequences[i], .tokens = {&from.back(), 1}, .sampling = &requests[i]});
        }
        const auto outputs = engine->Forward(chunks);
        ASSERT_TRUE(outputs.ok()) << outputs.status().ToString();
        for (size_t i = 0; i < batch; ++i) {
          drawn[i].push_back((*outputs)[i].sampled.id);
          logprobs[i].push_back((*outputs)[i].sampled.logprob);
        }
      }
      for (size_t i = 0; i < batch; ++i) {
        SCOPED_TRACE(absl::StrCat("sequence ", i));
        engine->Release(sequences[i]);
        const SequenceId reference = *engine->NewSequence(200);
        Continue(*engine, reference, {.tokens = tokens[i]});
        int32_t next = tokens[i].back();
        for (int step = 0; step < kSteps; ++step) {
          const Observed seen = Continue(*engine, reference, {.tokens = {&next, 1}});
          const SampledToken expected = Sample({seen.logits.data(), static_cast<size_t>(vocab)}, request(i, step));
          ASSERT_EQ(drawn[i][step], expected.id) << "step " << step;
          ASSERT_EQ(logprobs[i][step], expected.logprob) << "step " << step;
          next = expected.id;
        }
        engine->Release(reference);
      }
    }
  }
}

}  // namespace
}  // namespace millrace::golden
