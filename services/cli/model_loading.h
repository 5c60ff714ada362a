// SPDX-License-Identifier: Apache-2.0
// Opening a model for the commands that run it in this process, with a bar for what takes time and errors that say
// what to do.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/text/chat_encoding.h"
#include "engine/text/tokenizer.h"
#include "services/cli/flags.h"

namespace millrace::cli {

// Flags that `run` and `score` share.
struct ModelFlags {
  std::string model;
  std::string numerics;  // empty: release if the checkpoint is quantised, else exact
  std::string device = "cpu";
  int64_t threads = 1;
  bool quiet = false;

  void Declare(Flags& flags);
};

struct EngineSize {
  int64_t context_tokens = 0;  // longest sequence; the cache holds one
  bool mtp = false;
};

struct LoadedEngine {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::unique_ptr<Engine> engine;
};

// Bars go to standard error unless `quiet`. Errors are those of Checkpoint::Open and Engine::Create.
absl::StatusOr<std::shared_ptr<const Checkpoint>> OpenCheckpoint(const ModelFlags& flags);
absl::StatusOr<std::unique_ptr<Engine>> LoadEngine(const ModelFlags& flags,
                                                   std::shared_ptr<const Checkpoint> checkpoint,
                                                   const EngineSize& size);

absl::StatusOr<std::unique_ptr<text::Tokenizer>> LoadTokenizer(const std::string& model_dir, const ModelConfig& config);
// What a chat request leaves open: the release of the encoder, nothing else.
text::ChatOptions DefaultChatOptions(const ModelConfig& config);

// The exit status of an error from the calls above.
int ModelExitCode(const absl::Status& status);

}  // namespace millrace::cli
