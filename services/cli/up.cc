// SPDX-License-Identifier: Apache-2.0
// `millrace up`: a whole cluster on this machine, one child process per role.
//
// Starts what the configuration lists, shows each role's progress until the cluster is ready, optionally asks one
// question, and drains in order on Ctrl-C: the router first (it lets running requests finish), then prefill and decode,
// then the experts they depend on. How children live and die is supervisor.
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"
#include "services/cli/chat_client.h"
#include "services/cli/command.h"
#include "services/cli/operator_client.h"
#include "services/cli/process_memory.h"
#include "services/cli/supervisor.h"
#include "services/cli/terminal.h"
#include "services/common/config.h"
#include "services/common/drain.h"

namespace millrace::cli {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

struct UpFlags {
  std::string config, log_dir, once, ask;
  int64_t ready_timeout_s = 600;
};

std::string DefaultLogDir() {
  const char* base = std::getenv("TMPDIR");
  return absl::StrCat(base != nullptr && *base != '\0' ? base : "/tmp", "/millrace-", getuid());
}

std::vector<ChildSpec> Children(const v1::ClusterConfig& config, const std::string& path) {
  std::vector<ChildSpec> specs = {{"router", {"router", "--config", path}, 0}};
  const auto add = [&](const char* role, const v1::WorkerSection& worker, int stage) {
    specs.push_back({worker.name(), {role, "--config", path, "--name", worker.name()}, stage});
  };
  for (const auto& section : config.expert()) add("expert", section.worker(), 2);
  for (const auto& section : config.prefill()) add("prefill", section.worker(), 1);
  for (const auto& section : config.decode()) add("decode", section.worker(), 1);
  return specs;
}

// Ready means: the router would place a request, and every role that was started takes part.
bool AllReady(const Json& status, const Supervisor& supervisor) {
  if (!status.value("ready", false)) return false;
  size_t ready = 0;
  for (const Json& worker : status["cluster"]["workers"]) ready += worker.value("state", "") == "ready";
  return ready + 1 >= supervisor.children().size();
}

// One line per role. A terminal sees them redrawn in place; a log sees a line per change.
class Board {
 public:
  void Show(const Supervisor& supervisor, const std::optional<Json>& status) {
    std::map<std::string, Json> workers;
    if (status) {
      for (const Json& worker : (*status)["cluster"]["workers"]) workers[worker.value("name", "")] = worker;
    }
    std::vector<std::string> lines;
    for (const Supervisor::Child& child : supervisor.children()) {
      lines.push_back(Line(child, status.has_value(), workers));
    }
    if (terminal_) {
      Redraw(lines);
    } else {
      Log(supervisor, lines);
    }
  }
  // Leaves what is shown and starts below it.
  void Close() { drawn_ = 0; }
  // A line that stays, above the board.
  void Say(const std::string& line) {
    if (terminal_ && drawn_ > 0) std::fprintf(stderr, "\033[%dA\033[J", drawn_);
    drawn_ = 0;
    std::fprintf(stderr, "%s\n", line.c_str());
  }

 private:
  std::string Line(const Supervisor::Child& child, bool router_answers, std::map<std::string, Json>& workers) {
    const std::string label = absl::StrFormat("  %-12s", child.spec.name);
    if (child.pid < 0) return absl::StrCat(label, "ended (", child.last_end, "), will be started again");
    if (child.spec.name == "router") return absl::StrCat(label, router_answers ? "ready" : "starting");
    const auto found = workers.find(child.spec.name);
    if (found == workers.end()) return absl::StrCat(label, "starting");
    const Json& worker = found->second;
    const std::string state = worker.value("state", "");
    const int64_t done = worker.value("load_bytes_done", int64_t{0});
    const int64_t total = worker.value("load_bytes_total", int64_t{0});
    if (state == "loading" && total > 0 && terminal_) {
      const double elapsed = std::chrono::duration<double>(Clock::now() - child.started_at).count();
      return ProgressLine(label, done, total, elapsed, TerminalWidth(STDERR_FILENO) - 1);
    }
    if (state == "ready")
      return absl::StrCat(label, "ready", total > 0 ? absl::StrCat(", ", HumanBytes(total), " of weights") : "");
    const std::string detail = worker.value("detail", "");
    return absl::StrCat(label, state, detail.empty() ? "" : ": ", detail);
  }
  void Redraw(const std::vector<std::string>& lines) {
    if (drawn_ > 0) std::fprintf(stderr, "\033[%dA", drawn_);
    for (const std::string& line : lines) std::fprintf(stderr, "\r\033[K%s\n", line.c_str());
    drawn_ = static_cast<int>(lines.size());
  }
  void Log(const Supervisor& supervisor, const std::vector<std::string>& lines) {
    for (size_t i = 0; i < lines.size(); ++i) {
      std::string& last = logged_[supervisor.children()[i].spec.name];
      if (last != lines[i]) std::fprintf(stderr, "%s\n", lines[i].c_str());
      last = lines[i];
    }
  }

