// SPDX-License-Identifier: Apache-2.0
// The same bits, whatever the way there: the promise everything else in the cluster stands on.
//
// A token's logits may depend on its sequence's tokens and on nothing else: not on how a prompt was cut, what shares
// the pass, which process ran an expert, or how many threads did; where the state was carried is
// state_transfer_test.cc. Every comparison here is of bits; the reference is always one pass over the whole sequence.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/moe/cuda_experts.h"
#include "engine/moe/local_experts.h"
#include "engine/status.h"
#include "tests/golden/equality_support.h"

namespace millrace::golden {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// How the tokens are cut
// ---------------------------------------------------------------------------------------------------------------------

TEST_P(Equality, AnyChunkingGivesTheBitsOfOnePass) {
  const std::unique_ptr<Engine> engine = MakeEngine(GetParam().model, Options(GetParam()));
  const std::vector<int32_t> tokens = NoteTokens(GetParam(), kTokens);
  const Observed reference = RunFresh(*engine, {.tokens = tokens});

  std::map<std::string, std::vector<int>> cuts;
  cuts["one token at a time"] = Cut(kTokens, 1, 1);
  // Chunks that end before, on and after every boundary of a CSA block, then of an HCA block.
  for (const int first : {1, 2, 3, 4}) cuts[absl::StrCat(first, ", then fours")] = Cut(kTokens, first, 4);
  for (const int first : {127, 128, 129}) cuts[absl::StrCat(first, ", then 128s")] = Cut(kTokens, first, 128);
  cuts["127s"] = Cut(kTokens, 127, 127);
  cuts["129s"] = Cut(kTokens, 129, 129);
  std::mt19937 random(20);
  for (int i = 0; i < (LongTests() ? 200 : 5); ++i) cuts[absl::StrCat("random cut ", i)] = RandomCut(kTokens, random);

  for (const auto& [name, sizes] : cuts) {
    SCOPED_TRACE(name);
    const Observed found = RunFresh(*engine, {.tokens = tokens, .chunks = sizes});
    ExpectSameBits(found.logits, reference, 0, vocab(*engine));
    if (HasFailure()) break;  // one cut that differs says enough
  }
}

TEST_P(Equality, LaterTokensOfThePassChangeNothing) {
  const std::unique_ptr<Engine> engine = MakeEngine(GetParam().model, Options(GetParam()));
  const std::vector<int32_t> tokens = NoteTokens(GetParam(), kTokens);
  const Observed reference = RunFresh(*engine, {.tokens = tokens});
  for (const int length : {1,   2,   3,   4,   5,   6,   7,   8,   63,  64,  65,  127, 128, 129, 131,
                           132, 133, 255, 256, 257, 258, 511, 512, 513, 514, 515, 516, 640, 699}) {
    SCOPED_TRACE(absl::StrCat(length, " tokens"));
    const Observed found = RunFresh(*engine, {.tokens = absl::MakeConstSpan(tokens).subspan(0, length)});
    ExpectSameBits(found.logits, reference, 0, vocab(*engine));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What shares the pass
// ---------------------------------------------------------------------------------------------------------------------

// Several sequences, each with its reference and how far it is.
struct Runner {
  std::vector<int32_t> tokens;
  Observed alone;
  SequenceId sequence;
  int done = 0;
  std::vector<float> logits;
};

// One Forward() over the next `sizes[i]` tokens of runner i (0: not in this pass), in a random order of chunks.
void Step(Engine& engine, std::vector<Runner>& runners, const std::vector<int>& sizes, std::mt19937& random) {
  std::vector<size_t> order;
  for (size_t i = 0; i < runners.size(); ++i)
    if (sizes[i] > 0) order.push_back(i);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<std::vector<int32_t>> rows(order.size());
  std::vector<Chunk> chunks;
  for (size_t k = 0; k < order.size(); ++k) {
    const Runner& runner = runners[order[k]];
    rows[k] = Positions(0, sizes[order[k]]);
    chunks.push_back({.sequence = runner.sequence,
                      .tokens = absl::MakeConstSpan(runner.tokens).subspan(runner.done, sizes[order[k]]),
                      .logit_rows = rows[k]});
  }
  absl::StatusOr<std::vector<ChunkOutput>> outputs = engine.Forward(chunks);
  ASSERT_TRUE(outputs.ok()) << outputs.status().ToString();
  for (size_t k = 0; k < order.size(); ++k) {
    Runner& runner = runners[order[k]];
    const std::vector<float>& logits = (*outputs)[k].logits;
    runner.logits.insert(runner.logits.end(), logits.begin(), logits.end());
    runner.done += sizes[order[k]];
  }
}

TEST_P(Equality, BatchedWithOthersGivesTheBitsOfAlone) {
  const std::unique_ptr<Engine> engine = MakeEngine(GetParam().model, Options(GetParam()));
  const int64_t width = vocab(*engine);
  std::vector<Runner> runners;
  runners.push_back({NoteTokens(GetParam(), kTokens)});
  for (const int length : {3, 61, 128, 133, 300, 530}) runners.push_back({RandomTokens(GetParam(), length, length)});
  for (Runner& runner : runners) runner.alone = RunFresh(*engine, {.tokens = runner.tokens});

  for (int seed = 0; seed < (LongTests() ? 60 : 2); ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 random(seed);
    ScatterPages(*engine);
    for (Runner& runner : runners) {
      const absl::StatusOr<SequenceId> sequence = engine->NewSequence(static_cast<int64_t>(runner.tokens.size()));
      ASSERT_TRUE(sequence.ok()) << sequence.status().ToString();
      runner.sequence = *sequence;
      runner.done = 0;
      runner.logits.clear();
    }
    // Any mix of prefill chunks and decode steps, until all are through.
    for (bool more = true; more;) {
      std::vector<int> sizes(runners.size(), 0);
      int budget = engine->options().max_batch_tokens;
      more = false;
      for (size_t i = 0; i < runners.size(); ++i) {
        const int left = static_cast<int>(runners[i].tokens.size()) - runners[i].done;
        more |= left > 0;
        if (left == 0 || random() % 4 == 0) continue;
        const int wanted =
            random() % 2 == 0 ? 1 + static_cast<int>(random() % 3) : 1 + static_cast<int>(random() % 150);
        sizes[i] = std::min({left, wanted, budget});
        budget -= sizes[i];
      }
      if (std::accumulate(sizes.begin(), sizes.end(), 0) > 0) Step(*engine, runners, sizes, random);
      ASSERT_FALSE(HasFatalFailure());
    }
    for (Runner& runner : runners) {
      SCOPED_TRACE(absl::StrCat("the sequence of ", runner.tokens.size(), " tokens"));
      ExpectSameBits(runner.logits, runner.alone, 0, width);
      engine->Release(runner.sequence);
    }
  }
}

TEST_P(Equality, DecodeBatchOfEverySizeGivesTheBitsOfAlone) {
  const std::unique_ptr<Engine> engine = MakeEngine(GetParam().model, Options(GetParam()));
  constexpr int kSteps = 10;
  std::vector<Runner> runners;
  for (const int length : {1, 5, 62, 127, 200, 256, 400, 560})  // where the first decode step falls
    runners.push_back({RandomTokens(GetParam(), length + kSteps, length)});
  for (Runner& runner : runners) runner.alone = RunFresh(*engine, {.tokens = runner.tokens});
  std::mt19937 random(7);
  for (const size_t batch : {1, 2, 3, 5, 8}) {
    SCOPED_TRACE(absl::StrCat(batch, " sequences"));
    std::vector<Runner> chosen(runners.begin(), runners.begin() + static_cast<std::ptrdiff_t>(batch));
    for (Runner& runner : chosen) {
      runner.sequence = *engine->NewSequence(static_cast<int64_t>(runner.tokens.size()));
      const int prompt = static_cast<int>(runner.tokens.size()) - kSteps;
      runner.logits =
          Continue(*engine, runner.sequence, {.tokens = absl::MakeConstSpan(runner.tokens).first(prompt)}).logits;
      runner.done = prompt;
    }
    for (int step = 0; step < kSteps; ++step) Step(*engine, chosen, std::vector<int>(batch, 1), random);
    for (Runner& runner : chosen) {
      ExpectSameBits(runner.logits, runner.alone, 0, vocab(*engine));
      engine->Release(runner.sequence);
    }
    if (HasFailure()) break;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Where experts run, and on how many threads
// ---------------------------------------------------------------------------------------------------------------------

// Several holders of parts of the experts each, on the subject's device or on the CPU. A batch is taken apart into
// (token, expert) pairs, shuffled, cut into pieces of random sizes and computed by any owner: what a pool does to it,
// without the pool.
class PartitionedExperts : public ExpertExchange {
 public:
  PartitionedExperts(const Subject& subject, DeviceKind device, const std::vector<std::vector<int>>& parts,
                     uint32_t seed)
      : random_(seed) {
    for (const std::vector<int>& experts : parts) {
      const LocalExpertsOptions options = {
          .numerics = subject.numerics, .rounding = Rounding::For(subject.numerics), .experts = experts, .mtp = true};
      absl::StatusOr<std::unique_ptr<ExpertComputer>> owner =
          device == DeviceKind::kCuda ? CreateCudaExperts(*OpenModel(subject.model), options)
                                      : LocalExperts::Create(*OpenModel(subject.model), options);
      CHECK(owner.ok(), owner.status().ToString());
      owners_.push_back(std::move(*owner));
    }
  }

  absl::Status Dispatch(const ExpertBatch& batch) override {
    batch_ = batch;
    return absl::OkStatus();
  }

  std::string KernelSet() const override { return owners_[0]->KernelSet(); }

  absl::Status Combine(void* expert_rows) override {
    std::map<int32_t, std::vector<int64_t>> pairs;  // expert -> indices into [num_tokens, top_k]
    for (int64_t i = 0; i < batch_.num_tokens * batch_.top_k; ++i) pairs[batch_.experts[i]].push_back(i);
    std::vector<std::pair<int32_t, std::vector<int64_t>>> pieces;
    for (auto& [expert, indices] : pairs) {
      std::shuffle(indices.begin(), indices.end(), random_);
      for (size_t begin = 0, size; begin < indices.size(); begin += size) {
        size = std::min<size_t>(indices.size() - begin, 1 + random_() % 64);
        pieces.push_back({expert, {indices.begin() + begin, indices.begin() + begin + size}});
      }
    }
    std::shuffle(pieces.begin(), pieces.end(), random_);
    for (const auto& [expert, indices] : pieces) {
      RETURN_IF_ERROR(Compute(expert, indices, static_cast<uint8_t*>(expert_rows)));
    }
    return absl::OkStatus();
  }

  int64_t pieces_computed() const { return pieces_computed_; }

 private:
  absl::Status Compute(int32_t expert, const std::vector<int64_t>& indices, uint8_t* expert_rows) {
    const int64_t row_bytes = RowBytes(batch_.format, batch_.hidden);
    const ExpertGroup group{static_cast<uint32_t>(expert), static_cast<uint32_t>(indices.size())};
    std::vector<uint32_t> rows;
    std::vector<float> weights;
    std::vector<uint8_t> out(indices.size() * row_bytes);
    for (const int64_t i : indices) {
      rows.push_back(static_cast<uint32_t>(i / batch_.top_k));
      weights.push_back(batch_.weights[i]);
    }
    std::vector<ExpertComputer*> owners;
    for (const std::unique_ptr<ExpertComputer>& owner : owners_)
      if (owner->Has(batch_.layer, expert)) owners.push_back(owner.get());
    if (owners.empty()) return absl::NotFoundError(absl::StrCat("nobody has expert ", expert));
    RETURN_IF_ERROR(owners[random_() % owners.size()]->Compute(
        {batch_.layer, batch_.format, batch_.rows, {&group, 1}, rows, weights}, out.data()));
    for (size_t k = 0; k < indices.size(); ++k)
      std::memcpy(expert_rows + indices[k] * row_bytes, &out[k * row_bytes], row_bytes);
    ++pieces_computed_;
    return absl::OkStatus();
  }

  std::vector<std::unique_ptr<ExpertComputer>> owners_;
  ExpertBatch batch_;
  std::mt19937 random_;
  int64_t pieces_computed_ = 0;
};

TEST_P(Equality, AnyPartitionOfExpertsGivesTheBitsOfAllLocal) {
  EngineOptions options = Options(GetParam());
  options.mtp = true;
  const std::vector<int32_t> tokens = NoteTokens(GetParam(), kTokens);
  Observed reference;
  const int num_experts = OpenModel(GetParam().model)->config().n_routed_experts;
  const auto experts_where = [&](auto predicate) {
    std::vector<int> experts;
    for (int e = 0; e < num_experts; ++e)
      if (predicate(e)) experts.push_back(e);
    return experts;
  };
  const auto all = experts_where([](int) { return true; });
  const DeviceKind device = GetParam().device;
  std::string own_hash;
  {
    const std::unique_ptr<Engine> local = MakeEngine(GetParam().model, options);
    reference = RunFresh(*local, {.tokens = tokens});
    own_hash = local->CompatibilityHash();
  }
  std::map<std::string, std::vector<std::vector<int>>> partitions;
  partitions["one member"] = {all};
  partitions["halves"] = {experts_where([&](int e) { return e < num_experts / 2; }),
                          experts_where([&](int e) { return e >= num_experts / 2; })};
  partitions["three members, interleaved"] = {experts_where([](int e) { return e % 3 == 0; }),
                                              experts_where([](int e) { return e % 3 == 1; }),
                                              experts_where([](int e) { return e % 3 == 2; })};
  partitions["overlapping replicas"] = {experts_where([](int e) { return e % 2 == 0; }), all,
                                        experts_where([](int e) { return e < 5; })};
  for (const int e : all) partitions["a member for every expert"].push_back({e});

  uint32_t seed = 1;
  for (const auto& [name, parts] : partitions) {
    SCOPED_TRACE(name);
    PartitionedExperts exchange(GetParam(), device, parts, seed++);
    options.exchange = &exchange;
    const std::unique_ptr<Engine> engine = MakeEngine(GetParam().model, options);
    std::mt19937 random(seed);
    const Observed found = RunFresh(*engine, {.tokens = tokens, .chunks = RandomCut(kTokens, random)});
    ExpectSameBits(found.logits, reference, 0, vocab(*engine));
    ExpectSameMtp(found, reference, 0, kTokens - 1);
    EXPECT_GT(exchange.pieces_computed(), 0);
    EXPECT_EQ(engine->CompatibilityHash(), own_hash) << "the same bits: such workers pair";
  }
  if (device == DeviceKind::kCpu) return;
  // A pool on the CPU is another matter: nobody but its like pairs with its callers, however it is divided.
  PartitionedExperts whole(GetParam(), DeviceKind::kCpu, {all}, seed++);
  options.exchange = &whole;
  const std::unique_ptr<Engine> beside_cpu = MakeEngine(GetParam().model, options);
  EXPECT_NE(beside_cpu->CompatibilityHash(), own_hash);
  reference = RunFresh(*beside_cpu, {.tokens = tokens});
  PartitionedExperts halves(GetParam(), DeviceKind::kCpu, partitions["halves"], seed++);
  options.exchange = &halves;
  const Observed found = RunFresh(*MakeEngine(GetParam().model, options), {.tokens = tokens});
  ExpectSameBits(found.logits, reference, 0, OpenModel(GetParam().model)->config().vocab_size);
  ExpectSameMtp(found, reference, 0, kTokens - 1);
}

TEST_P(Equality, TwoThreadsGiveTheBitsOfOne) {
  const std::vector<int32_t> tokens = NoteTokens(GetParam(), kTokens);
  EngineOptions options = Options(GetParam());
  options.mtp = true;
  Observed reference;
  {
    const std::unique_ptr<Engine> engine = MakeEngine(GetParam().model, options);
    reference = RunFresh(*engine, {.tokens = tokens});
  }
  for (const int num_threads : {2, 3}) {
    SCOPED_TRACE(absl::StrCat(num_threads, " threads"));
    options.num_threads = num_threads;
    const std::unique_ptr<Engine> engine = MakeEngine(GetParam().model, options);
    for (const std::vector<int>& sizes : {Cut(kTokens, 768, 768), Cut(kTokens, 129, 128)}) {
      const Observed found = RunFresh(*engine, {.tokens = tokens, .chunks = sizes});
      ExpectSameBits(found.logits, reference, 0, vocab(*engine));
      ExpectSameMtp(found, reference, 0, kTokens - 1);
    }
    const auto start = absl::MakeConstSpan(tokens).first(140);
    ExpectSameBits(RunFresh(*engine, {.tokens = start, .chunks = Cut(140, 1, 1)}).logits, reference, 0, vocab(*engine));
  }
}

INSTANTIATE_TEST_SUITE_P(All, Equality, testing::ValuesIn(kSubjects),
                         [](const auto& param_info) { return param_info.param.name; });
INSTANTIATE_TEST_SUITE_P(Cuda, Equality, testing::ValuesIn(kCudaSubjects),
                         [](const auto& param_info) { return param_info.param.name; });

}  // namespace
}  // namespace millrace::golden
