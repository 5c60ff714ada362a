// SPDX-License-Identifier: Apache-2.0
// The files of the status page, embedded at build time from status_page/.
//
// The page is a frame without data; it asks GET / for JSON, as curl would, and the operator's own completions for the
// prompt. Nothing in it comes from elsewhere, and the policy it is served with lets nothing. Thread: any; constants.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace millrace::router {

struct EmbeddedFile {
  std::string_view path;  // as requested: "/page/style.css"
  std::string_view content_type;
  std::string_view content;
};

// index.html first.
absl::Span<const EmbeddedFile> StatusPageFiles();

// Scripts, styles and requests from the page's own origin and nothing else; not in a frame; types as declared.
inline constexpr std::pair<std::string_view, std::string_view> kStatusPageHeaders[] = {
    {"Content-Security-Policy",
     "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
     "form-action 'self'; frame-ancestors 'none'"},
    {"X-Content-Type-Options", "nosniff"},
    {"Referrer-Policy", "no-referrer"},
    {"Cross-Origin-Resource-Policy", "same-origin"},
    {"Cache-Control", "no-cache"},
};

}  // namespace millrace::router
