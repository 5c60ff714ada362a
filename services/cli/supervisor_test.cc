// SPDX-License-Identifier: Apache-2.0
// The supervisor with a shell as its program: restarts, incurable ends, order of draining.
#include "services/cli/supervisor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace millrace::cli {
namespace {

using std::chrono::milliseconds;
using Clock = Supervisor::Clock;

class SupervisorTest : public ::testing::Test {
 protected:
  SupervisorTest() : dir_(::testing::TempDir() + "/supervisor_" + std::to_string(getpid())) {
    std::filesystem::remove_all(dir_);
  }
  ~SupervisorTest() override { std::filesystem::remove_all(dir_); }

  ChildSpec Shell(const std::string& name, const std::string& script, int stage = 0) {
    return {name, {"-c", script}, stage};
  }
  // Polls until `done` or 10 s.
  template <typename Done>
  absl::Status PollUntil(Supervisor& supervisor, Done done) {
    absl::Status status;
    const Clock::time_point until = Clock::now() + std::chrono::seconds(10);
    while (status.ok() && !done() && Clock::now() < until) {
      status = supervisor.Poll(Clock::now());
      std::this_thread::sleep_for(milliseconds(5));
    }
    return status;
  }
  std::string Read(const std::string& path) {
    std::ifstream in(path);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  const std::string dir_;
};

TEST_F(SupervisorTest, AChildThatIsKilledIsStartedAgain) {
  Supervisor supervisor("/bin/sh", dir_, {Shell("a", "sleep 60")});
  ASSERT_TRUE(supervisor.StartAll().ok());
  const pid_t first = supervisor.children()[0].pid;
  kill(first, SIGKILL);
  ASSERT_TRUE(PollUntil(supervisor, [&] { return supervisor.children()[0].starts == 2; }).ok());
  EXPECT_NE(supervisor.children()[0].pid, first);
  EXPECT_EQ(supervisor.children()[0].last_end, "killed by SIGKILL");
}

TEST_F(SupervisorTest, RestartsComeLaterEachTime) {
  Supervisor supervisor("/bin/sh", dir_, {Shell("a", "exit 1")});
  ASSERT_TRUE(supervisor.StartAll().ok());
  ASSERT_TRUE(PollUntil(supervisor, [&] { return supervisor.children()[0].starts == 3; }).ok());
  EXPECT_GE(supervisor.children()[0].back_off, milliseconds(400));
}

TEST_F(SupervisorTest, ABadModelIsNotTriedAgainAndItsReasonIsTold) {
  Supervisor supervisor("/bin/sh", dir_, {Shell("a", "echo config.json: hidden_size: found 7 >&2; exit 65")});
  ASSERT_TRUE(supervisor.StartAll().ok());
  const absl::Status status = PollUntil(supervisor, [] { return false; });
  EXPECT_EQ(status.message(), "config.json: hidden_size: found 7");
  EXPECT_EQ(supervisor.failed_exit_code(), 65);
}

TEST_F(SupervisorTest, StagesDrainInOrder) {
  const std::string log = dir_ + "/order";
  const auto child = [&](const std::string& name, int stage, const std::string& pause) {
    return Shell(name,
                 "trap 'sleep " + pause + "; echo " + name + " >> " + log +
                     "; exit 0' TERM; echo up; while :; do sleep 0.01; done",
                 stage);
  };
  // The slowest goes first: only order by stage makes it the first line.
  Supervisor supervisor("/bin/sh", dir_,
                        {child("expert", 2, "0"), child("router", 0, "0.3"), child("decode", 1, "0.1")});
  ASSERT_TRUE(supervisor.StartAll().ok());
  for (const auto& one : supervisor.children()) {
    ASSERT_TRUE(PollUntil(supervisor, [&] { return Read(one.log_path) == "up\n"; }).ok());
  }
  supervisor.Drain(milliseconds(5000), nullptr);
  EXPECT_EQ(Read(log), "router\ndecode\nexpert\n");
  for (const auto& one : supervisor.children()) EXPECT_EQ(one.last_end, "exit 0");
}

TEST_F(SupervisorTest, AChildThatIgnoresTheDrainIsKilled) {
  Supervisor supervisor("/bin/sh", dir_, {Shell("a", "trap '' TERM; echo up; while :; do sleep 0.01; done")});
  ASSERT_TRUE(supervisor.StartAll().ok());
  ASSERT_TRUE(PollUntil(supervisor, [&] { return Read(supervisor.children()[0].log_path) == "up\n"; }).ok());
  supervisor.Drain(milliseconds(200), nullptr);
  EXPECT_EQ(supervisor.children()[0].last_end, "killed by SIGKILL");
}

}  // namespace
}  // namespace millrace::cli
