// SPDX-License-Identifier: Apache-2.0
// What of a choice's tokens a client sees under each tool_choice, however the text falls into tokens.
#include "services/router/choice_text.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "engine/text/tokenizer.h"

namespace millrace::router {
namespace {

constexpr char kCall[] =
    "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\" string=\"true\">"
    "Rome</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";

class ChoiceTextTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = text::Tokenizer::Load("deploy/demo/model/tokenizer.json", 1536);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
  }

  struct Seen {
    std::string content, reasoning;
    int calls = 0;
    size_t call_deltas = 0;
    bool readable = true;
  };
  Seen Show(const ApiRequest& request, const std::vector<int32_t>& ids) const {
    Seen seen;
    ChoiceText text(request, *tokenizer_);
    const auto take = [&](const text::CompletionDelta& delta) {
      seen.content += delta.content;
      seen.reasoning += delta.reasoning;
      seen.call_deltas += delta.tool_calls.size();
    };
    for (const int32_t id : ids) take(text.Push(id));
    take(text.Finish());
    seen.calls = text.num_tool_calls();
    seen.readable = text.tool_calls_readable();
    return seen;
  }
  // The ids of `text` cut in two before each of its characters: every place where a token may begin.
  std::vector<std::vector<int32_t>> EverySplit(const std::string& text) const {
    std::vector<std::vector<int32_t>> splits;
    for (size_t at = 0; at < text.size(); ++at) {
      if ((text[at] & 0xC0) == 0x80) continue;  // inside a character
      std::vector<int32_t> ids = *tokenizer_->Encode(text.substr(0, at), text::SpecialTokens::kMatch);
      const std::vector<int32_t> rest = *tokenizer_->Encode(text.substr(at), text::SpecialTokens::kMatch);
      ids.insert(ids.end(), rest.begin(), rest.end());
      splits.push_back(std::move(ids));
    }
    return splits;
  }
  static ApiRequest Chat(ToolMarkup markup, bool thinking = false) {
    ApiRequest request;
    request.is_chat = true;
    request.tool_markup = markup;
    request.thinking = thinking;
    return request;
  }

  std::unique_ptr<text::Tokenizer> tokenizer_;
};

TEST_F(ChoiceTextTest, DroppedMarkupShowsNothingWhereverATokenBegins) {
  const std::string text = std::string("Let me look.\n\n") + kCall + "\nDone.";
  for (const auto& ids : EverySplit(text)) {
    const Seen seen = Show(Chat(ToolMarkup::kDropped), ids);
    EXPECT_EQ(seen.calls, 0);
    EXPECT_EQ(seen.call_deltas, 0u);
    EXPECT_TRUE(seen.readable) << "nobody asked for the call";
    EXPECT_EQ(seen.content, "Let me look.Done.");
  }
}

TEST_F(ChoiceTextTest, DroppedMarkupThatIsCutOffShowsNothingOfItself) {
  const std::string text = std::string("Yes.\n\n") + kCall;
  const std::vector<int32_t> ids = *tokenizer_->Encode(text, text::SpecialTokens::kMatch);
  const size_t plain = tokenizer_->Encode("Yes.", text::SpecialTokens::kMatch)->size();
  for (size_t length = plain; length <= ids.size(); ++length) {
    const Seen seen = Show(Chat(ToolMarkup::kDropped), {ids.begin(), ids.begin() + static_cast<ptrdiff_t>(length)});
    EXPECT_EQ(seen.content.find("DSML"), std::string::npos) << length;
    EXPECT_EQ(seen.content.substr(0, 4), "Yes.") << length;
    EXPECT_EQ(seen.call_deltas, 0u);
  }
}

TEST_F(ChoiceTextTest, DroppedMarkupInReasoningShowsNothingEither) {
  const std::string text = std::string("I could") + kCall + "</think>No.";
  for (const auto& ids : EverySplit(text)) {
    const Seen seen = Show(Chat(ToolMarkup::kDropped, /*thinking=*/true), ids);
    EXPECT_EQ(seen.reasoning.find("DSML"), std::string::npos);
    EXPECT_EQ(seen.call_deltas, 0u);
  }
}

TEST_F(ChoiceTextTest, TheSameMarkupIsACallOrTextWhereThatWasAskedFor) {
  const std::vector<int32_t> ids = *tokenizer_->Encode(kCall, text::SpecialTokens::kMatch);
  const Seen call = Show(Chat(ToolMarkup::kCalls), ids);
  EXPECT_EQ(call.calls, 1);
  EXPECT_EQ(call.content, "");
  const Seen text = Show(Chat(ToolMarkup::kText), ids);
  EXPECT_EQ(text.calls, 0);
  EXPECT_EQ(text.content, kCall);
}

}  // namespace
}  // namespace millrace::router
