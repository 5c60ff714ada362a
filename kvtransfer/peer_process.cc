// SPDX-License-Identifier: Apache-2.0
// See peer_process.h.
#include "kvtransfer/peer_process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"

extern char** environ;

namespace millrace::kvtransfer::testing {
namespace {

int RunPeer(const std::string& parent_address_hex) {
  TransportOptions options;
  options.log = [](absl::string_view line) { std::fprintf(stderr, "peer: %.*s\n", int(line.size()), line.data()); };
  auto created = CreateUcxTransport(options);
  if (!created.ok()) {
    std::fprintf(stderr, "peer: %s\n", created.status().ToString().c_str());
    return 1;
  }
  Transport& transport = **created;
  FunctionHandler handler([&](const IncomingMessage& m) {
    const std::string header(reinterpret_cast<const char*>(m.header.data()), m.header.size());
    size_t bytes = 0;
    if (header.rfind("send ", 0) == 0 && absl::SimpleAtoi(header.substr(5), &bytes)) {
      auto payload = std::make_shared<std::vector<uint8_t>>(Pattern(bytes, bytes));
      (void)transport.SendMessage(m.from, kFromPeer, m.header, {payload->data(), payload->size()},
                                  [payload](absl::Status) {});
    }
    auto sink = std::make_shared<std::vector<uint8_t>>(m.payload_bytes);
    return Placement::Into({sink->data(), sink->size()}, [sink](absl::Status) {});
  });
  transport.SetHandler(kToPeer, &handler);
  auto parent = transport.Connect(absl::HexStringToBytes(parent_address_hex));
  if (!parent.ok()) return 1;
  (void)transport.SendMessage(*parent, kFromPeer, Bytes("hello"), {}, nullptr);
  char byte;
  while (read(STDIN_FILENO, &byte, 1) > 0) {  // until our parent closes the pipe or dies
  }
  transport.Close();
  return 0;
}

}  // namespace

void PeerProcess::Start(const std::string& parent_address, std::vector<std::string> prefix) {
  int pipe_fds[2];
  ASSERT_EQ(pipe2(pipe_fds, O_CLOEXEC), 0);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, pipe_fds[0], STDIN_FILENO);
  char self[4096] = {};
  ASSERT_GT(readlink("/proc/self/exe", self, sizeof(self) - 1), 0);
  std::vector<std::string> words = std::move(prefix);
  words.insert(words.end(), {self, "--peer", absl::BytesToHexString(parent_address)});
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  ASSERT_EQ(posix_spawnp(&pid_, argv[0], &actions, nullptr, argv.data(), environ), 0);
  posix_spawn_file_actions_destroy(&actions);
  close(pipe_fds[0]);
  pipe_ = pipe_fds[1];
}

PeerProcess::~PeerProcess() {
  Signal(SIGCONT);
  Kill();
}

void PeerProcess::Signal(int signal) const {
  if (pid_ > 0) kill(pid_, signal);
}

// The signal takes effect a little after kill() returns.
void PeerProcess::Stop() const {
  Signal(SIGSTOP);
  int status = 0;
  ASSERT_EQ(waitpid(pid_, &status, WUNTRACED), pid_);
  ASSERT_TRUE(WIFSTOPPED(status));
}

void PeerProcess::Kill() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  close(pipe_);
  pid_ = -1;
}

int PeerProcess::Finish() {
  close(pipe_);
  int status = 0;
  waitpid(pid_, &status, 0);
  pid_ = -1;
  return status;
}

int PeerMain(const char* address) { return RunPeer(address); }

}  // namespace millrace::kvtransfer::testing

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--peer") == 0) return millrace::kvtransfer::testing::PeerMain(argv[2]);
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
