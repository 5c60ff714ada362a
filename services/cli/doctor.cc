// SPDX-License-Identifier: Apache-2.0
// `millrace doctor`: what is wrong with this machine, or between it and others, before a cluster finds out.
//
// Each check is one line: what was found, and if it is not well, what it costs and what to do. Nothing is changed.
// What a configuration needs is config_check's; how blocks travel is measured by transport_probe, between this process
// and one for each worker, so that a transport that quietly fell back to TCP is a line here and not a slow cluster.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/ops/vector_cpu.h"
#include "engine/status.h"
#include "kvtransfer/ucx_transport.h"
#include "nlohmann/json.hpp"
#include "services/cli/command.h"
#include "services/cli/config_check.h"
#include "services/cli/machine.h"
#include "services/cli/terminal.h"
#include "services/cli/transport_probe.h"
#include "services/common/config.h"
#include "services/common/drain.h"

extern char** environ;

namespace millrace::cli {
namespace {

using Json = nlohmann::ordered_json;

// Severity::kNote is "ok or good to know".
struct Line {
  std::string section, text;
  Severity severity;
};

class Report {
 public:
  explicit Report(bool json) : json_(json), colour_(!json && IsTerminal(STDOUT_FILENO)) {}

  void Add(const std::string& section, Severity severity, std::string text) {
    if (!json_) {
      if (section != section_) std::printf("%s%s\n", section_.empty() ? "" : "\n", section.c_str());
      const char* word = severity == Severity::kError ? "BAD " : severity == Severity::kWarning ? "warn" : "ok  ";
      const char* code = severity == Severity::kError ? "1;31" : severity == Severity::kWarning ? "33" : "32";
      std::printf("  %s%s%s  %s\n", colour_ ? absl::StrCat("\033[", code, "m").c_str() : "", word,
                  colour_ ? "\033[0m" : "", text.c_str());
      std::fflush(stdout);
    }
    section_ = section;
    lines_.push_back({section, std::move(text), severity});
  }
  void Ok(const std::string& section, std::string text) { Add(section, Severity::kNote, std::move(text)); }
  void Warn(const std::string& section, std::string text) { Add(section, Severity::kWarning, std::move(text)); }
  void Bad(const std::string& section, std::string text) { Add(section, Severity::kError, std::move(text)); }

  int Finish(Json map) const {
    const auto bad =
        std::count_if(lines_.begin(), lines_.end(), [](auto& l) { return l.severity == Severity::kError; });
    if (json_) {
      Json checks = Json::array();
      for (const Line& line : lines_) {
        const char* word = line.severity == Severity::kError     ? "bad"
                           : line.severity == Severity::kWarning ? "warning"
                                                                 : "ok";
        checks.push_back({{"section", line.section}, {"verdict", word}, {"text", line.text}});
      }
      std::printf("%s\n", Json{{"ok", bad == 0}, {"checks", checks}, {"bandwidth", map}}.dump(2).c_str());
    }
    return bad == 0 ? kExitOk
                    : Fail("doctor", kExitFailure, absl::StrCat(bad, bad == 1 ? " thing is" : " things are", " bad"));
  }

 private:
  const bool json_, colour_;
  std::string section_;
  std::vector<Line> lines_;
};

// --- The machine ---

std::set<std::string> CpuFlags(std::string* model) {
  std::set<std::string> flags;
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line) && flags.empty();) {
    const std::pair<std::string, std::string> field = absl::StrSplit(line, absl::MaxSplits(':', 1));
    if (absl::StartsWith(field.first, "model name")) *model = std::string(absl::StripAsciiWhitespace(field.second));
    if (!absl::StartsWith(field.first, "flags")) continue;
    for (absl::string_view flag : absl::StrSplit(field.second, ' ', absl::SkipEmpty())) flags.emplace(flag);
  }
  return flags;
}

