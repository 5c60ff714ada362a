// SPDX-License-Identifier: Apache-2.0
// Cutting tokens into Forward() calls, recording what the tap shows, and the few statistics the suites share.

#include "tests/golden/teacher_forcing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <numeric>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace millrace::golden {
namespace {

// Keeps the rows at wanted positions. One chunk is in the pass, so row r is position first_position + r.
class RecordingTap : public ForwardTap {
 public:
  RecordingTap(const ModelConfig& config, bool observe_layers, Observed& observed)
      : config_(config), observe_layers_(observe_layers), observed_(observed) {
    if (!observe_layers) return;
    observed.streams.resize(config.num_hidden_layers);
    observed.experts.resize(config.num_hidden_layers);
  }

  void StartChunk(int32_t first_position) { first_position_ = first_position; }

  void OnStreams(int layer, const float* streams, int64_t num_rows) override {
    if (!observe_layers_ || layer >= config_.num_hidden_layers) return;
    Keep(streams, num_rows, config_.hc_mult * config_.hidden_size, observed_.streams[layer]);
  }
  void OnExperts(int layer, const int32_t* experts, int64_t num_rows) override {
    if (!observe_layers_ || layer >= config_.num_hidden_layers) return;  // L is the MTP block
    Keep(experts, num_rows, config_.num_experts_per_tok, observed_.experts[layer]);
  }
  void OnSelection(int layer, int64_t row, absl::Span<const int32_t> entries) override {
    const int32_t position = first_position_ + static_cast<int32_t>(row);
    if (observe_layers_ && Wanted(position))
      observed_.selections[{layer, position}].assign(entries.begin(), entries.end());
  }
  void OnMtpLogits(SequenceId, int64_t position, const float* logits) override {
    observed_.mtp_logits[static_cast<int32_t>(position)].assign(logits, logits + config_.vocab_size);
  }

 private:
  bool Wanted(int32_t position) const {
    return std::binary_search(observed_.positions.begin(), observed_.positions.end(), position);
  }
  template <typename T>
  void Keep(const T* rows, int64_t num_rows, int64_t width, std::vector<T>& kept) {
    for (int64_t r = 0; r < num_rows; ++r)
      if (Wanted(first_position_ + static_cast<int32_t>(r)))
        kept.insert(kept.end(), rows + r * width, rows + (r + 1) * width);
  }

  const ModelConfig& config_;
  const bool observe_layers_;
  Observed& observed_;
  int32_t first_position_ = 0;
};

}  // namespace

std::shared_ptr<const Checkpoint> OpenModel(const std::string& model_dir) {
  static auto& opened = *new std::map<std::string, std::shared_ptr<const Checkpoint>>;
  std::shared_ptr<const Checkpoint>& checkpoint = opened[model_dir];
  if (checkpoint == nullptr) {
    absl::StatusOr<std::unique_ptr<Checkpoint>> loaded = Checkpoint::Open(model_dir);
    CHECK(loaded.ok(), absl::StrCat(model_dir, ": ", loaded.status().ToString()));
    checkpoint = std::move(*loaded);
  }
  return checkpoint;
}

std::unique_ptr<Engine> MakeEngine(const std::string& model_dir, EngineOptions options) {
  absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(OpenModel(model_dir), std::move(options));
  CHECK(engine.ok(), absl::StrCat(model_dir, ": ", engine.status().ToString()));
  return std::move(*engine);
}

const std::string& CudaMissing() {
  static const std::string& why = *new std::string([] {
    const absl::StatusOr<std::unique_ptr<Engine>> engine =
        Engine::Create(OpenModel(kDemoModel),
                       {.device = DeviceKind::kCuda, .cache_pages = 1, .max_sequences = 1, .max_batch_tokens = 1});
    return engine.ok() ? std::string() : std::string(engine.status().message());
  }());
  return why;
}

Observed RunFresh(Engine& engine, const Pass& pass) {
  absl::StatusOr<SequenceId> sequence = engine.NewSequence(static_cast<int64_t>(pass.tokens.size()));
  CHECK(sequence.ok(), sequence.status().ToString());
  Observed observed = Continue(engine, *sequence, pass);
  engine.Release(*sequence);
  return observed;
}

Observed Continue(Engine& engine, SequenceId sequence, const Pass& pass) {
  const int32_t first = static_cast<int32_t>(engine.Length(sequence));
  const int32_t num_tokens = static_cast<int32_t>(pass.tokens.size());
  Observed observed;
  observed.positions = pass.positions.empty() ? Positions(first, num_tokens) : pass.positions;

  std::vector<int> chunks = pass.chunks;
  if (chunks.empty())
    for (int left = num_tokens; left > 0; left -= chunks.back())
      chunks.push_back(std::min(left, engine.options().max_batch_tokens));
  CHECK(std::accumulate(chunks.begin(), chunks.end(), 0) == num_tokens, "chunks must cover the tokens");

  RecordingTap tap(engine.config(), pass.observe_layers, observed);
  int32_t done = 0;
  for (const int size : chunks) {
    std::vector<int32_t> rows;
    for (const int32_t position : observed.positions)
      if (position >= first + done && position < first + done + size) rows.push_back(position - first - done);
    const Chunk chunk{.sequence = sequence, .tokens = pass.tokens.subspan(done, size), .logit_rows = rows};
    tap.StartChunk(first + done);
    absl::StatusOr<std::vector<ChunkOutput>> output = engine.Forward({&chunk, 1}, {.tap = &tap});
    CHECK(output.ok(), output.status().ToString());
    const std::vector<float>& logits = (*output)[0].logits;
    CHECK(static_cast<int64_t>(logits.size()) == static_cast<int64_t>(rows.size()) * engine.config().vocab_size);
    observed.logits.insert(observed.logits.end(), logits.begin(), logits.end());
    done += size;
  }
  return observed;
}

