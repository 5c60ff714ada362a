// SPDX-License-Identifier: Apache-2.0
// One choice's tokens to what a client sees: ids -> text -> stop strings -> reasoning, content and tool calls.
//
// Each stage holds back what is not certain yet (half a character, the start of a stop string, the start of markup), so
// a token often shows nothing and a later one more than its own. All pieces together do not depend on timing.
//
// Thread: one choice, one thread.
#pragma once

#include <cstdint>
#include <optional>

#include "engine/text/completion_parser.h"
#include "engine/text/detokenizer.h"
#include "engine/text/stop_matcher.h"
#include "services/router/openai_request.h"

namespace millrace::router {

class ChoiceText {
 public:
  // The tokenizer must outlive it.
  ChoiceText(const ApiRequest& request, const text::Tokenizer& tokenizer);

  // What this token makes certain. After stopped() tokens add nothing.
  text::CompletionDelta Push(int32_t id);
  // The end of the choice: what was still waiting. Call once, also after a stop string.
  text::CompletionDelta Finish();

  bool stopped() const { return stops_.stopped(); }
  int num_tool_calls() const { return parser_ && !drops_calls_ ? parser_->num_tool_calls() : 0; }
  int64_t reasoning_tokens() const { return reasoning_tokens_; }
  // False if the model wrote a tool call that could not be read and was dropped.
  bool tool_calls_readable() const { return !parser_ || drops_calls_ || parser_->status().ok(); }

 private:
  text::CompletionDelta Parse(const std::string& text);
  text::CompletionDelta Shown(text::CompletionDelta delta) const;

  const std::optional<int32_t> eos_id_;
  text::Detokenizer detokenizer_;
  text::StopMatcher stops_;
  std::optional<text::CompletionParser> parser_;  // none for plain completions
  // The markup was understood and is not shown. Banning its token instead was tried on the demo model, which then wrote
  // `<tool_calls>` without it for ever.
  const bool drops_calls_;
  int64_t reasoning_tokens_ = 0;
};

}  // namespace millrace::router
