// SPDX-License-Identifier: Apache-2.0
// From checked messages to the prompt: private to the encoder.
//
// Everything the model reads besides the messages' own words is a literal in chat_render.cc. Only such literals become
// control tokens; a message's text never does. Reading is chat_messages.h, the rules over the list chat_encoding.cc.
//
// Thread: any; pure functions.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include "engine/text/chat_encoding.h"
#include "engine/text/chat_messages.h"

namespace millrace::text::chat {

// Grows a prompt; neighbouring texts become one segment.
class PromptBuilder {
 public:
  void Control(std::string_view token);
  void Text(std::string_view text);
  // Text of the encoder's own, in which markup is markup.
  void Literal(std::string_view text);
  Prompt Finish();

 private:
  Prompt prompt_;
};

// The last message that starts an answer, or -1.
int LastUserIndex(const std::vector<Message>& messages);

// Renders messages from `first` on. Those before it are seen by the rules only. No message may be a tool's: they are
// merged into user turns. `drop_thinking`: reasoning before the last user message is left out.
Prompt Render(const std::vector<Message>& messages, const ChatOptions& options, bool drop_thinking, size_t first,
              bool with_bos);

}  // namespace millrace::text::chat