  const bool terminal_ = IsTerminal(STDERR_FILENO);
  int drawn_ = 0;
  std::map<std::string, std::string> logged_;
};

// Our own front door: with public TLS its certificate is in a file that we may read, so no name has to match.
HttpDoor FrontDoor(const v1::ClusterConfig& config) {
  HttpDoor door;
  const v1::SecuritySection& security = config.security();
  door.tls = security.has_public_tls();
  door.ca = security.public_tls().certificate();
  door.any_name = true;
  if (const char* key = std::getenv("OPENAI_API_KEY"); key != nullptr && !security.api_keys_file().empty()) {
    door.api_key = key;
  }
  return door;
}

std::string FrontUrl(const v1::ClusterConfig& config) {
  return absl::StrCat(config.security().has_public_tls() ? "https://" : "http://", config.router().http_listen());
}

std::string CurlLine(const v1::ClusterConfig& config) {
  const v1::SecuritySection& security = config.security();
  return absl::StrCat("curl -N ", security.has_public_tls() ? "--cacert CA.pem " : "",
                      security.api_keys_file().empty() ? "" : "-H \"Authorization: Bearer $OPENAI_API_KEY\" ",
                      FrontUrl(config), "/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\":\"",
                      config.model().id(),
                      "\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"Tell me a story.\"}]}'");
}

// Asks over HTTP as any client would. True: a whole answer came.
bool Ask(const v1::ClusterConfig& config, const std::string& text) {
  const bool colour = IsTerminal(STDERR_FILENO);
  std::fprintf(stderr, "\n%s> %s%s\n", colour ? "\033[1m" : "", text.c_str(), colour ? "\033[0m" : "");
  const absl::StatusOr<ChatAnswer> answer = StreamChat(
      config.router().http_listen(), FrontDoor(config),
      Json{{"model", config.model().id()}, {"messages", Json::array({Json{{"role", "user"}, {"content", text}}})}});
  std::fputs("\n", stdout);
  std::fflush(stdout);
  if (!answer.ok()) {
    Fail("up", kExitFailure, absl::StrCat("the question got no answer: ", answer.status().message()));
    return false;
  }
  std::fprintf(stderr, "%s%s%s\n", colour ? "\033[2m" : "", DescribeSpeed(*answer).c_str(), colour ? "\033[0m" : "");
  return true;
}

class Up {
 public:
  Up(v1::ClusterConfig config, UpFlags flags)
      : config_(std::move(config)),
        flags_(std::move(flags)),
        supervisor_("/proc/self/exe", flags_.log_dir, Children(config_, flags_.config)) {
    supervisor_.set_on_event([this](const std::string& line) { board_.Say(absl::StrCat("  ", line)); });
  }

  int Run(const StopSignal& stop) {
    const Clock::time_point start = Clock::now();
    std::fprintf(stderr, "Starting %zu processes for %s; logs in %s\n", supervisor_.children().size(),
                 config_.model().id().c_str(), flags_.log_dir.c_str());
    if (absl::Status status = supervisor_.StartAll(); !status.ok()) return Fail("up", kExitCantCreate, status);
    int exit_code = WaitReady(stop, start);
    if (exit_code != kExitOk || stop.raised()) return Drain(stop.raised() ? kExitInterrupted : exit_code);

    if (!flags_.once.empty()) return Drain(Ask(config_, flags_.once) ? kExitOk : kExitFailure);
    if (!flags_.ask.empty()) Ask(config_, flags_.ask);
    std::fprintf(stderr, "\nTry next:\n  %s\n  millrace chat --address %s%s\nStatus: http://%s/   Ctrl-C drains.\n",
                 CurlLine(config_).c_str(), config_.router().http_listen().c_str(),
                 config_.security().has_public_tls() ? " --ca CA.pem" : "", config_.router().operator_listen().c_str());
    while (!stop.WaitFor(absl::Milliseconds(50))) {
      if (absl::Status status = supervisor_.Poll(Clock::now()); !status.ok()) {
        return Drain(Fail("up", supervisor_.failed_exit_code(), status));
      }
    }
    return Drain(kExitOk);
  }

