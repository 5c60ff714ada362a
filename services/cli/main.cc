// SPDX-License-Identifier: Apache-2.0
// millrace: one executable whose first argument is a command.
//
// This file is the table of commands and the text of `millrace --help`. Each command is a file beside it.
#include <sys/prctl.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "engine/model/mapped_file.h"
#include "services/cli/command.h"

namespace millrace::cli {
namespace {

constexpr absl::string_view kCluster = "Serve";
constexpr absl::string_view kLocal = "One process, no cluster";
constexpr absl::string_view kTools = "Look and check";

constexpr Command kCommands[] = {
    {"up", "start the local cluster that a configuration describes", RunUp, kCluster},
    {"router", "the front of a cluster: HTTP, gRPC, placement", RunRouter, kCluster},
    {"prefill", "a worker that computes prompts", RunPrefill, kCluster},
    {"decode", "a worker that continues them, token by token", RunDecode, kCluster},
    {"expert", "a member of the expert pool", RunExpert, kCluster},
    {"run", "answer one request with the whole model in this process", RunRun, kLocal},
    {"score", "logits of given tokens, safetensors in and out", RunScore, kLocal},
    {"chat", "talk to a running cluster", RunChat, kTools},
    {"bench", "load a running cluster and report latencies", RunBench, kTools},
    {"encode", "the prompt that a chat request becomes", RunEncode, kTools},
    {"tokenize", "standard input to token ids", RunTokenize, kTools},
    {"detokenize", "token ids on standard input to text", RunDetokenize, kTools},
    {"inspect", "what a checkpoint holds and what it needs", RunInspect, kTools},
    {"key", "an API key and its entry for the key file", RunKey, kTools},
    {"version", "version, build and kernel set", RunVersion, kTools},
};

void PrintHelp(std::FILE* out) {
  std::fputs(
      "millrace serves DeepSeek-V4 models from a cluster of processes: a router, prefill and decode workers, experts.\n"
      "\nUsage: millrace COMMAND [arguments]        millrace COMMAND --help explains one\n",
      out);
  absl::string_view group;
  for (const Command& command : kCommands) {
    if (command.group != group) std::fprintf(out, "\n%s:\n", std::string(command.group).c_str());
    group = command.group;
    std::fprintf(out, "  %-12s %s\n", std::string(command.name).c_str(), std::string(command.summary).c_str());
  }
  std::fputs(
      "\nTry it on the checkpoint that comes with the source:\n"
      "  millrace run deploy/demo/model --prompt \"Introduce yourself.\"\n"
      "  millrace up --config deploy/demo/cluster.json\n",
      out);
}

int Main(int argc, char** argv) {
  prctl(PR_SET_NAME, "millrace");  // a child of `up` is started as /proc/self/exe and would be listed as "exe"
  std::signal(SIGPIPE, SIG_IGN);   // a closed pipe or socket is an error return, not the end of the process
  InstallMappedFileGuard();        // a model file that is cut short while mapped is a sentence, not a bare signal
  const std::vector<absl::string_view> arguments(argv + 1, argv + argc);
  if (arguments.empty()) {
    PrintHelp(stderr);
    return kExitUsage;
  }
  const absl::string_view name = arguments[0];
  if (name == "--help" || name == "-h" || name == "help") {
    if (arguments.size() < 2) {
      PrintHelp(stdout);
      return kExitOk;
    }
    const std::vector<absl::string_view> help = {"--help"};
    for (const Command& command : kCommands) {
      if (command.name == arguments[1]) return command.run(help);
    }
  }
  if (name == "--version") return RunVersion({});
  for (const Command& command : kCommands) {
    if (command.name == name) return command.run(Arguments(arguments).subspan(1));
  }
  std::fprintf(stderr, "millrace: no command \"%.*s\"; millrace --help lists them\n",
               static_cast<int>(name.size() > 64 ? 64 : name.size()), name.data());
  return kExitUsage;
}

}  // namespace
}  // namespace millrace::cli

int main(int argc, char** argv) {
  // Libraries we use may throw (memory, threads, sockets at start); the last resort is one line, not a bare abort.
  try {
    return millrace::cli::Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "millrace: internal error: %s\n", error.what());
    return millrace::cli::kExitSoftware;
  }
}
