// SPDX-License-Identifier: Apache-2.0
// Checkpoint, engine and tokenizer for one process.
#include "services/cli/model_loading.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/cli/command.h"
#include "services/cli/terminal.h"
#include "services/common/model_notice.h"

namespace millrace::cli {

void ModelFlags::Declare(Flags& flags) {
  flags.Positional("MODEL", &model, "Folder of the checkpoint: config.json, tokenizer.json, safetensors.");
  flags.Enum("numerics", &numerics, {"exact", "release"},
             "exact: FP32 throughout, what golden vectors are made with. release: the rounding points the model was "
             "trained with, what clusters run. Default: release for quantised checkpoints, else exact.");
  flags.Enum("device", &device, {"cpu", "cuda"}, "Where to compute.");
  flags.Int("threads", &threads, 1, 256, "Threads of the engine. The answer does not depend on it.");
  flags.Bool("quiet", &quiet, "No progress on standard error.");
}

absl::StatusOr<std::shared_ptr<const Checkpoint>> OpenCheckpoint(const ModelFlags& flags) {
  Progress progress("checking " + flags.model, !flags.quiet && IsTerminal(STDERR_FILENO));
  CheckpointOptions options;
  options.progress = [&](int64_t done, int64_t total) { progress.Update(done, total); };
  ASSIGN_OR_RETURN(std::shared_ptr<const Checkpoint> checkpoint, Checkpoint::Open(flags.model, std::move(options)));
  if (const std::string notice = IgnoredKeysNotice(checkpoint->config().ignored_keys); !notice.empty()) {
    std::fprintf(stderr, "millrace: %s\n", notice.c_str());
  }
  return checkpoint;
}

absl::StatusOr<std::unique_ptr<Engine>> LoadEngine(const ModelFlags& flags,
                                                   std::shared_ptr<const Checkpoint> checkpoint,
                                                   const EngineSize& size) {
  const ModelConfig& config = checkpoint->config();
  EngineOptions options;
  options.numerics = flags.numerics.empty()
                         ? (config.weight_format == WeightFormat::kFp8 ? Numerics::kRelease : Numerics::kExact)
                     : flags.numerics == "exact" ? Numerics::kExact
                                                 : Numerics::kRelease;
  options.device = flags.device == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu;
  options.max_context_tokens = std::min(size.context_tokens, config.max_position_embeddings);
  options.cache_pages = (options.max_context_tokens + kPageTokens - 1) / kPageTokens;
  options.max_sequences = 1;
  options.num_threads = static_cast<int>(flags.threads);
  options.mtp = size.mtp;
  Progress progress("loading " + flags.model, !flags.quiet);
  options.progress = [&](int64_t done, int64_t total) { progress.Update(done, total); };
  if (!flags.quiet) {
    options.notice = [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); };
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, Engine::Create(std::move(checkpoint), std::move(options)));
  progress.Finish();
  return engine;
}

absl::StatusOr<std::unique_ptr<text::Tokenizer>> LoadTokenizer(const std::string& model_dir,
                                                               const ModelConfig& config) {
  return text::Tokenizer::Load(model_dir + "/tokenizer.json", static_cast<int>(config.vocab_size));
}

text::ChatOptions DefaultChatOptions(const ModelConfig& config) {
  text::ChatOptions options;
  options.release = config.dspark ? text::EncoderRelease::kDspark : text::EncoderRelease::kPreview;
  return options;
}

int ModelExitCode(const absl::Status& status) {
  if (absl::StartsWith(status.message(), "security.")) return kExitConfig;  // a file that the document names
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kOutOfRange:
      return kExitBadModel;
    case absl::StatusCode::kResourceExhausted:
      return kExitUnavailable;
    default:
      return kExitSoftware;
  }
}

}  // namespace millrace::cli
