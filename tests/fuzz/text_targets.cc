// SPDX-License-Identifier: Apache-2.0
// What becomes tokens, and what tokens become.
#include "engine/status.h"
#include "engine/text/chat_encoding.h"
#include "engine/text/completion_parser.h"
#include "engine/text/detokenizer.h"
#include "engine/text/python_json.h"
#include "engine/text/tokenizer.h"
#include "engine/text/utf8.h"
#include "tests/fuzz/targets.h"

namespace millrace::fuzz {
namespace {

const text::Tokenizer& DemoTokenizer() {
  static const text::Tokenizer* tokenizer = [] {
    auto loaded = text::Tokenizer::Load("deploy/demo/model/tokenizer.json", 1536);
    CHECK(loaded.ok(), std::string(loaded.status().message()));
    return loaded->release();
  }();
  return *tokenizer;
}

// Text comes back as it went in, repaired; streamed it is the same text; and plain text yields no control token.
void TokenizerRoundTrip(std::string_view input) {
  for (const auto special : {text::SpecialTokens::kPlain, text::SpecialTokens::kMatch}) {
    const auto ids = DemoTokenizer().Encode(input, special);
    CHECK(ids.ok(), std::string(ids.status().message()));
    const std::string repaired = text::RepairUtf8(input);
    CHECK(DemoTokenizer().Decode(*ids, /*skip_special=*/false) == repaired, "another text came back");
    text::Detokenizer streamed(DemoTokenizer(), /*skip_special=*/false);
    std::string pieces;
    for (const int32_t id : *ids) {
      if (special == text::SpecialTokens::kPlain) CHECK(!DemoTokenizer().IsAdded(id), "text became an added token");
      pieces += streamed.Push(id);
      CHECK(text::IsValidUtf8(pieces), "a character was cut");
    }
    CHECK(pieces + streamed.Finish() == repaired, "streamed, it is another text");
  }
}

std::vector<std::string> TextSeeds() {
  return {"Hello world, 123456 and 苍鹭 🏠\n\n  x", "<｜User｜>Hi<｜Assistant｜></think>", "\xF0\x9F\x8F",
          "\xC0\x80\xFF", "a\xCC\x81\xCC\x82 ^^^^ \t\r\n"};
}

void ChatEncoding(std::string_view input) {
  const auto request = text::ParseJson(input, 64);
  if (!request.ok()) return;
  for (const bool strict : {false, true}) {
    text::ChatOptions options;
    options.strict = strict;
    const auto resolved = text::ResolveChatOptions(*request, options);
    const auto prompt = text::EncodeChatRequest(*request, resolved.ok() ? *resolved : options);
    if (!prompt.ok()) continue;
    const auto ids = text::PromptIds(*prompt, DemoTokenizer());
    CHECK(ids.ok() || absl::IsFailedPrecondition(ids.status()), std::string(ids.status().message()));
  }
}

std::vector<std::string> ChatSeeds() {
  return {
      R"([{"role":"user","content":"Hi"}])",
      R"({"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"},{"role":"assistant","content":"a",)"
      R"("reasoning_content":"r","tool_calls":[{"id":"1","function":{"name":"f","arguments":"{\"a\":[1,2.5,null]}"}}]},)"
      R"({"role":"tool","tool_call_id":"1","content":"t"},{"role":"developer","content":"d"}],"tools":[{"type":)"
      R"("function","function":{"name":"f","description":"d","parameters":{"type":"object"}}}],"thinking":{"type":)"
      R"("enabled"},"reasoning_effort":"max"})"};
}

struct Parsed {
  std::string reasoning, content;
  std::vector<std::pair<std::string, std::string>> calls;
  bool operator==(const Parsed&) const = default;
  void Add(const text::CompletionDelta& delta) {
    reasoning += delta.reasoning;
    content += delta.content;
    for (const auto& call : delta.tool_calls) {
      CHECK(call.index >= 0 && static_cast<size_t>(call.index) <= calls.size(), "a call out of order");
      if (static_cast<size_t>(call.index) == calls.size()) {
        CHECK(call.starts, "a call that nobody started");
        calls.emplace_back(call.name, "");
      }
      calls[call.index].second += call.arguments;
    }
  }
};

// The first byte: thinking, tools, and the length of the pieces. However the text is cut, the parts are the same.
void CompletionParser(std::string_view input) {
  if (input.empty()) return;
  const auto how = static_cast<unsigned char>(input[0]);
  const text::ParserOptions options{.thinking = (how & 1) != 0, .parse_tools = (how & 2) != 0};
  const std::string_view text = input.substr(1);
  text::CompletionParser at_once(options), in_pieces(options);
  Parsed whole, pieces;
  whole.Add(at_once.Push(text));
  whole.Add(at_once.Finish());
  const size_t step = 1 + (how >> 2) % 16;
  for (size_t at = 0; at < text.size(); at += step) pieces.Add(in_pieces.Push(text.substr(at, step)));
  pieces.Add(in_pieces.Finish());
  CHECK(whole == pieces, "the parts depend on how the text was cut");
}

std::vector<std::string> CompletionSeeds() {
  const std::string call =
      "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" "
      "string=\"true\">Delhi</｜DSML｜parameter>\n<｜DSML｜parameter name=\"n\" string=\"false\">[1, "
      "2]</｜DSML｜parameter>\n"
      "</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
  return {"\x03" + std::string("thoughts</think>answer") + call, "\x02" + call + "after", "\x06 a < b </think> c"};
}

}  // namespace

std::vector<Target> TextTargets() {
  return {{"tokenizer", TokenizerRoundTrip, TextSeeds},
          {"chat_encoding", ChatEncoding, ChatSeeds},
          {"completion_parser", CompletionParser, CompletionSeeds}};
}

}  // namespace millrace::fuzz