std::vector<SampledToken> DecodeGreedily(Engine& engine, absl::Span<const int32_t> prompt, size_t num_tokens) {
  const absl::StatusOr<SequenceId> sequence = engine.NewSequence(prompt.size() + num_tokens);
  CHECK(sequence.ok(), sequence.status().ToString());
  const SamplingRequest greedy{.params = {.temperature = 0, .top_logprobs = 8}};
  std::vector<SampledToken> drawn;
  std::vector<int32_t> next(prompt.begin(), prompt.end());
  while (drawn.size() < num_tokens) {
    absl::Span<const int32_t> left = next;
    while (!left.empty()) {
      const size_t size = std::min<size_t>(left.size(), engine.options().max_batch_tokens);
      const Chunk chunk{
          .sequence = *sequence, .tokens = left.subspan(0, size), .sampling = size == left.size() ? &greedy : nullptr};
      absl::StatusOr<std::vector<ChunkOutput>> output = engine.Forward({&chunk, 1});
      CHECK(output.ok(), output.status().ToString());
      if (size == left.size()) drawn.push_back((*output)[0].sampled);
      left.remove_prefix(size);
    }
    next = {drawn.back().id};
  }
  engine.Release(*sequence);
  return drawn;
}

int64_t RowOf(const Observed& observed, int32_t position) {
  return std::lower_bound(observed.positions.begin(), observed.positions.end(), position) - observed.positions.begin();
}

absl::Span<const float> Row(const std::vector<float>& rows, int64_t row, int64_t width) {
  return absl::MakeConstSpan(rows).subspan(row * width, width);
}

std::vector<int32_t> Positions(int32_t first, int32_t n) {
  std::vector<int32_t> positions(n);
  std::iota(positions.begin(), positions.end(), first);
  return positions;
}

nlohmann::json ReadJson(const std::string& path) {
  std::ifstream file(path);
  CHECK(file.good(), "cannot open " + path);
  return nlohmann::json::parse(file);
}

Arrays::Arrays(const std::string& path) {
  absl::StatusOr<std::unique_ptr<SafetensorsFile>> file = SafetensorsFile::Open(path);
  CHECK(file.ok(), absl::StrCat(path, ": ", file.status().ToString()));
  file_ = std::move(*file);
}

template <typename T>
std::vector<T> Arrays::Read(const std::string& name, DType dtype) const {
  const HostTensor* tensor = file_->Find(name);
  CHECK(tensor != nullptr, name);
  CHECK(tensor->dtype == dtype, name);
  std::vector<T> values(tensor->elements());
  std::memcpy(values.data(), tensor->data, values.size() * sizeof(T));
  return values;
}

std::vector<float> Arrays::Floats(const std::string& name) const { return Read<float>(name, DType::kF32); }
std::vector<int32_t> Arrays::Ints(const std::string& name) const { return Read<int32_t>(name, DType::kI32); }
std::vector<int64_t> Arrays::Shape(const std::string& name) const {
  const HostTensor* tensor = file_->Find(name);
  CHECK(tensor != nullptr, name);
  return tensor->shape;
}

std::vector<std::string> Arrays::Cases() const {
  constexpr absl::string_view kSuffix = ".input_ids";
  std::vector<std::string> cases;
  for (const std::string& name : file_->names())
    if (absl::EndsWith(name, kSuffix)) cases.push_back(name.substr(0, name.size() - kSuffix.size()));
  std::sort(cases.begin(), cases.end());
  return cases;
}

double MaxDifference(absl::Span<const float> a, absl::Span<const float> b) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  if (a.size() != b.size() || a.empty()) return kInfinite;
  double greatest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - b[i]);
    if (!std::isfinite(difference)) return kInfinite;
    greatest = std::max(greatest, difference);
  }
  return greatest;
}

double RelativeNorm(absl::Span<const float> a, absl::Span<const float> b) {
  if (a.size() != b.size() || a.empty()) return std::numeric_limits<double>::infinity();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - b[i];
    difference += d * d;
    norm += static_cast<double>(b[i]) * b[i];
  }
  const double ratio = std::sqrt(difference / norm);
  return std::isfinite(ratio) ? ratio : std::numeric_limits<double>::infinity();
}

int64_t FirstDifferentBit(absl::Span<const float> a, absl::Span<const float> b) {
  if (a.size() != b.size()) return static_cast<int64_t>(std::min(a.size(), b.size()));
  for (size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(&a[i], &b[i], sizeof(float)) != 0) return static_cast<int64_t>(i);
  return -1;
}

std::vector<double> LogProbabilities(absl::Span<const float> logits) {
  const double greatest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - greatest);
  const double log_sum = greatest + std::log(sum);
  std::vector<double> result(logits.begin(), logits.end());
  for (double& value : result) value -= log_sum;
  return result;
}

double Median(std::vector<double> values) {
  CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

double Mean(const std::vector<double>& values) {
  CHECK(!values.empty());
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

}  // namespace millrace::golden
