// SPDX-License-Identifier: Apache-2.0
// Teacher-forced passes over an Engine: what every suite in this folder compares.
//
// Given tokens, it returns what the model said at chosen positions: logits, and on request the residual streams, the
// experts, the CSA selections and the MTP logits, in the layout of the golden files. How the tokens are cut into
// Forward() calls is the caller's to say, since many of these suites are about exactly that. A call that fails ends the
// test with the engine's message: nothing here expects an error. Thread: the test's.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "engine/engine.h"
#include "nlohmann/json.hpp"

namespace millrace::golden {

inline constexpr char kDemoModel[] = "deploy/demo/model";
inline constexpr char kDemoGoldens[] = "tests/data/demo";

// Opens the checkpoint once per process and model: it is immutable, and engines share it.
std::shared_ptr<const Checkpoint> OpenModel(const std::string& model_dir);
std::unique_ptr<Engine> MakeEngine(const std::string& model_dir, EngineOptions options);

// Why there is no CUDA engine on this machine (one line), or empty. Suites of another device are skipped by it.
const std::string& CudaMissing();

// What was seen at the wanted positions, in the order given.
struct Observed {
  std::vector<int32_t> positions;
  std::vector<float> logits;                                           // [positions, V]
  std::vector<std::vector<float>> streams;                             // per layer [positions, hc, D]
  std::vector<std::vector<int32_t>> experts;                           // per layer [positions, top_k]
  std::map<std::pair<int, int32_t>, std::vector<int32_t>> selections;  // (layer, position) -> entries
  std::map<int32_t, std::vector<float>> mtp_logits;                    // position -> [V], every position it was told
};

struct Pass {
  absl::Span<const int32_t> tokens;
  std::vector<int32_t> positions;  // ascending; empty: all
  std::vector<int> chunks;         // sizes that sum to tokens.size(); empty: as large as the engine takes
  bool observe_layers = false;     // streams, experts, selections
};

// Runs a fresh sequence over all tokens and releases it.
Observed RunFresh(Engine& engine, const Pass& pass);
// Continues `sequence`, whose length is the position of tokens[0]; positions are of the sequence. Does not release.
Observed Continue(Engine& engine, SequenceId sequence, const Pass& pass);

// Prompt, then decode steps, greedily, until `num_tokens` were drawn. Returns them in order, eight log-probabilities
// each.
std::vector<SampledToken> DecodeGreedily(Engine& engine, absl::Span<const int32_t> prompt, size_t num_tokens);

// The row of `position` among those observed, and row `row` of a [rows, width] array.
int64_t RowOf(const Observed& observed, int32_t position);
absl::Span<const float> Row(const std::vector<float>& rows, int64_t row, int64_t width);

// n positions from `first`.
std::vector<int32_t> Positions(int32_t first, int32_t n);

// A golden file in JSON. CHECK-fails if it cannot be opened.
nlohmann::json ReadJson(const std::string& path);

// One file of named arrays (the golden files hold F32 and I32 only).
class Arrays {
 public:
  explicit Arrays(const std::string& path);
  bool Has(const std::string& name) const { return file_->Find(name) != nullptr; }
  std::vector<float> Floats(const std::string& name) const;
  std::vector<int32_t> Ints(const std::string& name) const;
  std::vector<int64_t> Shape(const std::string& name) const;
  // Every NAME that has NAME.input_ids.
  std::vector<std::string> Cases() const;

 private:
  template <typename T>
  std::vector<T> Read(const std::string& name, DType dtype) const;
  std::unique_ptr<SafetensorsFile> file_;
};

// Greatest |a - b|; infinite if a length differs or a value is not finite, so that it can never pass a bound.
double MaxDifference(absl::Span<const float> a, absl::Span<const float> b);
// |a - b| / |b|, Euclidean.
double RelativeNorm(absl::Span<const float> a, absl::Span<const float> b);
// First index where the bits differ, or -1.
int64_t FirstDifferentBit(absl::Span<const float> a, absl::Span<const float> b);
// ln softmax(logits), in double.
std::vector<double> LogProbabilities(absl::Span<const float> logits);
double Median(std::vector<double> values);
double Mean(const std::vector<double>& values);

}  // namespace millrace::golden
