// SPDX-License-Identifier: Apache-2.0
// `millrace tokenize` and `millrace detokenize`: text on standard input to a JSON array of ids, and back.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/model/config.h"
#include "engine/status.h"
#include "engine/text/tokenizer.h"
#include "nlohmann/json.hpp"
#include "services/cli/command.h"
#include "services/cli/model_loading.h"

namespace millrace::cli {
namespace {

absl::StatusOr<std::unique_ptr<text::Tokenizer>> Load(const std::string& model) {
  ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Load(model));
  return LoadTokenizer(model, config);
}

}  // namespace

int RunTokenize(Arguments arguments) {
  std::string model;
  bool plain = false;
  Flags flags("tokenize", "Turns standard input into token ids",
              "Prints one JSON array. Special tokens spelt in the text become those tokens, as the Hugging Face\n"
              "tokenizer does; no beginning-of-sentence token is added.\n\n"
              "  echo -n 'Hello' | millrace tokenize deploy/demo/model");
  flags.Positional("MODEL", &model, "Folder with config.json and tokenizer.json.");
  flags.Bool("plain", &plain, "Text is only text: no input yields a special token.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "tokenize", arguments, &exit_code)) return exit_code;
  const auto tokenizer = Load(model);
  if (!tokenizer.ok()) return Fail("tokenize", ModelExitCode(tokenizer.status()), tokenizer.status());
  const absl::StatusOr<std::string> input = ReadInput("-", int64_t{1} << 30);
  if (!input.ok()) return Fail("tokenize", kExitNoInput, input.status());
  const auto ids = (*tokenizer)->Encode(*input, plain ? text::SpecialTokens::kPlain : text::SpecialTokens::kMatch);
  if (!ids.ok()) return Fail("tokenize", kExitNoInput, ids.status());
  std::printf("%s\n", nlohmann::json(*ids).dump().c_str());
  return kExitOk;
}

int RunDetokenize(Arguments arguments) {
  std::string model;
  bool skip_special = false;
  Flags flags("detokenize", "Turns token ids on standard input into text",
              "Reads one JSON array of ids. Bytes that are not whole characters are printed as U+FFFD.\n\n"
              "  echo '[3, 17, 4]' | millrace detokenize deploy/demo/model");
  flags.Positional("MODEL", &model, "Folder with config.json and tokenizer.json.");
  flags.Bool("skip-special", &skip_special, "Special tokens add no text.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "detokenize", arguments, &exit_code)) return exit_code;
  const auto tokenizer = Load(model);
  if (!tokenizer.ok()) return Fail("detokenize", ModelExitCode(tokenizer.status()), tokenizer.status());
  const absl::StatusOr<std::string> input = ReadInput("-");
  if (!input.ok()) return Fail("detokenize", kExitNoInput, input.status());
  const nlohmann::json array = nlohmann::json::parse(*input, nullptr, /*allow_exceptions=*/false);
  if (!array.is_array()) return Fail("detokenize", kExitNoInput, "standard input: expected a JSON array of token ids");
  std::vector<int32_t> ids;
  for (size_t i = 0; i < array.size(); ++i) {
    if (!array[i].is_number_integer() || array[i] < 0 || array[i] >= (*tokenizer)->size()) {
      return Fail("detokenize", kExitNoInput,
                  absl::StrCat("standard input: [", i, "]: expected an id below ", (*tokenizer)->size()));
    }
    ids.push_back(array[i]);
  }
  const std::string text = (*tokenizer)->Decode(ids, skip_special);
  std::fwrite(text.data(), 1, text.size(), stdout);
  return kExitOk;
}

}  // namespace millrace::cli
