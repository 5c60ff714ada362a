// SPDX-License-Identifier: Apache-2.0
// Decode and prefill of one model on one card: what a step costs at some batch sizes and contexts.
//
//   cuda_engine_bench MODEL [CSV [BATCH CONTEXT]]
//
// With BATCH and CONTEXT only that decode step, for a profiler or for a context up to the model's longest.
// MODEL is any checkpoint in the released format, or full-width layers of random weights made in memory: flash:4:32 has
// four layers of 32 experts, as `millrace inspect --make-random flash --layers 4 --experts 32 DIR` writes them. Prints
// the median and the spread of the repetitions; rows of the CSV are what was timed: model, layers, what, batch,
// context, median us, least, greatest, tokens a second. A decode step is timed by the host's clock around Forward,
// copies and sampling included: what a scheduler would see.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "engine/engine.h"
#include "engine/model/random_checkpoint.h"

namespace millrace {
namespace {

constexpr int kChunk = 512;
constexpr int kWarmUp = 5, kRepetitions = 40;

template <typename T>
T Require(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "cuda_engine_bench: %s\n", value.status().ToString().c_str());
    std::exit(1);
  }
  return *std::move(value);
}

// "flash:4:32", "pro:6:16" or a folder.
std::unique_ptr<Checkpoint> OpenModel(const std::string& model) {
  const std::vector<std::string> words = absl::StrSplit(model, ':');
  PresetChanges changes;
  if (words.size() != 3 || !absl::SimpleAtoi(words[1], &changes.layers) ||
      !absl::SimpleAtoi(words[2], &changes.experts)) {
    return Require(Checkpoint::Open(model, {.verify_manifest = false}));
  }
  const ModelPreset preset = words[0] == "pro" ? ModelPreset::kPro : ModelPreset::kFlash;
  return Require(RandomCheckpointInMemory(PresetConfigJson(preset, changes)));
}

// What the cache has to hold: so many sequences of so many tokens.
struct Room {
  int sequences = 64;
  int64_t context = 16384, pages = 70 * 8;
};

class Bench {
 public:
  Bench(const std::string& model, const Room& room, FILE* csv)
      : model_(model.substr(model.find_last_of('/') + 1)), csv_(csv) {
    engine_ = Require(Engine::Create(std::shared_ptr<const Checkpoint>(OpenModel(model)),
                                     {.device = DeviceKind::kCuda,
                                      .cache_pages = room.pages,
                                      .max_sequences = room.sequences,
                                      .max_context_tokens = room.context,
                                      .max_batch_tokens = kChunk,
                                      .notice = [](const std::string& line) { std::puts(line.c_str()); }}));
  }

  void Decode(int batch, int64_t context) {
    std::vector<SequenceId> sequences;
    for (int i = 0; i < batch; ++i) {
      sequences.push_back(Require(engine_->NewSequence(context + kWarmUp + kRepetitions)));
      Prefill(sequences.back(), context, static_cast<uint32_t>(i));
    }
    const SamplingRequest request;
    std::vector<int32_t> tokens(batch, 100);
    std::vector<double> times;
    for (int n = 0; n < kWarmUp + kRepetitions; ++n) {
      std::vector<Chunk> chunks;
      for (int i = 0; i < batch; ++i) chunks.push_back({sequences[i], {&tokens[i], 1}, {}, &request});
      const double us = Time([&] {
        const std::vector<ChunkOutput> out = Require(engine_->Forward(chunks));
        for (int i = 0; i < batch; ++i) tokens[i] = out[i].sampled.id;
      });
      if (n >= kWarmUp) times.push_back(us);
    }
    for (SequenceId sequence : sequences) engine_->Release(sequence);
    Report("decode", batch, context, std::move(times), batch);
  }

  void PrefillChunks(int64_t tokens) {
    std::vector<double> times;
    for (int n = 0; n < 6; ++n) {
      const SequenceId sequence = Require(engine_->NewSequence(tokens));
      const double us = Time([&] { Prefill(sequence, tokens, 1); });
      engine_->Release(sequence);
      if (n > 0) times.push_back(us);
    }
    Report("prefill", 1, tokens, std::move(times), static_cast<double>(tokens));
  }

 private:
  template <typename Body>
  static double Time(Body body) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  }

  void Prefill(SequenceId sequence, int64_t tokens, uint32_t seed) {
    std::mt19937 draw(seed);
    std::vector<int32_t> ids(tokens);
    for (int32_t& id : ids) id = static_cast<int32_t>(draw() % static_cast<uint32_t>(engine_->config().vocab_size));
    for (size_t begin = 0; begin < ids.size(); begin += kChunk) {
      const Chunk chunk{.sequence = sequence, .tokens = absl::MakeConstSpan(ids).subspan(begin, kChunk)};
      Require(engine_->Forward({&chunk, 1}));
    }
  }

  void Report(const char* what, int batch, int64_t context, std::vector<double> times, double tokens) {
    std::sort(times.begin(), times.end());
    const double median = times[times.size() / 2];
    std::printf("%-8s batch %3d  context %6ld  %10.1f us (%.1f to %.1f)  %.0f tokens/s\n", what, batch,
                static_cast<long>(context), median, times.front(), times.back(), tokens / median * 1e6);
    if (csv_ == nullptr) return;
    std::fprintf(csv_, "%s,%d,%s,%d,%ld,%.1f,%.1f,%.1f,%.0f\n", model_.c_str(), engine_->config().num_hidden_layers,
                 what, batch, static_cast<long>(context), median, times.front(), times.back(), tokens / median * 1e6);
    std::fflush(csv_);
  }

  const std::string model_;
  FILE* const csv_;
  std::unique_ptr<Engine> engine_;
};

int Main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: cuda_engine_bench MODEL [CSV]\n");
    return 2;
  }
  FILE* csv = argc > 2 ? std::fopen(argv[2], "w") : nullptr;
  if (csv != nullptr) std::fputs("model,layers,what,batch,context,median_us,min_us,max_us,tokens_per_s\n", csv);
  if (argc > 4) {
    const int batch = std::atoi(argv[3]);
    const int64_t context = std::atol(argv[4]), longest = context + kWarmUp + kRepetitions;
    Bench(argv[1], {batch, longest, batch * ((longest + 127) / 128)}, csv).Decode(batch, context);
    if (csv != nullptr) std::fclose(csv);
    return 0;
  }
  Bench bench(argv[1], {}, csv);
  for (const int64_t context : {512, 4096}) {
    for (const int batch : {1, 4, 16}) bench.Decode(batch, context);
  }
  bench.Decode(64, 512);
  for (const int64_t tokens : {512, 4096}) bench.PrefillChunks(tokens);
  if (csv != nullptr) std::fclose(csv);
  return 0;
}

}  // namespace
}  // namespace millrace

int main(int argc, char** argv) { return millrace::Main(argc, argv); }
