// SPDX-License-Identifier: Apache-2.0
// Server-sent events as OpenAI's clients read them: `data:` lines, comments to keep a quiet connection open, [DONE].
//
// Thread: pure functions.
#pragma once

#include <string>
#include <string_view>

#include "services/router/http_server.h"

namespace millrace::router {

// `json` is one line: the JSON writer escapes line ends.
std::string SseEvent(std::string_view json);
inline constexpr std::string_view kSseDone = "data: [DONE]\n\n";
inline constexpr std::string_view kSsePing = ": ping\n\n";

// The head of an event stream, not to be cached or buffered on its way.
HttpResponse SseHead();

}  // namespace millrace::router
