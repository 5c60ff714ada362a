// SPDX-License-Identifier: Apache-2.0
// Tokenising speed in bytes per second: ordinary text, and the inputs that break other tokenizers, at three sizes so
// that growth shows (the bound that tests check is in tokenizer_test.cc). Run in the source root.
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "engine/text/tokenizer.h"

namespace millrace::text {
namespace {

const Tokenizer& Demo() {
  static const Tokenizer* tokenizer = [] {
    auto loaded = Tokenizer::Load("deploy/demo/model/tokenizer.json", 1536);
    if (!loaded.ok()) {
      std::fprintf(stderr, "%s\n", loaded.status().ToString().c_str());
      std::exit(1);
    }
    return loaded->release();
  }();
  return *tokenizer;
}

std::string Repeat(std::string_view unit, size_t bytes) {
  std::string text;
  while (text.size() < bytes) text += unit;
  return text;
}

void Encode(benchmark::State& state, std::string_view unit) {
  const std::string text = Repeat(unit, static_cast<size_t>(state.range(0)));
  for (auto _ : state) benchmark::DoNotOptimize(Demo().Encode(text, SpecialTokens::kMatch));
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(text.size()));
}

void Sizes(benchmark::internal::Benchmark* bench) {
  bench->Arg(1 << 20)->Arg(2 << 20)->Arg(4 << 20)->Unit(benchmark::kMillisecond);
}

BENCHMARK_CAPTURE(Encode, prose,
                  "Once there was a bright falcon who lived at the market. One day, it met John's 3 otters. ")
    ->Apply(Sizes);
BENCHMARK_CAPTURE(Encode, code, "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];  // dot\n}\n")->Apply(Sizes);
BENCHMARK_CAPTURE(Encode, chinese, "苍鹭是一种鸟。它住在水边，")->Apply(Sizes);
BENCHMARK_CAPTURE(Encode, letter_a, "a")->Apply(Sizes);
BENCHMARK_CAPTURE(Encode, carets, "^")->Apply(Sizes);
BENCHMARK_CAPTURE(Encode, digits, "1")->Apply(Sizes);
BENCHMARK_CAPTURE(Encode, spaces, " ")->Apply(Sizes);

}  // namespace
}  // namespace millrace::text

BENCHMARK_MAIN();
