// SPDX-License-Identifier: Apache-2.0
// What reads bytes that somebody else wrote, one function per reader, for a fuzzer or a replay to call.
//
// A target must not crash, hang, leak or run into undefined behaviour on any input, and CHECKs what must hold of what
// it accepted: limits, round trips, agreement with another reader. Seeds are good inputs, built by the project's own
// encoders, so that mutations start where parsing goes deep; digests are sealed anew by the targets where a mutation
// could never get past them.
//
// Thread: one at a time.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace millrace::fuzz {

struct Target {
  std::string_view name;
  void (*run)(std::string_view input);
  std::vector<std::string> (*seeds)();
};

std::vector<Target> FrontTargets();  // HTTP heads, JSON, OpenAI requests, gRPC requests
std::vector<Target> TextTargets();   // tokenizer, chat encoding, completion parser
std::vector<Target> FileTargets();   // safetensors, config.json, tokenizer.json, the cluster's document
std::vector<Target> WireTargets();   // expert rows, extent headers, manifests, worker requests
std::vector<Target> AllTargets();

}  // namespace millrace::fuzz
