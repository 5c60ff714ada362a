// SPDX-License-Identifier: Apache-2.0
// Tokens per second of the demo model in one process on one thread: decode alone and in a batch, prefill, and how both
// grow with the context. Run in the source root; docs/benchmarks.md says how the numbers there were taken.
//
// `floor_share` compares with the time the forward pass's multiply-adds would take at the speed that this machine
// reaches in a loop of nothing else (cpu_peak.h), measured in the same run: 1 is the limit of FP32 arithmetic.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "engine/engine.h"
#include "engine/ops/cpu_peak.h"

namespace millrace {
namespace {

constexpr char kModel[] = "deploy/demo/model";
constexpr int kChunk = 512;
constexpr int kSteps = 384;  // room for warm-up and all repetitions of a decode benchmark

void Require(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "engine_bench: %s\n", status.ToString().c_str());
  std::exit(1);
}

template <typename T>
T Require(absl::StatusOr<T> value) {
  Require(value.status());
  return *std::move(value);
}

Engine& Demo() {
  static Engine* engine = [] {
    auto checkpoint = Require(Checkpoint::Open(kModel));
    return Require(Engine::Create(
                       std::shared_ptr<const Checkpoint>(std::move(checkpoint)),
                       {.cache_pages = 33 * (512 + kSteps) / 128, .max_sequences = 33, .max_batch_tokens = kChunk}))
        .release();
  }();
  return *engine;
}

std::vector<int32_t> Prompt(int64_t length, uint32_t seed) {
  std::mt19937 draw(seed);
  std::vector<int32_t> ids(length);
  for (int32_t& id : ids) id = static_cast<int32_t>(10 + draw() % 1390);
  return ids;
}

void Prefill(Engine& engine, SequenceId sequence, absl::Span<const int32_t> prompt) {
  for (size_t begin = 0; begin < prompt.size(); begin += kChunk) {
    const Chunk chunk{.sequence = sequence, .tokens = prompt.subspan(begin, kChunk)};
    Require(engine.Forward({&chunk, 1}).status());
  }
}

// Multiply-adds of one token with `context` tokens before it: every weight once, two products per key and head.
double MultiplyAdds(const ModelConfig& c, int64_t context) {
  const double hidden = c.hidden_size, dim = c.head_dim, heads = c.num_attention_heads;
  double sum = hidden * c.vocab_size;
  for (LayerKind kind : c.layer_kinds) {
    sum += hidden * (c.q_lora_rank + dim) + c.q_lora_rank * heads * dim;
    sum += heads * dim * c.o_lora_rank + c.o_groups * c.o_lora_rank * hidden;
    sum += 2 * c.hc_mult * hidden * (2 + c.hc_mult) * c.hc_mult;
    sum += (c.num_experts_per_tok + 1) * 3 * hidden * c.moe_intermediate_size + hidden * c.n_routed_experts;
    double keys = std::min<int64_t>(context, c.sliding_window);
    if (kind == LayerKind::kCsa) {
      sum += hidden * 4 * (dim + c.index_head_dim) + c.q_lora_rank * c.index_n_heads * c.index_head_dim;
      keys += std::min<int64_t>(context / 4, c.index_topk);
      if (context / 4 > c.index_topk) sum += context / 4 * c.index_n_heads * c.index_head_dim;
    } else if (kind == LayerKind::kHca) {
      sum += hidden * 2 * dim;
      keys += context / 128;
    }
    sum += 2 * keys * heads * dim;
  }
  return sum;
}

void Report(benchmark::State& state, double tokens, double multiply_adds) {
  state.counters["tok_per_s"] = benchmark::Counter(tokens, benchmark::Counter::kIsRate);
  state.counters["floor_share"] = benchmark::Counter(multiply_adds / PeakMultiplyAdds(), benchmark::Counter::kIsRate);
}

void BM_Decode(benchmark::State& state) {
  Engine& engine = Demo();
  const int64_t batch = state.range(0), context = state.range(1);
  std::vector<SequenceId> sequences;
  for (int64_t i = 0; i < batch; ++i) {
    sequences.push_back(Require(engine.NewSequence(context + kSteps)));
    Prefill(engine, sequences.back(), Prompt(context, static_cast<uint32_t>(i)));
  }
  const SamplingRequest greedy{};
  std::vector<int32_t> tokens(batch, 100);
  std::vector<Chunk> chunks(batch);
  int64_t steps = 0;
  for (auto _ : state) {
    for (int64_t i = 0; i < batch; ++i) chunks[i] = {sequences[i], {&tokens[i], 1}, {}, &greedy};
    const std::vector<ChunkOutput> out = Require(engine.Forward(chunks));
    for (int64_t i = 0; i < batch; ++i) tokens[i] = out[i].sampled.id;
    ++steps;
  }
  for (SequenceId sequence : sequences) engine.Release(sequence);
  Report(state, static_cast<double>(steps * batch),
         static_cast<double>(steps * batch) * MultiplyAdds(engine.config(), context + steps / 2));
}

void BM_Prefill(benchmark::State& state) {
  Engine& engine = Demo();
  const std::vector<int32_t> prompt = Prompt(state.range(0), 7);
  for (auto _ : state) {
    const SequenceId sequence = Require(engine.NewSequence(state.range(0)));
    Prefill(engine, sequence, prompt);
    engine.Release(sequence);
  }
  double work = 0;
  for (int64_t i = 0; i < state.range(0); ++i) work += MultiplyAdds(engine.config(), i);
  work -= static_cast<double>(state.range(0)) * engine.config().hidden_size * engine.config().vocab_size;
  Report(state, static_cast<double>(state.iterations() * state.range(0)),
         static_cast<double>(state.iterations()) * work);
}

BENCHMARK(BM_Decode)
    ->ArgNames({"batch", "context"})
    ->Args({1, 128})
    ->Args({1, 512})
    ->Args({1, 4096})
    ->Args({1, 14000})
    ->Args({8, 512})
    ->Args({32, 512})
    ->Unit(benchmark::kMicrosecond)
    ->Iterations(300);
BENCHMARK(BM_Prefill)->ArgName("tokens")->Arg(128)->Arg(512)->Arg(4096)->Arg(14000)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace millrace

BENCHMARK_MAIN();
