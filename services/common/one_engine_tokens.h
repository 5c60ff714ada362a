// SPDX-License-Identifier: Apache-2.0
// What one process answers: the reference that tests of hand-offs and of worker roles compare token by token, the demo
// model that they serve and prompts for it.
//
// For tests only, no production code includes it. Thread: the caller's, which owns `engine` meanwhile.
#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "engine/status.h"
#include "services/common/generation_spec.h"

namespace millrace {

// Opened once a process.
inline std::shared_ptr<const Checkpoint> DemoCheckpoint() {
  static const auto* checkpoint = [] {
    auto opened = Checkpoint::Open("deploy/demo/model");
    CHECK(opened.ok(), std::string(opened.status().message()));
    return new std::shared_ptr<const Checkpoint>(*std::move(opened));
  }();
  return *checkpoint;
}

// Ordinary tokens of the demo model in an order that `seed` fixes.
inline std::vector<int32_t> PromptFrom(uint32_t seed, int64_t length) {
  std::vector<int32_t> ids(length);
  uint32_t x = seed;
  for (int32_t& id : ids) {
    x = x * 1664525 + 1013904223;
    id = static_cast<int32_t>(3 + (x >> 8) % 1200);
  }
  return ids;
}

// Index, id and the bits of the log-probability of every token: equal texts are equal answers, without a tolerance.
inline std::string DescribeTokens(const std::vector<v1::Token>& tokens) {
  std::string text;
  for (const v1::Token& token : tokens) {
    absl::StrAppend(&text, token.index(), ":", token.id(), ":", absl::Hex(std::bit_cast<uint32_t>(token.logprob())),
                    " ");
  }
  return text;
}

// The request in one engine: the prompt in one pass, then a token at a time. CHECK-fails if the engine refuses.
inline std::vector<v1::Token> OneEngineTokens(Engine& engine, const std::vector<int32_t>& prompt,
                                              const v1::GenerationSpec& spec) {
  const auto sequence = engine.NewSequence(CacheTokens(static_cast<int64_t>(prompt.size()), spec));
  CHECK(sequence.ok(), std::string(sequence.status().message()));
  TokenDraw draw(spec, prompt);
  std::vector<int32_t> next = prompt;
  std::vector<v1::Token> tokens;
  for (bool more = true; more;) {
    Chunk chunk{*sequence, next, {}, &draw.Request()};
    const auto outputs = engine.Forward({&chunk, 1});
    CHECK(outputs.ok(), std::string(outputs.status().message()));
    more = draw.Accept((*outputs)[0].sampled, tokens.emplace_back()) == v1::FINISH_REASON_UNSPECIFIED;
    next = {draw.last_id()};
  }
  engine.Release(*sequence);
  return tokens;
}

}  // namespace millrace