 private:
  int WaitReady(const StopSignal& stop, Clock::time_point start) {
    const Clock::time_point until = start + std::chrono::seconds(flags_.ready_timeout_s);
    while (!stop.raised()) {
      if (absl::Status status = supervisor_.Poll(Clock::now()); !status.ok()) {
        board_.Close();
        return Fail("up", supervisor_.failed_exit_code() != 0 ? supervisor_.failed_exit_code() : kExitSoftware, status);
      }
      const absl::StatusOr<Json> status = ClusterStatus({.address = config_.router().operator_listen()});
      board_.Show(supervisor_, status.ok() ? std::optional<Json>(*status) : std::nullopt);
      if (status.ok() && AllReady(*status, supervisor_)) {
        board_.Close();
        std::fprintf(stderr, "Ready in %s: %s\n",
                     HumanSeconds(std::chrono::duration<double>(Clock::now() - start).count()).c_str(),
                     FrontUrl(config_).c_str());
        PrintMemory();
        return kExitOk;
      }
      if (Clock::now() > until) {
        board_.Close();
        return Fail("up", kExitUnavailable,
                    absl::StrCat("not ready after ", flags_.ready_timeout_s, " s; the logs are in ", flags_.log_dir));
      }
      stop.WaitFor(absl::Milliseconds(50));
    }
    board_.Close();
    return kExitOk;
  }

  // One line: what each process occupies now. What it consists of: docs/configuration.md, "Memory".
  void PrintMemory() const {
    std::vector<std::string> parts;
    for (const Supervisor::Child& child : supervisor_.children()) {
      const std::optional<ProcessMemory> memory = ReadProcessMemory(child.pid);
      if (!memory) continue;
      parts.push_back(absl::StrCat(child.spec.name, " ", HumanBytes(memory->resident_bytes), " (own ",
                                   HumanBytes(memory->own_bytes), ")"));
    }
    if (!parts.empty()) std::fprintf(stderr, "Resident memory: %s\n", absl::StrJoin(parts, ", ").c_str());
  }

  int Drain(int exit_code) {
    std::fprintf(stderr, "Draining: running requests finish, then the workers end.\n");
    const milliseconds grace(config_.timers().drain_grace_ms() + 2000);
    supervisor_.Drain(grace, nullptr);
    for (const Supervisor::Child& child : supervisor_.children()) {
      if (child.last_end == "exit 0" || child.last_end.empty()) continue;
      std::fprintf(stderr, "  %s: %s; its log: %s\n", child.spec.name.c_str(), child.last_end.c_str(),
                   child.log_path.c_str());
      if (exit_code == kExitOk) exit_code = kExitFailure;
    }
    std::fprintf(stderr, "Stopped.\n");
    return exit_code;
  }

  const v1::ClusterConfig config_;
  const UpFlags flags_;
  Board board_;
  Supervisor supervisor_;
};

}  // namespace

int RunUp(Arguments arguments) {
  UpFlags up;
  up.log_dir = DefaultLogDir();
  Flags flags("up", "Starts the local cluster that a configuration describes",
              "Every role is a process of its own; one that dies is started again. Ctrl-C drains: running requests\n"
              "finish, then the processes end in order; a second Ctrl-C ends at once.\n\n"
              "  millrace up --config deploy/demo/cluster.json\n"
              "  millrace up --config deploy/demo/cluster.json --once 'Spell the word river.'");
  flags.String("config", &up.config, "FILE", "The cluster's configuration document. Required.");
  flags.String("once", &up.once, "TEXT",
               "Ask this over HTTP, stream the answer, drain; exit status 0 if it came whole.");
  flags.String("ask", &up.ask, "TEXT", "Ask this first, then stay.");
  flags.String("log-dir", &up.log_dir, "DIR", "Where each role's log goes.");
  flags.Int("ready-timeout", &up.ready_timeout_s, 1, 86400, "Seconds until the cluster must be ready.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "up", arguments, &exit_code)) return exit_code;
  if (up.config.empty()) {
    return Fail("up", kExitUsage, "--config FILE is required, for instance --config deploy/demo/cluster.json");
  }
  absl::StatusOr<v1::ClusterConfig> config = LoadClusterConfig(up.config);
  if (!config.ok()) return Fail("up", kExitConfig, config.status());
  if (config->router().http_listen() == "off" || config->router().operator_listen() == "off") {
    return Fail("up", kExitConfig, "router.http_listen and router.operator_listen: up needs both; remove \"off\"");
  }
  static StopSignal stop;  // lives as long as the process, as its handler thread does
  stop.InstallHandlers();
  return Up(*std::move(config), std::move(up)).Run(stop);
}

}  // namespace millrace::cli