void CheckMachine(Report& report) {
  utsname system{};
  uname(&system);
  std::string model;
  const std::set<std::string> flags = CpuFlags(&model);
  report.Ok("Machine", absl::StrCat(system.sysname, " ", system.release, ", ", std::thread::hardware_concurrency(),
                                    " processors, ", model));
  std::vector<std::string> has;
  for (const char* flag : {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"}) {
    if (flags.count(flag)) has.emplace_back(flag);
  }
  const std::string kernels = vec::KernelSet();
  const std::string text = absl::StrCat("kernels ", kernels, "; of the processor: ", absl::StrJoin(has, " "));
  if (absl::StrContains(kernels, "avx") || absl::StrContains(kernels, "neon") || absl::StrContains(kernels, "sve")) {
    report.Ok("Machine", text);
  } else {
    report.Warn("Machine", absl::StrCat(text, ": plain vectors; the CPU backend will be slow"));
  }
  const MachineMemory memory = ReadMachineMemory();
  const std::string sizes = absl::StrCat("memory ", HumanBytes(memory.total), memory.limited ? " (control group)" : "",
                                         ", available ", HumanBytes(memory.available));
  if (memory.available * 10 < memory.total) {
    report.Warn("Machine", absl::StrCat(sizes, ": less than a tenth is free"));
  } else {
    report.Ok("Machine", sizes);
  }
}

// --- Cards ---

void CheckGpus(Report& report, const v1::ClusterConfig* config) {
  const bool wanted = config != nullptr && config->model().device() == "cuda";
  const GpuState state = ReadGpus();
  if (state.driver.empty() && state.gpus.empty()) {
    const std::string text = "no NVIDIA driver: model.device cuda cannot run here";
    return wanted ? report.Bad("GPU", text) : report.Ok("GPU", text);
  }
  if (!state.problem.empty()) {
    const std::string text = absl::StrCat("driver ", state.driver, ": ", state.problem);
    return wanted ? report.Bad("GPU", text) : report.Warn("GPU", text);
  }
  for (const Gpu& gpu : state.gpus) {
    const std::string text = absl::StrCat(gpu.name, ", ", HumanBytes(gpu.memory_bytes), ", compute capability ",
                                          gpu.major, ".", gpu.minor, ", driver ", state.driver);
    if (gpu.major == 9) {
      report.Ok("GPU", text);
    } else {
      const std::string why = absl::StrCat(text, ": the CUDA backend is for Hopper (9.0)");
      wanted ? report.Bad("GPU", why) : report.Warn("GPU", why);
    }
  }
}

// --- Limits ---

std::string Limit(rlim_t value) {
  return value == RLIM_INFINITY ? "unlimited" : HumanBytes(static_cast<int64_t>(value));
}

std::vector<std::string> RdmaDevices() {
  std::vector<std::string> active;
  std::error_code none;
  for (const auto& device : std::filesystem::directory_iterator("/sys/class/infiniband", none)) {
    for (const auto& port : std::filesystem::directory_iterator(device.path() / "ports", none)) {
      const auto state = ReadLine((port.path() / "state").string());
      if (state && absl::StrContains(*state, "ACTIVE")) active.push_back(device.path().filename().string());
    }
  }
  std::sort(active.begin(), active.end());
  return active;
}

void CheckLimits(Report& report, const v1::ClusterConfig* config, bool has_rdma) {
  rlimit files{}, locked{};
  getrlimit(RLIMIT_NOFILE, &files);
  getrlimit(RLIMIT_MEMLOCK, &locked);
  // A connection is a file; 256 more are workers' channels, the transport's sockets, files of the model.
  const rlim_t wanted = (config != nullptr ? config->router().max_connections() : 1024u) + 256u;
  const std::string open = absl::StrCat("open files ", files.rlim_cur);
  if (files.rlim_cur < wanted) {
    report.Bad("Limits", absl::StrCat(open, ": a router with its connections needs ", wanted, "; raise ulimit -n"));
  } else {
    report.Ok("Limits", open);
  }
  const std::string memlock = absl::StrCat("locked memory ", Limit(locked.rlim_cur));
  if (has_rdma && locked.rlim_cur != RLIM_INFINITY) {
    report.Bad("Limits", absl::StrCat(memlock,
                                      ": registering cache with an RDMA device fails beyond it; set memlock to "
                                      "unlimited (ulimit -l, or the container runtime's configuration)"));
  } else {
    report.Ok("Limits", absl::StrCat(memlock, has_rdma ? "" : ", which only RDMA would need more of"));
  }
  struct statvfs shared {};
  if (statvfs("/dev/shm", &shared) == 0) {
    const auto bytes = static_cast<int64_t>(shared.f_blocks * shared.f_frsize);
    const std::string text = absl::StrCat("/dev/shm ", HumanBytes(bytes));
    if (bytes < (int64_t{64} << 20)) {
      report.Warn("Limits", absl::StrCat(text, ": UCX keeps its own segments there; 64 MiB are usual"));
    } else {
      report.Ok("Limits", text);
    }
  } else {
    report.Warn("Limits", "/dev/shm is not mounted: UCX cannot use shared memory");
  }
  const std::string range = ReadLine("/proc/sys/net/ipv4/ip_local_port_range").value_or("unknown");
  report.Ok("Limits", absl::StrCat("the block transport listens on a port of ",
                                   absl::StrJoin(absl::StrSplit(range, '\t'), " to "),
                                   "; firewalls between workers must let it through"));
}

// --- Transport ---

void CheckUcx(Report& report, const std::vector<std::string>& rdma) {
  if (!kvtransfer::UcxAvailable()) {
    return report.Bad("Transport", "this build has no UCX: workers in processes of their own cannot exchange blocks");
  }
  kvtransfer::TransportOptions options;
  options.name = "doctor";
  options.log = [](absl::string_view) {};
  const auto transport = kvtransfer::CreateUcxTransport(options);
  if (!transport.ok()) {
    return report.Bad("Transport", absl::StrCat("UCX cannot start: ", transport.status().message()));
  }
  report.Ok("Transport", (*transport)->Describe());
  report.Ok("Transport", rdma.empty() ? "no active RDMA device: blocks travel over TCP"
                                      : absl::StrCat("active RDMA devices: ", absl::StrJoin(rdma, ", ")));
}

// This program again as `doctor --listen 127.0.0.1:0`, until it goes out of scope.
class Answering {
 public:
  Answering() = default;
  Answering(const Answering&) = delete;
  ~Answering() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);  // it holds nothing
    waitpid(pid_, nullptr, 0);
  }
  // Where it listens.
  absl::StatusOr<std::string> Start() {
    int out[2];
    if (pipe2(out, O_CLOEXEC) != 0) return absl::UnavailableError("no pipe");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    const char* argv[] = {"millrace", "doctor", "--listen", "127.0.0.1:0", nullptr};
    const int error = posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr, const_cast<char**>(argv), environ);
    posix_spawn_file_actions_destroy(&actions);
    close(out[1]);
    std::FILE* said = fdopen(out[0], "r");
    char line[256] = {};
    const bool heard = error == 0 && std::fgets(line, sizeof(line), said) != nullptr;
    std::fclose(said);
    const absl::string_view text = absl::StripSuffix(line, "\n");
    if (!heard || !absl::StartsWith(text, "listening on ")) {
      return absl::UnavailableError("a process to measure with could not be started");
    }
    return std::string(text.substr(sizeof("listening on ") - 1));
  }

 private:
  pid_t pid_ = -1;
};

