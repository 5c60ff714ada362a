// SPDX-License-Identifier: Apache-2.0
// Ends a stream of text at the first stop string, and never lets out a part of one.
//
// Text that could be the start of a stop string waits until it is certain. The match that completes first wins; of
// several that complete at the same byte, the longest. So the result does not depend on how the text was cut.
//
// Thread: one stream, one thread.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace millrace::text {

class StopMatcher {
 public:
  // Empty strings are ignored. Costs O(number of strings) per byte.
  explicit StopMatcher(std::vector<std::string> stops);

  // The part of the text so far that is certain to be before any stop string and was not returned yet. After a match
  // this is everything before it, then always empty.
  std::string Push(std::string_view text);

  // The end of the stream: what was still waiting, since nothing can complete it. Empty after a match.
  std::string Finish();

  bool stopped() const { return matched_ >= 0; }
  // The stop string that matched; only if stopped().
  const std::string& matched() const { return stops_[matched_].text; }

 private:
  struct Stop {
    std::string text;
    std::vector<size_t> fallback;  // Knuth-Morris-Pratt: longest proper border of each prefix
    size_t progress = 0;           // how much of `text` the stream ends with
  };

  std::vector<Stop> stops_;
  std::string held_;  // the end of the stream that may belong to a stop string
  int matched_ = -1;
};

}  // namespace millrace::text
