// SPDX-License-Identifier: Apache-2.0
// One Knuth-Morris-Pratt automaton per stop string, stepped byte by byte. What must be held back is the longest
// progress of any of them.
#include "engine/text/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace millrace::text {

StopMatcher::StopMatcher(std::vector<std::string> stops) {
  for (std::string& text : stops) {
    if (text.empty()) continue;
    std::vector<size_t> fallback(text.size() + 1, 0);
    for (size_t i = 1, border = 0; i < text.size(); ++i) {
      while (border > 0 && text[i] != text[border]) border = fallback[border];
      if (text[i] == text[border]) ++border;
      fallback[i + 1] = border;
    }
    stops_.push_back({std::move(text), std::move(fallback)});
  }
}

std::string StopMatcher::Push(std::string_view text) {
  if (stopped()) return "";
  for (size_t i = 0; i < text.size(); ++i) {
    held_.push_back(text[i]);
    for (size_t s = 0; s < stops_.size(); ++s) {
      Stop& stop = stops_[s];
      while (stop.progress > 0 && stop.text[stop.progress] != text[i]) stop.progress = stop.fallback[stop.progress];
      if (stop.text[stop.progress] == text[i]) ++stop.progress;
      if (stop.progress < stop.text.size()) continue;
      if (!stopped() || stop.text.size() > matched().size()) matched_ = static_cast<int>(s);
    }
    if (stopped()) {
      held_.resize(held_.size() - matched().size());
      return std::exchange(held_, std::string());
    }
  }
  size_t keep = 0;
  for (const Stop& stop : stops_) keep = std::max(keep, stop.progress);
  std::string certain = held_.substr(0, held_.size() - keep);
  held_.erase(0, certain.size());
  return certain;
}

std::string StopMatcher::Finish() { return std::exchange(held_, std::string()); }

}  // namespace millrace::text
