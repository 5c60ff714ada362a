// SPDX-License-Identifier: Apache-2.0
// The same bits, whatever the way there: the promise everything else in the cluster stands on.
//
// A token's logits may depend on its sequence's tokens and on nothing else: not on how a prompt was cut, what shares
// the pass, where the state was carried, which process ran an expert, or how many threads did. Every comparison here is
// of bits; the reference is always one pass over the whole sequence. Three subjects: the demo model in both numerics,
// and the tiny model, whose indexer selects 16 entries and therefore bites from token 68 on. The demo model on CUDA is
// a fourth, under names that begin with Cuda, where there is a card (label gpu).
//
// MILLRACE_LONG_TESTS=1 tries more cuts, batches and lengths (minutes instead of seconds per test).

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/moe/cuda_experts.h"
#include "engine/moe/local_experts.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"
#include "tests/golden/carried_state.h"
#include "tests/golden/teacher_forcing.h"

namespace millrace::golden {
namespace {

bool LongTests() { return std::getenv("MILLRACE_LONG_TESTS") != nullptr; }

struct Subject {
  const char* name;
  const char* model;
  Numerics numerics;
  DeviceKind device = DeviceKind::kCpu;
};
// ctest shows it; the default would be the bytes of pointers.
void PrintTo(const Subject& subject, std::ostream* out) { *out << subject.name; }

// Room for the longest one-shot pass; everything else about the engine is its default.
EngineOptions Options(const Subject& subject) {
  return {.numerics = subject.numerics,
          .device = subject.device,
          .cache_pages = 64,
          .max_sequences = 8,
          .max_batch_tokens = 768};
}

// Text the demo model was trained on (a note with codes in it), so that routing and selection are as in use.
std::vector<int32_t> NoteTokens(const Subject& subject, int n) {
  std::ifstream file(absl::StrCat(kDemoGoldens, "/golden_greedy.json"));
  auto tokens = nlohmann::json::parse(file)[18]["prompt_ids"].get<std::vector<int32_t>>();
  CHECK(static_cast<int>(tokens.size()) >= n);
  tokens.resize(n);
  const auto vocab = static_cast<int32_t>(OpenModel(subject.model)->config().vocab_size);
  for (int32_t& token : tokens) token %= vocab;
  return tokens;
}

std::vector<int32_t> RandomTokens(const Subject& subject, int n, uint32_t seed) {
  std::mt19937 random(seed);
  const auto vocab = static_cast<uint32_t>(OpenModel(subject.model)->config().vocab_size);
  std::vector<int32_t> tokens(n);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % vocab);
  return tokens;
}

// Rows `first`.. of the reference against all rows of `found`; names the first row that differs.
void ExpectSameBits(absl::Span<const float> found, const Observed& reference, int first, int64_t vocab) {
  const absl::Span<const float> expected = absl::MakeConstSpan(reference.logits).subspan(first * vocab, found.size());
  ASSERT_FALSE(found.empty());
  ASSERT_EQ(found.size(), expected.size());
  const int64_t at = FirstDifferentBit(found, expected);
  EXPECT_EQ(at, -1) << "position " << first + at / vocab << ", id " << at % vocab << ": " << found[at] << " instead of "
                    << expected[at];
}

void ExpectSameMtp(const Observed& found, const Observed& reference, int first, int end) {
  for (int position = first; position < end; ++position) {
    const auto ours = found.mtp_logits.find(position), theirs = reference.mtp_logits.find(position);
    ASSERT_NE(theirs, reference.mtp_logits.end()) << position;
    ASSERT_NE(ours, found.mtp_logits.end()) << "no MTP logits at position " << position;
    ASSERT_EQ(FirstDifferentBit(ours->second, theirs->second), -1) << "MTP logits at position " << position;
  }
}

// Sizes that sum to n: `first`, then `step` as long as they fit.
std::vector<int> Cut(int n, int first, int step) {
  std::vector<int> sizes{std::min(first, n)};
  for (int left = n - sizes[0]; left > 0; left -= sizes.back()) sizes.push_back(std::min(left, step));
  return sizes;
}

std::vector<int> RandomCut(int n, std::mt19937& random) {
  // Short and long chunks alike, and often a length that ends on or beside a boundary.
  constexpr int kLengths[] = {1, 2, 3, 4, 5, 7, 8, 31, 33, 63, 64, 65, 127, 128, 129, 130, 200, 256, 257};
  std::vector<int> sizes;
  for (int left = n; left > 0; left -= sizes.back())
    sizes.push_back(
        std::min<int>(left, random() % 3 == 0 ? 1 + random() % 300 : kLengths[random() % std::size(kLengths)]));
  return sizes;
}

// Leaves the free pages of an engine scattered: what a server's pool looks like after an hour.
void ScatterPages(Engine& engine) {
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
// Where the state is carried
// ---------------------------------------------------------------------------------------------------------------------

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

constexpr Subject kSubjects[] = {{"DemoExact", kDemoModel, Numerics::kExact},
                                 {"DemoRelease", kDemoModel, Numerics::kRelease},
                                 {"TinyExact", "tests/data/tiny-a", Numerics::kExact}};

INSTANTIATE_TEST_SUITE_P(All, Equality, testing::ValuesIn(kSubjects),
                         [](const auto& param_info) { return param_info.param.name; });
INSTANTIATE_TEST_SUITE_P(All, StateTransfer, testing::ValuesIn(kSubjects),
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

constexpr Subject kCudaSubjects[] = {{"DemoRelease", kDemoModel, Numerics::kRelease, DeviceKind::kCuda}};

INSTANTIATE_TEST_SUITE_P(Cuda, Equality, testing::ValuesIn(kCudaSubjects),
                         [](const auto& param_info) { return param_info.param.name; });
INSTANTIATE_TEST_SUITE_P(Cuda, StateTransfer, testing::ValuesIn(kCudaSubjects),
                         [](const auto& param_info) { return param_info.param.name; });

}  // namespace
}  // namespace millrace::golden