Json Entry(const std::string& from, const std::string& to, const ProbeResult& result) {
  return {{"from", from},
          {"to", to},
          {"bytes_per_second", result.bytes_per_second},
          {"round_trip_us", result.round_trip_us},
          {"lanes", result.lanes},
          {"tcp_only", result.tcp_only}};
}

// Callers and whom they send to: prefill to decode, both to the pool.
std::vector<std::pair<std::string, std::string>> Pairs(const v1::ClusterConfig& config) {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const auto& prefill : config.prefill()) {
    for (const auto& decode : config.decode()) pairs.emplace_back(prefill.worker().name(), decode.worker().name());
    for (const auto& expert : config.expert()) pairs.emplace_back(prefill.worker().name(), expert.worker().name());
  }
  for (const auto& decode : config.decode()) {
    for (const auto& expert : config.expert()) pairs.emplace_back(decode.worker().name(), expert.worker().name());
  }
  return pairs;
}

constexpr size_t kMostPairs = 24;  // half a second each

void MeasureHere(Report& report, const v1::ClusterConfig& config, const std::vector<std::string>& rdma, Json& map) {
  if (!RunsOnOneMachine(config)) {
    return report.Warn("Bandwidth",
                       "the workers run on several machines: start `millrace doctor --listen HOST:PORT` on each and "
                       "name them here with --peer");
  }
  std::vector<std::pair<std::string, std::string>> pairs = Pairs(config);
  const size_t all = pairs.size();
  if (all > kMostPairs) pairs.resize(kMostPairs);
  for (const auto& [from, to] : pairs) {
    Answering process;  // of its own for each pair, as workers are
    const absl::StatusOr<std::string> address = process.Start();
    const absl::StatusOr<ProbeResult> result = address.ok() ? MeasureTransport(from, *address) : address.status();
    const std::string pair = absl::StrCat(from, " to ", to);
    if (!result.ok()) {
      report.Bad("Bandwidth", absl::StrCat(pair, ": ", result.status().message()));
      continue;
    }
    const Finding verdict = JudgeProbe(pair, *result, /*same_machine=*/true, rdma);
    report.Add("Bandwidth", verdict.severity, verdict.text);
    map.push_back(Entry(from, to, *result));
  }
  if (all > pairs.size()) report.Ok("Bandwidth", absl::StrCat("the other ", all - pairs.size(), " pairs are alike"));
}

