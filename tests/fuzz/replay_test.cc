// SPDX-License-Identifier: Apache-2.0
// Every target over its seeds, the kept corpus and mutations of both: no clang needed, a few seconds, the same inputs
// in every run. It finds what broke; what was never right is found by the fuzzers (README.md).
//
// fuzz_replay_test --seeds DIR writes DIR/TARGET/seed-N, where libFuzzer wants its starting corpus.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "tests/fuzz/targets.h"

namespace millrace::fuzz {

void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }  // for GoogleTest

namespace {

namespace fs = std::filesystem;
constexpr std::chrono::milliseconds kTimePerTarget{700};
constexpr size_t kMutations = 20000;  // at most; slow targets get as far as the time goes

std::vector<std::string> Corpus(const Target& target) {
  std::vector<std::string> inputs = target.seeds();
  const fs::path folder = fs::path("tests/fuzz/corpus") / target.name;
  std::vector<fs::path> files;
  if (fs::exists(folder)) {
    for (const auto& entry : fs::directory_iterator(folder)) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  for (const auto& path : files) {
    std::ifstream in(path, std::ios::binary);
    std::ostringstream text;
    text << in.rdbuf();
    inputs.push_back(text.str());
  }
  return inputs;
}

std::string Mutated(const std::vector<std::string>& inputs, std::mt19937_64& draw) {
  const auto below = [&](size_t n) { return n == 0 ? 0 : static_cast<size_t>(draw() % n); };
  std::string out = inputs[below(inputs.size())];
  for (size_t i = 1 + below(4); i > 0; --i) {
    switch (below(6)) {
      case 0:  // a bit
        if (!out.empty()) out[below(out.size())] ^= static_cast<char>(1 << below(8));
        break;
      case 1:  // a byte that parsers look for
        if (!out.empty()) out[below(out.size())] = "\0\xff\r\n :,\"\\{}[]<>/0-9e.%"[below(24)];
        break;
      case 2:  // cut off
        out.resize(below(out.size() + 1));
        break;
      case 3: {  // a piece of itself again
        const size_t from = below(out.size() + 1);
        const std::string piece = out.substr(from, below(64));
        out.insert(below(out.size() + 1), piece);
        break;
      }
      case 4: {  // a piece of another
        const std::string& other = inputs[below(inputs.size())];
        out.insert(below(out.size() + 1), other.substr(below(other.size() + 1), below(64)));
        break;
      }
      default:  // a piece less
        out.erase(below(out.size() + 1), below(16));
    }
  }
  return out;
}

class Replay : public ::testing::TestWithParam<Target> {};

TEST_P(Replay, SeedsCorpusAndMutationsAreSurvived) {
  const Target target = GetParam();
  const std::vector<std::string> inputs = Corpus(target);
  ASSERT_FALSE(inputs.empty());
  target.run("");
  for (const std::string& input : inputs) target.run(input);
  std::mt19937_64 draw(4711);
  const auto end = std::chrono::steady_clock::now() + kTimePerTarget;
  size_t runs = 0;
  for (; runs < kMutations && std::chrono::steady_clock::now() < end; ++runs) target.run(Mutated(inputs, draw));
  RecordProperty("mutations", static_cast<int>(runs));
  EXPECT_GT(runs, 0u);
}

INSTANTIATE_TEST_SUITE_P(Fuzz, Replay, ::testing::ValuesIn(AllTargets()),
                         [](const auto& target) { return std::string(target.param.name); });

int WriteSeeds(const fs::path& root) {
  for (const Target& target : AllTargets()) {
    const fs::path folder = root / target.name;
    fs::create_directories(folder);
    size_t number = 0;
    for (const std::string& seed : target.seeds()) {
      std::ofstream(folder / ("seed-" + std::to_string(number++)), std::ios::binary) << seed;
    }
    std::printf("%s\n", std::string(target.name).c_str());
  }
  return 0;
}

}  // namespace
}  // namespace millrace::fuzz

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--seeds") == 0) return millrace::fuzz::WriteSeeds(argv[2]);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
