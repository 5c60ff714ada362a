// SPDX-License-Identifier: Apache-2.0
// `millrace score`: logits, residual streams and MTP logits of given tokens, safetensors in and out.
//
// For people who compare engines: no sampling, no text. For every NAME.input_ids and NAME.positions in the input, the
// output holds NAME.logits at those positions in that order, and on request NAME.streams after each block,
// NAME.mtp_positions and NAME.mtp_logits.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "engine/model/checkpoint.h"
#include "engine/status.h"
#include "services/cli/command.h"
#include "services/cli/model_loading.h"

namespace millrace::cli {
namespace {

struct Case {
  std::string name;
  std::vector<int32_t> ids;
  std::vector<int64_t> positions;      // any order, as asked
  std::vector<int64_t> mtp_positions;  // ascending
};

struct CaseResult {
  std::vector<float> logits;      // [positions, V]
  std::vector<float> streams;     // [layers, positions, hc, D]
  std::vector<float> mtp_logits;  // [mtp_positions, V]
  std::vector<int64_t> mtp_positions;
};

absl::StatusOr<std::vector<int64_t>> ReadIntegers(const HostTensor& tensor, const std::string& name) {
  if (tensor.shape.size() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": expected one dimension, found ", tensor.shape.size()));
  }
  std::vector<int64_t> values(tensor.elements());
  for (size_t i = 0; i < values.size(); ++i) {
    if (tensor.dtype == DType::kI64) {
      std::memcpy(&values[i], tensor.data + 8 * i, 8);
    } else if (tensor.dtype == DType::kI32) {
      int32_t value;
      std::memcpy(&value, tensor.data + 4 * i, 4);
      values[i] = value;
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": expected I32 or I64, found ", std::string(DTypeName(tensor.dtype))));
    }
  }
  return values;
}

absl::StatusOr<std::vector<int64_t>> ReadPositions(const HostTensor& tensor, const std::string& name, int64_t length) {
  ASSIGN_OR_RETURN(std::vector<int64_t> positions, ReadIntegers(tensor, name));
  for (size_t i = 0; i < positions.size(); ++i) {
    if (positions[i] < 0 || positions[i] >= length) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, "[", i, "]: found ", positions[i], ", expected 0 to ", length - 1));
    }
  }
  return positions;
}

absl::StatusOr<std::vector<Case>> ReadCases(const SafetensorsFile& file, const ModelConfig& config) {
  constexpr absl::string_view kIds = ".input_ids";
  std::vector<Case> cases;
  for (const std::string& tensor_name : file.names()) {
    if (tensor_name.size() <= kIds.size() ||
        tensor_name.compare(tensor_name.size() - kIds.size(), kIds.size(), kIds.data()) != 0) {
      continue;
    }
    Case one;
    one.name = tensor_name.substr(0, tensor_name.size() - kIds.size());
    ASSIGN_OR_RETURN(const std::vector<int64_t> ids, ReadIntegers(*file.Find(tensor_name), tensor_name));
    if (ids.empty()) return absl::InvalidArgumentError(absl::StrCat(tensor_name, ": expected at least one id"));
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= config.vocab_size) {
        return absl::InvalidArgumentError(
            absl::StrCat(tensor_name, "[", i, "]: found ", ids[i], ", expected an id below ", config.vocab_size));
      }
    }
    one.ids.assign(ids.begin(), ids.end());
    const int64_t length = static_cast<int64_t>(ids.size());
    const HostTensor* positions = file.Find(one.name + ".positions");
    if (positions == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(one.name, ".positions: missing beside ", tensor_name));
    }
    ASSIGN_OR_RETURN(one.positions, ReadPositions(*positions, one.name + ".positions", length));
    if (const HostTensor* mtp = file.Find(one.name + ".mtp_positions")) {
      ASSIGN_OR_RETURN(one.mtp_positions, ReadPositions(*mtp, one.name + ".mtp_positions", length - 1));
    } else {
      // MTP at position p looks at the token after it, so the last position has none.
      for (int64_t p : one.positions) {
        if (p + 1 < length) one.mtp_positions.push_back(p);
      }
    }
    cases.push_back(std::move(one));
  }
  if (cases.empty()) return absl::InvalidArgumentError("no tensor named NAME.input_ids");
  return cases;
}

