// SPDX-License-Identifier: Apache-2.0
// absl::StrCat that takes std::string_view: Debian builds Abseil with a string_view of its own, to which the standard
// one does not convert.
#pragma once

#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/absl_view.h"

namespace millrace::text {

using ::millrace::AbslView;

namespace internal {
inline absl::string_view ForStrCat(std::string_view text) { return AbslView(text); }
inline absl::string_view ForStrCat(const std::string& text) { return text; }
inline absl::string_view ForStrCat(const char* text) { return text; }
template <typename Number>
Number ForStrCat(Number number) {
  return number;
}
}  // namespace internal

template <typename... Parts>
std::string Concat(const Parts&... parts) {
  return absl::StrCat(internal::ForStrCat(parts)...);
}

}  // namespace millrace::text
