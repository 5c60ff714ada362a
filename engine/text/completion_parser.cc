// SPDX-License-Identifier: Apache-2.0
// A state machine over a small buffer: each state takes what it is sure of off the front, and stops where the rest
// could still become something else.
#include "engine/text/completion_parser.h"

#include <algorithm>
#include <utility>

#include "engine/text/chat_encoding.h"
#include "engine/text/concat.h"
#include "engine/text/python_json.h"

namespace millrace::text {
namespace {

constexpr std::string_view kBlockStart = "<｜DSML｜tool_calls>";
constexpr std::string_view kBlockEnd = "</｜DSML｜tool_calls>";
constexpr std::string_view kInvokeStart = "<｜DSML｜invoke";
constexpr std::string_view kInvokeEnd = "</｜DSML｜invoke>";
constexpr std::string_view kParameterStart = "<｜DSML｜parameter";
constexpr std::string_view kParameterEnd = "</｜DSML｜parameter>";
constexpr std::string_view kAnyTag = "<｜DSML｜";
constexpr std::string_view kAnyEndTag = "</｜DSML｜";
// The line that stands between content and a block; markup, not content.
constexpr std::string_view kBlankLine = "\n\n";
constexpr std::string_view kWhiteSpace = " \t\r\n";
// Names are shorter; whatever is longer is not a tag, and the buffer must not grow for it.
constexpr size_t kMaxHeaderBytes = 4096;

// How many bytes at the end of `text` could be the beginning of `marker` (all of it excluded).
size_t PartialMatch(std::string_view text, std::string_view marker) {
  for (size_t length = std::min(text.size(), marker.size() - 1); length > 0; --length) {
    if (text.substr(text.size() - length) == marker.substr(0, length)) return length;
  }
  return 0;
}

// True if `text` could become `marker` or already starts with it.
bool CouldStartWith(std::string_view text, std::string_view marker) {
  const size_t length = std::min(text.size(), marker.size());
  return text.substr(0, length) == marker.substr(0, length);
}

// Where the first tag begins: at the `<` or `</` before the marker, or at a bare marker.
size_t FindTag(std::string_view text) {
  const size_t marker = text.find(kDsml);
  if (marker == std::string_view::npos) return marker;
  const std::string_view before = text.substr(0, marker);
  for (const std::string_view open : {kAnyEndTag, kAnyTag}) {
    const size_t length = open.size() - kDsml.size();
    if (before.size() >= length && before.substr(before.size() - length) == open.substr(0, length))
      return marker - length;
  }
  return marker;
}

// How many line breaks at the end of `text`, at most the blank line's two, belong to a block that follows.
size_t TrailingBlankLine(std::string_view text) {
  size_t count = 0;
  while (count < kBlankLine.size() && count < text.size() && text[text.size() - 1 - count] == '\n') ++count;
  return count;
}

// The attributes of a tag, ` name="..."` without white space before and `">` behind; false if the end is not there.
bool TakeHeader(std::string_view buffer, std::string_view& header) {
  const size_t end = buffer.substr(0, kMaxHeaderBytes).find("\">");
  header = buffer.substr(0, end == std::string_view::npos ? 0 : end);
  header.remove_prefix(std::min(header.find_first_not_of(kWhiteSpace), header.size()));
  return end != std::string_view::npos;
}

bool TakePrefix(std::string_view& text, std::string_view prefix) {
  if (text.substr(0, prefix.size()) != prefix) return false;
  text.remove_prefix(prefix.size());
  return true;
}

}  // namespace

CompletionParser::CompletionParser(ParserOptions options)
    : options_(options), state_(options.thinking ? State::kReasoning : State::kContent) {}

CompletionDelta CompletionParser::Push(std::string_view text) {
  CompletionDelta out;
  buffer_.append(text);
  while (Step(out)) {
  }
  return out;
}

CompletionDelta CompletionParser::Finish() {
  CompletionDelta out;
  const std::string rest = std::exchange(buffer_, std::string());
  switch (state_) {
    case State::kReasoning:
    case State::kContent:
      // What waited cannot become markup any more. Only a whole marker says that a block had begun.
      if (const size_t tag = options_.parse_tools ? FindTag(rest) : std::string::npos; tag != std::string::npos) {
        const std::string_view before = std::string_view(rest).substr(0, tag);
        EmitText(before.substr(0, tag - TrailingBlankLine(before)), out);
        Malformed("the text ended in a tag");
      } else {
        EmitText(rest, out);
      }
      break;
    case State::kCalls:
      // A block whose calls are complete but whose end is missing loses nothing.
      if (rest.find_first_not_of(kWhiteSpace) != std::string::npos) Malformed("the text ended between calls");
      break;
    case State::kValue:
      // The call is cut off, but what came of its text is the client's.
      if (value_is_string_ && !value_is_dropped_) {
        const size_t keep = rest.find(kAnyEndTag) == std::string::npos ? rest.size() : rest.find(kAnyEndTag);
        const std::string quoted = QuotePythonString(std::string_view(rest).substr(0, keep));
        if (keep > 0) Call(out).arguments += quoted.substr(1, quoted.size() - 2);
      }
      Malformed("the text ended in a parameter");
      break;
    case State::kHeader:
    case State::kParameters:
    case State::kParameterHeader:
      Malformed("the text ended in a call");
      break;
    case State::kSkip:
      break;
  }
  return out;
}

// Takes one thing off the buffer; false when more text is needed.
bool CompletionParser::Step(CompletionDelta& out) {
  if (buffer_.empty()) return false;
  switch (state_) {
    case State::kReasoning:
    case State::kContent:
      return StepText(out);
    case State::kCalls:
      return StepCalls();
    case State::kHeader:
      return StepHeader(out);
    case State::kParameters:
      return StepParameters(out);
    case State::kParameterHeader:
      return StepParameterHeader(out);
    case State::kValue:
      return StepValue(out);
    case State::kSkip:
      return StepSkip();
  }
  return false;
}

bool CompletionParser::StepText(CompletionDelta& out) {
  const std::string_view text = buffer_;
  const size_t think_end = state_ == State::kReasoning ? text.find(kThinkEnd) : std::string_view::npos;
  const size_t tag = options_.parse_tools ? FindTag(text) : std::string_view::npos;
  if (think_end < tag) {
    EmitText(text.substr(0, think_end), out);
    buffer_.erase(0, think_end + kThinkEnd.size());
    state_ = State::kContent;
    return true;
  }
  if (tag != std::string_view::npos) return StepTag(tag, out);

  size_t keep = state_ == State::kReasoning ? PartialMatch(text, kThinkEnd) : 0;
  if (options_.parse_tools) {
    const size_t marker =
        std::max({PartialMatch(text, kAnyTag), PartialMatch(text, kAnyEndTag), PartialMatch(text, kDsml)});
    keep = std::max(keep, marker + TrailingBlankLine(text.substr(0, text.size() - marker)));
  }
  EmitText(text.substr(0, text.size() - keep), out);
  buffer_.erase(0, buffer_.size() - keep);
  return false;
}

// A tag in the middle of text, at `at`: the start of a block, or something stray that is taken out.
bool CompletionParser::StepTag(size_t at, CompletionDelta& out) {
  const std::string_view before = std::string_view(buffer_).substr(0, at), tag = std::string_view(buffer_).substr(at);
  const bool starts_block = tag.substr(0, kBlockStart.size()) == kBlockStart;
  // An invoke tag without its outer tag starts a block too.
  if (starts_block || tag.substr(0, kInvokeStart.size()) == kInvokeStart) {
    EmitText(before.substr(0, at - TrailingBlankLine(before)), out);
    buffer_.erase(0, starts_block ? at + kBlockStart.size() : at);
    state_ = State::kCalls;
    return true;
  }
  if (CouldStartWith(tag, kBlockStart) || CouldStartWith(tag, kInvokeStart)) return false;
  size_t end = tag.find_first_of(">\n");
  if (end == std::string_view::npos && tag.size() < kMaxHeaderBytes) return false;
  end = std::min(end, kMaxHeaderBytes - 1);
  EmitText(before, out);
  buffer_.erase(0, at + end + (tag[end] == '>' ? 1 : 0));
  Malformed("a tag outside of a block");
  return true;
}

bool CompletionParser::StepCalls() {
  buffer_.erase(0, std::min(buffer_.find_first_not_of(kWhiteSpace), buffer_.size()));
  if (buffer_.empty()) return false;
  const std::string_view text = buffer_;
  if (text.substr(0, kInvokeStart.size()) == kInvokeStart) {
    buffer_.erase(0, kInvokeStart.size());
    state_ = State::kHeader;
    return true;
  }
  if (text.substr(0, kBlockEnd.size()) == kBlockEnd) {
    buffer_.erase(0, kBlockEnd.size());
    after_block_ = true;
    state_ = State::kContent;
    return true;
  }
  if (CouldStartWith(text, kInvokeStart) || CouldStartWith(text, kBlockEnd)) return false;
  // Plain text after a call without an outer tag, or after calls whose end tag was forgotten, is content again.
  if (num_calls_ > 0 && !CouldStartWith(text, kAnyTag) && !CouldStartWith(text, kAnyEndTag)) {
    after_block_ = false;
    state_ = State::kContent;
    return true;
  }
  Malformed("expected a call or the end of the block");
  state_ = State::kSkip;
  return true;
}

bool CompletionParser::StepHeader(CompletionDelta& out) {
  std::string_view header;
  if (!TakeHeader(buffer_, header)) {
    if (buffer_.size() < kMaxHeaderBytes) return false;
    Malformed("a call without an end to its name");
    state_ = State::kSkip;
    return true;
  }
  const size_t end = header.data() + header.size() - buffer_.data();
  if (!TakePrefix(header, "name=\"")) {
    Malformed("a call without a name");
    state_ = State::kSkip;
    return true;
  }
  call_name_ = std::string(header);
  parameters_.clear();
  ++num_calls_;
  ToolCallDelta& call = Call(out);
  call.starts = true;
  call.name = call_name_;
  call.arguments += '{';
  buffer_.erase(0, end + 2);
  state_ = State::kParameters;
  return true;
}

bool CompletionParser::StepParameters(CompletionDelta& out) {
  buffer_.erase(0, std::min(buffer_.find_first_not_of(kWhiteSpace), buffer_.size()));
  if (buffer_.empty()) return false;
  const std::string_view text = buffer_;
  if (text.substr(0, kParameterStart.size()) == kParameterStart) {
    buffer_.erase(0, kParameterStart.size());
    state_ = State::kParameterHeader;
    return true;
  }
  const bool ended = text.substr(0, kInvokeEnd.size()) == kInvokeEnd;
  if (!ended && (CouldStartWith(text, kParameterStart) || CouldStartWith(text, kInvokeEnd))) return false;
  if (!ended) Malformed("expected a parameter or the end of the call");
  Call(out).arguments += "}";
  if (ended) buffer_.erase(0, kInvokeEnd.size());
  state_ = ended ? State::kCalls : State::kSkip;
  return true;
}

bool CompletionParser::StepParameterHeader(CompletionDelta& out) {
  std::string_view header;
  if (!TakeHeader(buffer_, header) && buffer_.size() < kMaxHeaderBytes) return false;
  const size_t end = header.data() + header.size() - buffer_.data();
  bool readable = TakePrefix(header, "name=\"");
  std::string name(header);
  value_is_string_ = true;
  // From the back, so that a name may hold anything.
  constexpr std::string_view kType = "\" string=\"";
  if (const size_t type = header.rfind(kType); type != std::string_view::npos) {
    const std::string_view flag = header.substr(type + kType.size());
    readable = readable && (flag == "true" || flag == "false");
    value_is_string_ = flag != "false";
    name = std::string(header.substr(0, type));
  }
  if (!readable) {
    Malformed("a parameter without a name or type");
    Call(out).arguments += "}";
    state_ = State::kSkip;
    return true;
  }
  value_is_dropped_ = std::find(parameters_.begin(), parameters_.end(), name) != parameters_.end();
  if (value_is_dropped_) {
    Malformed("a parameter given twice");
  } else {
    ToolCallDelta& call = Call(out);
    call.arguments += Concat(parameters_.empty() ? "" : ", ", QuotePythonString(name), ": ");
    if (value_is_string_) call.arguments += '"';
    parameters_.push_back(std::move(name));
  }
  buffer_.erase(0, end + 2);
  scanned_ = 0;
  state_ = State::kValue;
  return true;
}

bool CompletionParser::StepValue(CompletionDelta& out) {
  const size_t end = buffer_.find(kParameterEnd, scanned_);
  const bool ended = end != std::string::npos;
  if (value_is_string_ || value_is_dropped_) {
    const size_t take = ended ? end : buffer_.size() - PartialMatch(buffer_, kParameterEnd);
    if (!value_is_dropped_) {
      const std::string quoted = QuotePythonString(std::string_view(buffer_).substr(0, take));
      if (take > 0) Call(out).arguments += quoted.substr(1, quoted.size() - 2);
      if (ended) Call(out).arguments += '"';
    }
    buffer_.erase(0, ended ? end + kParameterEnd.size() : take);
  } else if (ended) {
    // JSON goes out as it came; what is not JSON becomes a string, so that the arguments always are.
    const std::string_view value = std::string_view(buffer_).substr(0, end);
    const bool is_json = ParseJson(value).ok();
    Call(out).arguments += is_json ? std::string(value) : QuotePythonString(value);
    buffer_.erase(0, end + kParameterEnd.size());
  } else {
    // Whole values only: start the next search where an end tag could begin.
    scanned_ = buffer_.size() - PartialMatch(buffer_, kParameterEnd);
  }
  if (ended) state_ = State::kParameters;
  return ended;
}

bool CompletionParser::StepSkip() {
  const size_t end = buffer_.find(kBlockEnd);
  if (end == std::string::npos) {
    buffer_.erase(0, buffer_.size() - PartialMatch(buffer_, kBlockEnd));
    return false;
  }
  buffer_.erase(0, end + kBlockEnd.size());
  after_block_ = true;
  state_ = State::kContent;
  return true;
}

void CompletionParser::EmitText(std::string_view text, CompletionDelta& out) {
  if (after_block_) {
    const size_t start = text.find_first_not_of(kWhiteSpace);
    if (start == std::string_view::npos) return;
    text.remove_prefix(start);
    after_block_ = false;
  }
  (state_ == State::kReasoning ? out.reasoning : out.content).append(text);
}

// The delta of the current call.
ToolCallDelta& CompletionParser::Call(CompletionDelta& out) {
  const int index = num_calls_ - 1;
  if (out.tool_calls.empty() || out.tool_calls.back().index != index) {
    out.tool_calls.emplace_back();
    out.tool_calls.back().index = index;
  }
  return out.tool_calls.back();
}

void CompletionParser::Malformed(std::string_view what) {
  if (!status_.ok()) return;
  const std::string where = num_calls_ == 0 ? "tool call" : Concat("tool call ", num_calls_ - 1, " (", call_name_, ")");
  status_ = absl::InvalidArgumentError(Concat(where, ": ", what));
}

}  // namespace millrace::text