// Picks the wanted rows out of what each pass shows.
class Recorder : public ForwardTap {
 public:
  Recorder(const Case& one, const ModelConfig& config, bool streams, CaseResult& result)
      : config_(config), streams_(streams), result_(result) {
    const int64_t width = config.hc_mult * config.hidden_size;
    if (streams) {
      result.streams.resize(config.num_hidden_layers * static_cast<int64_t>(one.positions.size()) * width);
    }
    for (size_t i = 0; i < one.positions.size(); ++i) rows_.emplace(one.positions[i], i);
    for (int64_t p : one.mtp_positions) mtp_.emplace(p, std::vector<float>());
    num_positions_ = static_cast<int64_t>(one.positions.size());
  }

  void set_pass_begin(int64_t position) { pass_begin_ = position; }

  void OnStreams(int layer, const float* streams, int64_t num_rows) override {
    if (!streams_ || layer >= config_.num_hidden_layers) return;
    const int64_t width = config_.hc_mult * config_.hidden_size;
    for (auto it = rows_.lower_bound(pass_begin_); it != rows_.end() && it->first < pass_begin_ + num_rows; ++it) {
      std::copy_n(streams + (it->first - pass_begin_) * width, width,
                  result_.streams.data() + (layer * num_positions_ + it->second) * width);
    }
  }
  void OnMtpLogits(SequenceId, int64_t position, const float* logits) override {
    const auto wanted = mtp_.find(position);
    if (wanted != mtp_.end()) wanted->second.assign(logits, logits + config_.vocab_size);
  }

  absl::Status TakeMtp(const Case& one) {
    for (int64_t p : one.mtp_positions) {
      const std::vector<float>& logits = mtp_[p];
      if (logits.empty()) return absl::InternalError(absl::StrCat(one.name, ": no MTP logits at position ", p));
      result_.mtp_positions.push_back(p);
      result_.mtp_logits.insert(result_.mtp_logits.end(), logits.begin(), logits.end());
    }
    return absl::OkStatus();
  }

 private:
  const ModelConfig& config_;
  const bool streams_;
  CaseResult& result_;
  std::multimap<int64_t, int64_t> rows_;  // position -> row of the output
  std::map<int64_t, std::vector<float>> mtp_;
  int64_t num_positions_ = 0;
  int64_t pass_begin_ = 0;
};

absl::StatusOr<CaseResult> Score(Engine& engine, const Case& one, bool streams, bool mtp) {
  const ModelConfig& config = engine.config();
  const int64_t length = static_cast<int64_t>(one.ids.size());
  CaseResult result;
  result.logits.resize(one.positions.size() * config.vocab_size);
  Recorder recorder(one, config, streams, result);
  ASSIGN_OR_RETURN(const SequenceId sequence, engine.NewSequence(length));
  const int64_t step = engine.options().max_batch_tokens;
  for (int64_t begin = 0; begin < length; begin += step) {
    const int64_t end = std::min(begin + step, length);
    std::vector<int32_t> rows;
    for (int64_t p : one.positions) {
      if (p >= begin && p < end) rows.push_back(static_cast<int32_t>(p - begin));
    }
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    Chunk chunk;
    chunk.sequence = sequence;
    chunk.tokens = absl::MakeConstSpan(one.ids).subspan(begin, end - begin);
    chunk.logit_rows = rows;
    recorder.set_pass_begin(begin);
    ForwardOptions options;
    options.tap = &recorder;
    auto outputs = engine.Forward({&chunk, 1}, options);
    if (!outputs.ok()) {
      engine.Release(sequence);
      return outputs.status();
    }
    const std::vector<float>& logits = (*outputs)[0].logits;
    for (size_t i = 0; i < one.positions.size(); ++i) {
      const int64_t p = one.positions[i];
      if (p < begin || p >= end) continue;
      const auto row = std::lower_bound(rows.begin(), rows.end(), static_cast<int32_t>(p - begin)) - rows.begin();
      std::copy_n(logits.data() + row * config.vocab_size, config.vocab_size,
                  result.logits.data() + static_cast<int64_t>(i) * config.vocab_size);
    }
  }
  engine.Release(sequence);
  if (mtp) RETURN_IF_ERROR(recorder.TakeMtp(one));
  return result;
}

}  // namespace

