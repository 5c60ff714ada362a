// SPDX-License-Identifier: Apache-2.0
// fork, exec, wait, kill.
#include "services/cli/supervisor.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"
#include "services/cli/command.h"

namespace millrace::cli {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kFirstBackOff{200}, kMaxBackOff{5000};
// A child that lived this long has earned a quick restart again.
constexpr std::chrono::seconds kHealthyAfter{10};

bool Incurable(int exit_code) {
  return exit_code == kExitUsage || exit_code == kExitBadModel || exit_code == kExitConfig;
}

std::string DescribeEnd(int status) {
  if (WIFEXITED(status)) return absl::StrCat("exit ", WEXITSTATUS(status));
  const char* name = sigabbrev_np(WTERMSIG(status));
  return absl::StrCat("killed by SIG", name != nullptr ? name : "?");
}

}  // namespace

Supervisor::Supervisor(std::string program, std::string log_dir, std::vector<ChildSpec> specs)
    : program_(std::move(program)), log_dir_(std::move(log_dir)) {
  for (ChildSpec& spec : specs) {
    Child child;
    child.log_path = absl::StrCat(log_dir_, "/", spec.name, ".log");
    child.spec = std::move(spec);
    children_.push_back(std::move(child));
  }
}

Supervisor::~Supervisor() {
  draining_ = true;
  for (Child& child : children_) {
    if (child.pid > 0) kill(child.pid, SIGKILL);
  }
  for (Child& child : children_) {
    if (child.pid > 0) waitpid(child.pid, nullptr, 0);
  }
}

absl::Status Supervisor::StartAll() {
  std::error_code error;
  std::filesystem::create_directories(log_dir_, error);
  if (error) return absl::UnavailableError(absl::StrCat(log_dir_, ": ", error.message(), "; choose --log-dir"));
  for (Child& child : children_) {
    std::filesystem::remove(child.log_path, error);  // of an earlier run; restarts within this one append
    RETURN_IF_ERROR(Start(child));
  }
  return absl::OkStatus();
}

absl::Status Supervisor::Start(Child& child) {
  // Everything that allocates happens before the fork: other threads may hold locks that the child would wait for.
  const int log = open(child.log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (log < 0) return absl::UnavailableError(absl::StrCat(child.log_path, ": ", std::strerror(errno)));
  std::vector<char*> argv = {const_cast<char*>("millrace")};
  for (const std::string& argument : child.spec.arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = getpid();

  const pid_t pid = fork();
  if (pid == 0) {
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(kExitSoftware);  // it died before the line above
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);  // the supervisor blocks what its children must hear
    const int null = open("/dev/null", O_RDONLY);
    dup2(null, STDIN_FILENO);
    dup2(log, STDOUT_FILENO);
    dup2(log, STDERR_FILENO);
    execv(program_.c_str(), argv.data());
    _exit(127);
  }
  close(log);
  if (pid < 0) return absl::ResourceExhaustedError(absl::StrCat("fork: ", std::strerror(errno)));
  child.pid = pid;
  child.started_at = Clock::now();
  ++child.starts;
  return absl::OkStatus();
}

void Supervisor::Reap() {
  for (Child& child : children_) {
    if (child.pid <= 0) continue;
    int status = 0;
    if (waitpid(child.pid, &status, WNOHANG) != child.pid) continue;
    child.pid = -1;
    child.last_end = DescribeEnd(status);
    if (draining_) continue;
    const Clock::time_point now = Clock::now();
    if (WIFEXITED(status) && Incurable(WEXITSTATUS(status))) {
      failed_exit_code_ = WEXITSTATUS(status);
      failure_ = LastLine(child.log_path);
      return;
    }
    child.back_off = now - child.started_at >= kHealthyAfter ? milliseconds(0) : child.back_off;
    child.back_off = std::clamp(2 * child.back_off, kFirstBackOff, kMaxBackOff);
    child.restart_at = now + child.back_off;
    if (on_event_) {
      on_event_(absl::StrCat(child.spec.name, " ended (", child.last_end, "); starting it again in ",
                             child.back_off.count(), " ms; its log: ", child.log_path));
    }
  }
}

absl::Status Supervisor::Poll(Clock::time_point now) {
  Reap();
  if (failed_exit_code_ != 0) return absl::FailedPreconditionError(failure_);
  for (Child& child : children_) {
    if (child.pid > 0 || draining_ || now < child.restart_at) continue;
    RETURN_IF_ERROR(Start(child));
  }
  return absl::OkStatus();
}

bool Supervisor::AnyRunning(int stage) const {
  return std::any_of(children_.begin(), children_.end(),
                     [&](const Child& child) { return child.pid > 0 && child.spec.drain_stage == stage; });
}

void Supervisor::Drain(milliseconds grace, const std::function<void()>& tick) {
  draining_ = true;
  std::set<int> stages;
  for (const Child& child : children_) stages.insert(child.spec.drain_stage);
  for (int stage : stages) {
    for (const Child& child : children_) {
      if (child.pid > 0 && child.spec.drain_stage == stage) kill(child.pid, SIGTERM);
    }
    const Clock::time_point until = Clock::now() + grace;
    while (AnyRunning(stage) && Clock::now() < until) {
      Reap();
      if (tick) tick();
      std::this_thread::sleep_for(milliseconds(10));
    }
    for (const Child& child : children_) {
      if (child.pid <= 0 || child.spec.drain_stage != stage) continue;
      if (on_event_) on_event_(absl::StrCat(child.spec.name, " did not end in time and is killed"));
      kill(child.pid, SIGKILL);
    }
    for (int i = 0; i < 200 && AnyRunning(stage); ++i) {
      Reap();
      std::this_thread::sleep_for(milliseconds(10));
    }
  }
}

std::string Supervisor::LastLine(const std::string& path) {
  std::ifstream in(path);
  std::string line, last;
  while (std::getline(in, line)) {
    if (!line.empty()) last = line;
  }
  const auto json = nlohmann::json::parse(last, nullptr, /*allow_exceptions=*/false);
  if (json.is_object() && json.contains("message")) return json["message"].get<std::string>();
  return last.empty() ? absl::StrCat("no output; see ", path) : last;
}

}  // namespace millrace::cli
