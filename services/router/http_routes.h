// SPDX-License-Identifier: Apache-2.0
// The routes of both listeners, as tables, and the match of a request with them.
//
// Paths are compared as they came, so no spelling of one route reaches another. What a route does is openai_api.cc.
//
// Thread: any; pure functions.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "services/router/http_server.h"

namespace millrace::router {

struct Route {
  enum Kind {
    kChat,
    kCompletions,
    kModels,
    kModel,
    kHealth,
    kReady,
    kMetrics,
    kStatus,
    kPage,
    kRequests,
    kRequest,
    kDrain
  };
  std::string_view method;
  std::string_view path;  // a '*' stands for one or more bytes, whatever they are
  Kind kind;
  std::string_view name;  // in metrics
};

// The listener that a request came to.
enum class Listener { kPublic, kOperator };

struct RouteMatch {
  const Route* route = nullptr;           // null: none takes this method on this path
  std::vector<std::string_view> methods;  // that this path takes; empty: there is no such path
  std::string name;                       // what '*' stands for, %XX undone; empty if that is malformed
};

// HEAD finds the routes of GET.
RouteMatch MatchRoute(Listener listener, const HttpRequest& request);

}  // namespace millrace::router