int RunScore(Arguments arguments) {
  ModelFlags model;
  std::string input, output;
  bool streams = false, mtp = false;
  Flags flags(
      "score", "Computes logits of given tokens, for comparing engines",
      "IN holds, for any number of names, NAME.input_ids [n] and NAME.positions [k] (I32 or I64). OUT gets\n"
      "NAME.logits [k, vocab] in F32 at those positions in that order; with --streams NAME.streams [layers, k,\n"
      "streams, hidden], the residual streams after each block; with --mtp NAME.mtp_positions [m] and\n"
      "NAME.mtp_logits [m, vocab] (at NAME.mtp_positions of IN if it has them).\n\n"
      "  millrace score MODEL --input in.safetensors --output out.safetensors --numerics exact --streams");
  model.Declare(flags);
  flags.String("input", &input, "FILE", "Safetensors file with ids and positions. Required.");
  flags.String("output", &output, "FILE", "Safetensors file to write. Required.");
  flags.Bool("streams", &streams, "Also write the residual streams.");
  flags.Bool("mtp", &mtp, "Also write the logits of the draft module.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "score", arguments, &exit_code)) return exit_code;
  if (input.empty()) return Fail("score", kExitUsage, "--input FILE is required; see millrace score --help");
  if (output.empty()) return Fail("score", kExitUsage, "--output FILE is required; see millrace score --help");

  const auto checkpoint = OpenCheckpoint(model);
  if (!checkpoint.ok()) return Fail("score", ModelExitCode(checkpoint.status()), checkpoint.status());
  const ModelConfig& config = (*checkpoint)->config();
  if (mtp && !config.has_mtp()) return Fail("score", kExitBadModel, "--mtp: this checkpoint has no MTP module");
  const auto file = SafetensorsFile::Open(input);
  if (!file.ok()) return Fail("score", kExitNoInput, file.status());
  const absl::StatusOr<std::vector<Case>> cases = ReadCases(**file, config);
  if (!cases.ok()) return Fail("score", kExitNoInput, absl::StrCat(input, ": ", cases.status().message()));
  EngineSize size{.context_tokens = 0, .mtp = mtp};
  for (const Case& one : *cases) {
    size.context_tokens = std::max<int64_t>(size.context_tokens, static_cast<int64_t>(one.ids.size()));
  }
  const auto engine = LoadEngine(model, *checkpoint, size);
  if (!engine.ok()) return Fail("score", ModelExitCode(engine.status()), engine.status());

  std::deque<CaseResult> results;  // tensors point into it
  std::vector<TensorToWrite> tensors;
  for (const Case& one : *cases) {
    absl::StatusOr<CaseResult> scored = Score(**engine, one, streams, mtp);
    if (!scored.ok()) {
      return Fail("score", kExitSoftware, absl::StrCat(one.name, ": ", scored.status().message()));
    }
    const CaseResult& result = results.emplace_back(*std::move(scored));
    const int64_t positions = static_cast<int64_t>(one.positions.size());
    tensors.push_back({one.name + ".logits", DType::kF32, {positions, config.vocab_size}, result.logits.data()});
    if (streams) {
      tensors.push_back({one.name + ".streams",
                         DType::kF32,
                         {config.num_hidden_layers, positions, config.hc_mult, config.hidden_size},
                         result.streams.data()});
    }
    if (mtp && !result.mtp_positions.empty()) {
      const int64_t count = static_cast<int64_t>(result.mtp_positions.size());
      tensors.push_back({one.name + ".mtp_positions", DType::kI64, {count}, result.mtp_positions.data()});
      tensors.push_back({one.name + ".mtp_logits", DType::kF32, {count, config.vocab_size}, result.mtp_logits.data()});
    }
  }
  if (absl::Status status = WriteSafetensors(output, tensors); !status.ok()) {
    return Fail("score", kExitCantCreate, status);
  }
  return kExitOk;
}

}  // namespace millrace::cli
