// SPDX-License-Identifier: Apache-2.0
// `millrace config check FILE`: does a configuration hold what it promises, before anything is started?
//
// The rules are services/common/config's and the physics config_check's; this file is flags, memory and printing.
#include <unistd.h>

#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "services/cli/command.h"
#include "services/cli/config_check.h"
#include "services/cli/machine.h"
#include "services/cli/model_loading.h"
#include "services/cli/terminal.h"
#include "services/common/config.h"

namespace millrace::cli {
namespace {

// A flag's size, or what this machine has.
int Budget(const std::string& memory, const std::string& gpu_memory, const v1::ClusterConfig& config,
           MemoryBudget& budget) {
  budget.one_machine = RunsOnOneMachine(config);
  if (!memory.empty()) {
    const auto bytes = ParseBytes(memory);
    if (!bytes)
      return Fail("config", kExitUsage, absl::StrCat("--memory: found \"", memory, "\", expected 24GiB or bytes"));
    budget.host = *bytes;
    budget.host_is = "as given";
  } else {
    const MachineMemory machine = ReadMachineMemory();
    budget.host = machine.total;
    budget.host_is = machine.limited ? "this control group's" : "this machine's";
  }
  if (!gpu_memory.empty()) {
    const auto bytes = ParseBytes(gpu_memory);
    if (!bytes) {
      return Fail("config", kExitUsage,
                  absl::StrCat("--gpu-memory: found \"", gpu_memory, "\", expected 80GB or bytes"));
    }
    budget.gpu = *bytes;
    budget.gpu_is = "as given";
  } else if (config.model().device() == "cuda") {
    const GpuState state = ReadGpus();
    budget.gpu_is = state.gpus.empty() ? "no card here; say --gpu-memory" : absl::StrCat(state.gpus[0].name, " here");
    if (!state.gpus.empty()) budget.gpu = state.gpus[0].memory_bytes;
  }
  return kExitOk;
}

}  // namespace

int RunConfig(Arguments arguments) {
  std::string what, file, memory, gpu_memory;
  bool json = false;
  Flags flags(
      "config", "Checks a cluster's configuration without starting anything",
      "First the document: unknown keys, types, ranges, names. Then physics, from the model's config.json (the\n"
      "weights need not be there): weights, cache, slots and buffers of each process against memory; how much\n"
      "context fits; whether every expert has a holder; addresses that nobody could dial. What does not fit is\n"
      "said with the nearest setting that does. Processes that all listen on loopback share one memory, others\n"
      "are judged one by one. Exit status 0: it can work, perhaps with warnings; 78: it cannot.\n\n"
      "  millrace config check deploy/demo/cluster.json\n"
      "  millrace config check cluster.json --memory 64GiB --gpu-memory 80GB");
  flags.Positional("check", &what, "The only thing there is to do.");
  flags.Positional("FILE", &file, "The configuration document.");
  flags.String("memory", &memory, "SIZE",
               "Memory of the machine, or of each process if they run apart. Default: this machine's.");
  flags.String("gpu-memory", &gpu_memory, "SIZE", "Memory of each card. Default: the first card's here.");
  flags.Bool("json", &json, "One JSON object instead of text.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "config", arguments, &exit_code)) return exit_code;
  if (what != "check") return Fail("config", kExitUsage, absl::StrCat("found \"", what, "\", expected check FILE"));
  const absl::StatusOr<v1::ClusterConfig> config = LoadClusterConfig(file);
  if (!config.ok()) return Fail("config", kExitConfig, config.status());
  MemoryBudget budget;
  if (const int failed = Budget(memory, gpu_memory, *config, budget); failed != kExitOk) return failed;
  const absl::StatusOr<ModelReport> model = InspectModel(config->model().path());
  if (!model.ok()) return Fail("config", ModelExitCode(model.status()), model.status());

  const ConfigReport report = CheckConfig(*config, *model, budget);
  const std::string text = json ? ConfigReportJson(report, budget).dump(2) + "\n"
                                : ConfigReportText(report, budget, IsTerminal(STDOUT_FILENO));
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (report.errors() == 0) return kExitOk;
  return Fail("config", kExitConfig,
              absl::StrCat(file, ": ", report.errors(), report.errors() == 1 ? " error" : " errors"));
}

}  // namespace millrace::cli
