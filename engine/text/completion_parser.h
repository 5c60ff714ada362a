// SPDX-License-Identifier: Apache-2.0
// Generated text to reasoning, content and tool calls, as it streams.
//
// Push takes text in any pieces (detokenizer.h's, special tokens included, the end-of-sentence token not) and returns
// what is certain. Text that could still turn out to be `</think>` or the start of a tool block waits, so that no piece
// of markup ever reaches a client; all deltas together do not depend on how the text was cut.
//
// It forgives what models do: a tool block without its blank line, without the outer tag, or before `</think>`; text
// after a block; a stray tag in text, which is taken out. A parameter that claims to be JSON and is not becomes a
// string. What cannot be read is dropped, never shown, and status() says so.
//
// Thread: one stream, one thread.
// Source: docs/model.md, "Parsing a completion".
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace millrace::text {

struct ToolCallDelta {
  int index = 0;        // which call of this completion, from 0
  bool starts = false;  // first delta of this call; `name` is set only here
  std::string name;
  std::string arguments;  // a piece of the JSON text of the arguments object
  bool operator==(const ToolCallDelta&) const = default;
};

struct CompletionDelta {
  std::string reasoning;
  std::string content;
  std::vector<ToolCallDelta> tool_calls;  // at most one entry per call and Push
  bool empty() const { return reasoning.empty() && content.empty() && tool_calls.empty(); }
};

struct ParserOptions {
  bool thinking = false;    // the prompt ended in <think>
  bool parse_tools = true;  // false: DSML is content like any other text
};

class CompletionParser {
 public:
  explicit CompletionParser(ParserOptions options);

  CompletionDelta Push(std::string_view text);

  // The end of the stream: everything that was still waiting and is not markup.
  CompletionDelta Finish();

  // Ok, or the first thing that could not be read: a malformed or unfinished tool call, a repeated parameter.
  const absl::Status& status() const { return status_; }
  // Calls that started; decides finish_reason "tool_calls".
  int num_tool_calls() const { return num_calls_; }
  // In thinking mode, whether the reasoning ended.
  bool reasoning_closed() const { return state_ != State::kReasoning; }

 private:
  enum class State {
    kReasoning,   // up to </think> or a tool block
    kContent,     // up to a tool block
    kCalls,       // between calls, inside the block
    kHeader,      // in <｜DSML｜invoke ...>
    kParameters,  // between parameters of a call
    kParameterHeader,
    kValue,  // in a parameter's value
    kSkip,   // after something malformed, up to the end of the block
  };

  bool Step(CompletionDelta& out);
  bool StepText(CompletionDelta& out);
  bool StepTag(size_t at, CompletionDelta& out);
  bool StepCalls();
  bool StepHeader(CompletionDelta& out);
  bool StepParameters(CompletionDelta& out);
  bool StepParameterHeader(CompletionDelta& out);
  bool StepValue(CompletionDelta& out);
  bool StepSkip();
  void EmitText(std::string_view text, CompletionDelta& out);
  ToolCallDelta& Call(CompletionDelta& out);
  void Malformed(std::string_view what);

  ParserOptions options_;
  State state_;
  std::string buffer_;  // text not yet decided
  size_t scanned_ = 0;  // bytes of buffer_ known not to hold what the state looks for
  int num_calls_ = 0;
  bool after_block_ = false;  // white space after a tool block is not content
  std::string call_name_;
  std::vector<std::string> parameters_;  // names seen in this call
  bool value_is_string_ = false;
  bool value_is_dropped_ = false;  // a repeated name
  absl::Status status_;
};

}  // namespace millrace::text
