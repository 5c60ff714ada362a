// SPDX-License-Identifier: Apache-2.0
// Keeps the bytes of an unfinished character and lets everything before it go.
#include "engine/text/detokenizer.h"

#include <string_view>
#include <utility>

#include "engine/text/utf8.h"

namespace millrace::text {

std::string Detokenizer::Push(int32_t id) {
  if (skip_special_ && tokenizer_->IsSpecial(id)) return "";
  pending_.append(tokenizer_->TokenBytes(id));
  std::string text;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Step step = NextUtf8(rest);
    if (step.kind == Utf8Step::Kind::kIncomplete) break;
    text.append(step.kind == Utf8Step::Kind::kCharacter ? rest.substr(0, step.length) : kReplacementCharacter);
    rest.remove_prefix(step.length);
  }
  pending_ = std::string(rest);
  return text;
}

std::string Detokenizer::Finish() { return RepairUtf8(std::exchange(pending_, std::string())); }

}  // namespace millrace::text
