// SPDX-License-Identifier: Apache-2.0
// What whoever loads a model says once about keys of its config.json that would have code run or files fetched.
//
// They are inert here, always; the sentence is for the reader who expected otherwise. Thread: any.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace millrace {

// Empty if there is nothing to say.
inline std::string IgnoredKeysNotice(const std::vector<std::string>& ignored_keys) {
  if (ignored_keys.empty()) return "";
  return absl::StrCat("config.json: ignored ", absl::StrJoin(ignored_keys, ", "),
                      ": nothing that a checkpoint names is executed or fetched");
}

}  // namespace millrace
