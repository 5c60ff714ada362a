// SPDX-License-Identifier: Apache-2.0
// `millrace inspect`: what a checkpoint is, what it weighs, what its cache costs, what hardware it needs.
//
// The figures are engine/model/model_report's; this file is flags and printing. It also writes random checkpoints, for
// trying shapes that one has no weights of.
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "engine/model/checkpoint.h"
#include "engine/model/model_report.h"
#include "engine/model/preset_config.h"
#include "engine/model/random_checkpoint.h"
#include "services/cli/command.h"
#include "services/cli/model_loading.h"
#include "services/cli/terminal.h"

namespace millrace::cli {
namespace {

int MakeRandom(const std::string& preset, const std::string& out_dir, int64_t layers, int64_t experts, int64_t seed) {
  if (out_dir.empty()) return Fail("inspect", kExitUsage, "--make-random PRESET needs the folder to write as MODEL");
  const ModelPreset which = preset == "flash" ? ModelPreset::kFlash
                            : preset == "pro" ? ModelPreset::kPro
                                              : ModelPreset::kTiny;
  Progress progress("writing " + out_dir, true);
  RandomCheckpointOptions options;
  options.seed = static_cast<uint64_t>(seed);
  options.progress = [&](int64_t done, int64_t total) { progress.Update(done, total); };
  const PresetChanges changes{.layers = static_cast<int>(layers), .experts = static_cast<int>(experts)};
  if (absl::Status status = MakeRandomCheckpoint(which, changes, out_dir, options); !status.ok()) {
    return Fail("inspect", kExitCantCreate, status);
  }
  progress.Finish();
  return kExitOk;
}

}  // namespace

int RunInspect(Arguments arguments) {
  std::string model, make_random;
  bool json = false, verify = false, hash = false;
  int64_t layers = 0, experts = 0, seed = 0;
  Flags flags("inspect", "Says what a checkpoint is, what it weighs and what it needs",
              "MODEL is a folder, or a config.json alone (the weights are then counted from the architecture).\n\n"
              "  millrace inspect deploy/demo/model\n"
              "  millrace inspect path/to/config.json --json\n"
              "  millrace inspect /tmp/random --make-random flash --layers 4 --experts 16");
  flags.Positional("MODEL", &model, "Folder of the checkpoint, or a config.json.");
  flags.Bool("json", &json, "One JSON object instead of text.");
  flags.Bool("verify", &verify, "Read every tensor and refuse NaN and Inf.");
  flags.Bool("hash", &hash, "Also hash the contents: the part of the compatibility hash that is the model's.");
  flags.Enum("make-random", &make_random, {"flash", "pro", "tiny"},
             "Write a checkpoint of random weights in the released format to MODEL instead.");
  flags.Int("layers", &layers, 0, 1000, "With --make-random: only the first N layers; 0: all.");
  flags.Int("experts", &experts, 0, 100000, "With --make-random: only N routed experts; 0: all.");
  flags.Int("seed", &seed, 0, INT64_MAX, "With --make-random.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "inspect", arguments, &exit_code)) return exit_code;
  if (!make_random.empty()) return MakeRandom(make_random, model, layers, experts, seed);

  Progress progress("reading " + model, verify || hash);
  CheckpointOptions options;
  options.verify_finite = verify;
  options.progress = [&](int64_t done, int64_t total) { progress.Update(done, total); };
  const absl::StatusOr<ModelReport> report = InspectModel(model, std::move(options), hash);
  if (!report.ok()) return Fail("inspect", ModelExitCode(report.status()), report.status());
  if (verify || hash) progress.Finish();
  const std::string text = json ? ModelReportJson(*report).dump(2) + "\n" : ModelReportText(*report);
  std::fwrite(text.data(), 1, text.size(), stdout);
  return kExitOk;
}

}  // namespace millrace::cli