void MeasurePeers(Report& report, const std::vector<std::string>& peers, const std::vector<std::string>& rdma,
                  Json& map) {
  for (const std::string& peer : peers) {
    const absl::StatusOr<ProbeResult> result = MeasureTransport("doctor", peer);
    if (!result.ok()) {
      report.Bad("Bandwidth", std::string(result.status().message()));
      continue;
    }
    const Finding verdict = JudgeProbe(absl::StrCat("here to ", peer), *result, OnLoopback(peer), rdma);
    report.Add("Bandwidth", verdict.severity, verdict.text);
    map.push_back(Entry("here", peer, *result));
  }
}

void CheckConfigFile(Report& report, const v1::ClusterConfig& config) {
  const absl::StatusOr<ModelReport> model = InspectModel(config.model().path());
  if (!model.ok()) return report.Bad("Configuration", std::string(model.status().message()));
  MemoryBudget budget;
  budget.one_machine = RunsOnOneMachine(config);
  budget.host = ReadMachineMemory().total;
  budget.host_is = "this machine's";
  const GpuState gpus = ReadGpus();
  if (!gpus.gpus.empty()) budget.gpu = gpus.gpus[0].memory_bytes;
  budget.gpu_is = "the first card's here";
  for (const Finding& finding : CheckConfig(config, *model, budget).findings) {
    report.Add("Configuration", finding.severity, absl::StrCat(finding.field, ": ", finding.text));
  }
}

int Listen(const std::string& listen) {
  static StopSignal stop;  // lives as long as the process, as its handler thread does
  stop.InstallHandlers();
  const absl::Status status = ServeProbes(listen, stop, [](const std::string& address) {
    std::printf("listening on %s\n", address.c_str());
    std::fflush(stdout);
  });
  return status.ok() ? kExitOk : Fail("doctor", kExitUnavailable, status);
}

}  // namespace

int RunDoctor(Arguments arguments) {
  std::string config_path, listen;
  std::vector<std::string> peers;
  bool json = false;
  Flags flags(
      "doctor", "Says what is wrong with this machine, and how fast blocks travel from it",
      "Processor and kernels, memory, cards and driver, limits, UCX and what it chooses. With --config also what\n"
      "`millrace config check` finds, and a measurement for each pair of workers, between real processes. For\n"
      "workers on other machines: `doctor --listen` there, `--peer` here. A transport that fell back to TCP\n"
      "although there is RDMA is BAD. Exit status 1 if anything is.\n\n"
      "  millrace doctor\n"
      "  millrace doctor --config deploy/demo/cluster.json\n"
      "  millrace doctor --listen 0.0.0.0:7800            # on 10.0.0.7\n"
      "  millrace doctor --peer 10.0.0.7:7800");
  flags.String("config", &config_path, "FILE", "Check this configuration on this machine as well.");
  flags.Repeated("peer", &peers, "HOST:PORT", "Measure to a `doctor --listen` there; may be given several times.");
  flags.String("listen", &listen, "HOST:PORT", "Answer other machines' measurements until Ctrl-C; nothing else.");
  flags.Bool("json", &json, "One JSON object instead of text.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "doctor", arguments, &exit_code)) return exit_code;
  if (!listen.empty()) return Listen(listen);
  std::optional<v1::ClusterConfig> config;
  if (!config_path.empty()) {
    absl::StatusOr<v1::ClusterConfig> loaded = LoadClusterConfig(config_path);
    if (!loaded.ok()) return Fail("doctor", kExitConfig, loaded.status());
    config = *std::move(loaded);
  }

  Report report(json);
  const std::vector<std::string> rdma = RdmaDevices();
  Json map = Json::array();
  CheckMachine(report);
  CheckGpus(report, config ? &*config : nullptr);
  CheckLimits(report, config ? &*config : nullptr, !rdma.empty());
  CheckUcx(report, rdma);
  if (config) CheckConfigFile(report, *config);
  if (config && kvtransfer::UcxAvailable()) MeasureHere(report, *config, rdma, map);
  MeasurePeers(report, peers, rdma, map);
  return report.Finish(std::move(map));
}

}  // namespace millrace::cli
