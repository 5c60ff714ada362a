// SPDX-License-Identifier: Apache-2.0
// See openai_response.h. Key order follows OpenAI's own replies.
#include "services/router/openai_response.h"

#include <algorithm>
#include <utility>

#include "engine/text/concat.h"
#include "engine/text/utf8.h"

namespace millrace::router {
namespace {

// JSON has no infinity; this is what OpenAI sends for "never".
constexpr double kLowestLogprob = -9999.0;

double FiniteLogprob(float logprob) { return std::max(static_cast<double>(logprob), kLowestLogprob); }

Json ChatToken(int32_t id, float logprob, const text::Tokenizer& tokenizer) {
  const std::string_view bytes = tokenizer.TokenBytes(id);
  Json list = Json::array();
  for (const unsigned char byte : bytes) list.push_back(byte);
  return {{"token", text::RepairUtf8(bytes)}, {"logprob", FiniteLogprob(logprob)}, {"bytes", std::move(list)}};
}

// A token of the older format is a string; one that is half a character is spelt out, as OpenAI does.
std::string PlainToken(int32_t id, const text::Tokenizer& tokenizer) {
  const std::string_view bytes = tokenizer.TokenBytes(id);
  if (text::IsValidUtf8(bytes)) return std::string(bytes);
  std::string spelt = "bytes:";
  for (const unsigned char byte : bytes) {
    constexpr char kHex[] = "0123456789abcdef";
    spelt += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
  }
  return spelt;
}

int64_t CountCharacters(std::string_view bytes) {
  return std::count_if(bytes.begin(), bytes.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

Json ToolCallJson(const ReplyChoice::ToolCall& call) {
  return {
      {"id", call.id}, {"type", "function"}, {"function", Json{{"name", call.name}, {"arguments", call.arguments}}}};
}

Json UsageJson(const ReplyUsage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens},
          {"completion_tokens", usage.completion_tokens},
          {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
          {"prompt_tokens_details", Json{{"cached_tokens", usage.cached_tokens}}},
          {"completion_tokens_details", Json{{"reasoning_tokens", usage.reasoning_tokens}}}};
}

}  // namespace

ReplyWriter::ReplyWriter(bool is_chat, std::string id, std::string model, int64_t created_unix_s, bool include_usage)
    : is_chat_(is_chat),
      id_(std::move(id)),
      model_(std::move(model)),
      created_unix_s_(created_unix_s),
      include_usage_(include_usage) {}

Json ReplyWriter::Envelope(std::string_view object) const {
  return {{"id", id_}, {"object", object}, {"created", created_unix_s_}, {"model", model_}};
}

std::string ReplyWriter::Chunk(int32_t index, Json body, std::string_view finish_reason, Json logprobs) const {
  Json choice{{"index", index}};
  if (is_chat_) {
    choice["delta"] = std::move(body);
  } else {
    choice["text"] = std::move(body);
  }
  choice["logprobs"] = std::move(logprobs);
  choice["finish_reason"] = finish_reason.empty() ? Json(nullptr) : Json(finish_reason);
  Json chunk = Envelope(is_chat_ ? "chat.completion.chunk" : "text_completion");
  chunk["choices"] = Json::array({std::move(choice)});
  if (include_usage_) chunk["usage"] = nullptr;
  return DumpJson(chunk);
}

std::string ReplyWriter::RoleChunk(int32_t index) const {
  return Chunk(index, {{"role", "assistant"}, {"content", ""}}, "", nullptr);
}

std::string ReplyWriter::DeltaChunk(int32_t index, const text::CompletionDelta& delta,
                                    const std::vector<std::string>& call_ids, Json logprobs) const {
  if (!is_chat_) return Chunk(index, delta.content, "", std::move(logprobs));
  Json body = Json::object();
  if (!delta.reasoning.empty()) body["reasoning_content"] = delta.reasoning;
  if (!delta.content.empty()) body["content"] = delta.content;
  for (const auto& call : delta.tool_calls) {
    Json entry{{"index", call.index}};
    if (call.starts) {
      entry["id"] = call_ids[call.index];
      entry["type"] = "function";
      entry["function"] = Json{{"name", call.name}, {"arguments", call.arguments}};
    } else {
      entry["function"] = Json{{"arguments", call.arguments}};
    }
    body["tool_calls"].push_back(std::move(entry));
  }
  return Chunk(index, std::move(body), "", std::move(logprobs));
}

std::string ReplyWriter::FinishChunk(int32_t index, std::string_view finish_reason, Json logprobs) const {
  return Chunk(index, is_chat_ ? Json::object() : Json(""), finish_reason, std::move(logprobs));
}

std::string ReplyWriter::UsageChunk(const ReplyUsage& usage) const {
  Json chunk = Envelope(is_chat_ ? "chat.completion.chunk" : "text_completion");
  chunk["choices"] = Json::array();
  chunk["usage"] = UsageJson(usage);
  return DumpJson(chunk);
}

std::string ReplyWriter::Whole(const std::vector<ReplyChoice>& choices, const ReplyUsage& usage) const {
  Json reply = Envelope(is_chat_ ? "chat.completion" : "text_completion");
  Json list = Json::array();
  for (const auto& choice : choices) {
    Json entry{{"index", choice.index}};
    if (is_chat_) {
      // Content is null only where a call stands in for it.
      const bool only_calls = choice.content.empty() && !choice.tool_calls.empty();
      Json message{{"role", "assistant"}, {"content", only_calls ? Json(nullptr) : Json(choice.content)}};
      message["refusal"] = nullptr;
      if (!choice.reasoning.empty()) message["reasoning_content"] = choice.reasoning;
      for (const auto& call : choice.tool_calls) message["tool_calls"].push_back(ToolCallJson(call));
      entry["message"] = std::move(message);
    } else {
      entry["text"] = choice.content;
    }
    entry["logprobs"] = choice.logprobs;
    entry["finish_reason"] = choice.finish_reason;
    list.push_back(std::move(entry));
  }
  reply["choices"] = std::move(list);
  reply["usage"] = UsageJson(usage);
  return DumpJson(reply);
}

Json ReplyWriter::LogprobsJson(const std::vector<GeneratedToken>& tokens, const text::Tokenizer& tokenizer,
                               int64_t& text_offset) const {
  if (is_chat_) {
    Json content = Json::array();
    for (const auto& token : tokens) {
      Json entry = ChatToken(token.id, token.logprob, tokenizer);
      Json top = Json::array();
      for (const auto& other : token.top_logprobs) top.push_back(ChatToken(other.id, other.logprob, tokenizer));
      entry["top_logprobs"] = std::move(top);
      content.push_back(std::move(entry));
    }
    return {{"content", std::move(content)}, {"refusal", nullptr}};
  }
  Json names = Json::array(), logprobs = Json::array(), tops = Json::array(), offsets = Json::array();
  for (const auto& token : tokens) {
    names.push_back(PlainToken(token.id, tokenizer));
    logprobs.push_back(FiniteLogprob(token.logprob));
    Json top = Json::object();
    for (const auto& other : token.top_logprobs) top[PlainToken(other.id, tokenizer)] = FiniteLogprob(other.logprob);
    tops.push_back(std::move(top));
    offsets.push_back(text_offset);
    text_offset += CountCharacters(tokenizer.TokenBytes(token.id));
  }
  return {{"tokens", std::move(names)},
          {"token_logprobs", std::move(logprobs)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

std::string DumpJson(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

}  // namespace millrace::router
