// SPDX-License-Identifier: Apache-2.0
// See choice_text.h.
#include "services/router/choice_text.h"

#include <utility>

namespace millrace::router {
namespace {

// Pieces of the same call that came one after the other are one piece.
void Append(text::CompletionDelta&& more, text::CompletionDelta& to) {
  to.reasoning += more.reasoning;
  to.content += more.content;
  for (auto& call : more.tool_calls) {
    if (!to.tool_calls.empty() && to.tool_calls.back().index == call.index && !call.starts) {
      to.tool_calls.back().arguments += call.arguments;
    } else {
      to.tool_calls.push_back(std::move(call));
    }
  }
}

}  // namespace

ChoiceText::ChoiceText(const ApiRequest& request, const text::Tokenizer& tokenizer)
    : eos_id_(tokenizer.TokenId(std::string_view(text::kEos))),
      // Markup is made of special tokens: the parser needs them, a plain completion does not show them.
      detokenizer_(tokenizer, /*skip_special=*/!request.is_chat),
      stops_(request.stops),
      drops_calls_(request.tool_markup == ToolMarkup::kDropped) {
  if (request.is_chat) {
    parser_.emplace(text::ParserOptions{request.thinking, request.tool_markup != ToolMarkup::kText});
  }
}

text::CompletionDelta ChoiceText::Push(int32_t id) {
  if (stopped()) return {};
  if (parser_ && !parser_->reasoning_closed()) ++reasoning_tokens_;
  if (id == eos_id_) return {};
  return Parse(stops_.Push(detokenizer_.Push(id)));
}

text::CompletionDelta ChoiceText::Finish() {
  text::CompletionDelta delta;
  if (!stopped()) {
    delta = Parse(stops_.Push(detokenizer_.Finish()));
    Append(Parse(stops_.Finish()), delta);
  }
  if (parser_) Append(Shown(parser_->Finish()), delta);
  return delta;
}

text::CompletionDelta ChoiceText::Shown(text::CompletionDelta delta) const {
  if (drops_calls_) delta.tool_calls.clear();
  return delta;
}

text::CompletionDelta ChoiceText::Parse(const std::string& text) {
  if (text.empty()) return {};
  if (parser_) return Shown(parser_->Push(text));
  text::CompletionDelta delta;
  delta.content = text;
  return delta;
}

}  // namespace millrace::router
