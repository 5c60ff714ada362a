// SPDX-License-Identifier: Apache-2.0
// See sse.h.
#include "services/router/sse.h"

namespace millrace::router {

std::string SseEvent(std::string_view json) {
  std::string event;
  event.reserve(json.size() + 8);
  event.append("data: ").append(json).append("\n\n");
  return event;
}

HttpResponse SseHead() {
  HttpResponse head{.content_type = "text/event-stream; charset=utf-8"};
  head.headers.emplace_back("Cache-Control", "no-cache");
  head.headers.emplace_back("X-Accel-Buffering", "no");  // nginx would collect events
  return head;
}

}  // namespace millrace::router
