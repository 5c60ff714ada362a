// SPDX-License-Identifier: Apache-2.0
// `millrace encode`: the prompt that a chat request becomes, as text or as ids.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/model/config.h"
#include "engine/status.h"
#include "engine/text/chat_encoding.h"
#include "engine/text/python_json.h"
#include "nlohmann/json.hpp"
#include "services/cli/command.h"
#include "services/cli/model_loading.h"

namespace millrace::cli {

int RunEncode(Arguments arguments) {
  std::string model, request_path, effort;
  bool ids = false, thinking = false, drop_thinking = true;
  Flags flags("encode", "Prints the prompt that a chat request becomes",
              "REQUEST.json is what /v1/chat/completions takes, or a bare list of messages; - reads standard input.\n"
              "The flags mirror the encoder's arguments and hold where the request says nothing.\n\n"
              "  millrace encode deploy/demo/model request.json --thinking\n"
              "  echo '[{\"role\":\"user\",\"content\":\"Hi\"}]' | millrace encode deploy/demo/model - --ids");
  flags.Positional("MODEL", &model, "Folder with config.json and tokenizer.json.");
  flags.Positional("REQUEST.json", &request_path, "The request, or - for standard input.");
  flags.Bool("ids", &ids, "Token ids as a JSON array instead of text.");
  flags.Bool("thinking", &thinking, "Let the model think first.");
  flags.Bool("drop-thinking", &drop_thinking, "Forget the reasoning of turns before the last user message.");
  flags.Enum("effort", &effort, {"none", "low", "high", "max"}, "How hard to think; implies --thinking unless none.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "encode", arguments, &exit_code)) return exit_code;

  const absl::StatusOr<ModelConfig> config = ModelConfig::Load(model);
  if (!config.ok()) return Fail("encode", ModelExitCode(config.status()), config.status());
  const absl::StatusOr<std::string> input = ReadInput(request_path);
  if (!input.ok()) return Fail("encode", kExitNoInput, input.status());
  const absl::StatusOr<text::Json> request = text::ParseJson(*input);
  if (!request.ok()) {
    return Fail("encode", kExitNoInput,
                absl::StrCat(request_path == "-" ? "standard input" : request_path, ": ", request.status().message()));
  }
  text::ChatOptions options = DefaultChatOptions(*config);
  options.thinking = thinking || (!effort.empty() && effort != "none");
  options.drop_thinking = drop_thinking;
  options.effort = effort == "max"    ? text::ReasoningEffort::kMax
                   : effort == "high" ? text::ReasoningEffort::kHigh
                                      : text::ReasoningEffort::kLow;
  const absl::StatusOr<text::Prompt> prompt = text::EncodeChatRequest(*request, options);
  if (!prompt.ok()) return Fail("encode", kExitNoInput, prompt.status());
  if (!ids) {
    const std::string text = text::PromptString(*prompt);
    std::fwrite(text.data(), 1, text.size(), stdout);
    return kExitOk;
  }
  const auto tokenizer = LoadTokenizer(model, *config);
  if (!tokenizer.ok()) return Fail("encode", ModelExitCode(tokenizer.status()), tokenizer.status());
  const absl::StatusOr<std::vector<int32_t>> prompt_ids = text::PromptIds(*prompt, **tokenizer);
  if (!prompt_ids.ok()) return Fail("encode", kExitBadModel, prompt_ids.status());
  std::printf("%s\n", nlohmann::json(*prompt_ids).dump().c_str());
  return kExitOk;
}

}  // namespace millrace::cli
