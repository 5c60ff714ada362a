// SPDX-License-Identifier: Apache-2.0
// Tokens drawn on the device are those of Sample from the same logits: ids and log-probabilities, bit for bit.
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/ops/cuda_sampler.h"
#include "engine/ops/cuda_test_util.h"

namespace millrace::cuda {
namespace {

class CudaSampler : public CudaTest {
 protected:
  // All rows at once, each with its request.
  std::vector<SampledToken> Run(const std::vector<float>& logits, int64_t vocab,
                                const std::vector<SamplingRequest>& requests) {
    std::vector<DrawRequest> draws;
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_TRUE(DrawsOnDevice(requests[i]));
      draws.push_back(MakeDrawRequest(requests[i], static_cast<int32_t>(i)));
    }
    DeviceArray<float> device_logits(logits);
    DeviceArray<DrawRequest> device_draws(draws);
    DeviceArray<DrawResult> results(static_cast<int64_t>(draws.size()));
    DeviceArray<uint8_t> workspace(DrawWorkspaceBytes(vocab, static_cast<int64_t>(draws.size())));
    DrawTokens(device_logits.data(), vocab, device_draws.data(), static_cast<int64_t>(draws.size()), workspace.data(),
               results.data(), stream());
    std::vector<SampledToken> tokens;
    for (const DrawResult& result : results.Fetch()) tokens.push_back(FinishDraw(result));
    return tokens;
  }
};

TEST_F(CudaSampler, DrawsTheCpusTokensFromTheSameLogits) {
  for (const int64_t vocab : {2, 7, 1000, 1024, 1025, 1536, 129280}) {
    SCOPED_TRACE(vocab);
    constexpr int kRows = 96;
    std::vector<float> logits = RandomF32(kRows * vocab, static_cast<uint32_t>(vocab), 4.0f);
    for (int64_t i = 0; i < vocab; i += 3) logits[i] = -std::numeric_limits<float>::infinity();  // row 0: a third gone
    std::fill(logits.begin() + vocab, logits.begin() + 2 * vocab, 1.0f);                         // row 1: all equal
    std::vector<SamplingRequest> requests(kRows);
    for (int r = 0; r < kRows; ++r) {
      requests[r].params.temperature = r % 4 == 0 ? 0.0f : r % 4 == 1 ? 1.0f : r % 4 == 2 ? 0.3f : 2.5f;
      requests[r].params.seed = 77 + static_cast<uint64_t>(r);
      requests[r].token_index = static_cast<uint64_t>(r) * 13;
      requests[r].choice = static_cast<uint32_t>(r % 5);
    }
    const std::vector<SampledToken> found = Run(logits, vocab, requests);
    for (int r = 0; r < kRows; ++r) {
      const SampledToken expected = Sample(absl::MakeConstSpan(logits).subspan(r * vocab, vocab), requests[r]);
      ASSERT_TRUE(found[r].finite) << r;
      ASSERT_EQ(found[r].id, expected.id) << "row " << r;
      ASSERT_EQ(std::memcmp(&found[r].logprob, &expected.logprob, 4), 0) << "row " << r;
    }
  }
}

TEST_F(CudaSampler, BrokenRowsAreSaidToBeBroken) {
  constexpr int64_t kVocab = 1536;
  std::vector<float> logits = RandomF32(3 * kVocab, 1);
  logits[700] = std::numeric_limits<float>::quiet_NaN();
  logits[kVocab + 1535] = std::numeric_limits<float>::infinity();
  std::fill(logits.begin() + 2 * kVocab, logits.end(), -std::numeric_limits<float>::infinity());
  for (const SampledToken& token : Run(logits, kVocab, std::vector<SamplingRequest>(3))) EXPECT_FALSE(token.finite);
}

TEST_F(CudaSampler, LeavesWhatItCannotDoToTheHost) {
  SamplingRequest request;
  EXPECT_TRUE(DrawsOnDevice(request));
  const auto refused = [&](auto change) {
    SamplingRequest changed;
    change(changed.params);
    return !DrawsOnDevice(changed);
  };
  EXPECT_TRUE(refused([](SamplingParams& p) { p.top_p = 0.9f; }));
  EXPECT_TRUE(refused([](SamplingParams& p) { p.top_k = 5; }));
  EXPECT_TRUE(refused([](SamplingParams& p) { p.min_p = 0.1f; }));
  EXPECT_TRUE(refused([](SamplingParams& p) { p.presence_penalty = 0.1f; }));
  EXPECT_TRUE(refused([](SamplingParams& p) { p.frequency_penalty = 0.1f; }));
  EXPECT_TRUE(refused([](SamplingParams& p) { p.repetition_penalty = 1.1f; }));
  EXPECT_TRUE(refused([](SamplingParams& p) { p.logit_bias = {{3, 1.0f}}; }));
  EXPECT_TRUE(refused([](SamplingParams& p) { p.banned = {1}; }));
  EXPECT_TRUE(refused([](SamplingParams& p) { p.top_logprobs = 1; }));
}

}  // namespace
}  // namespace millrace::cuda
