// SPDX-License-Identifier: Apache-2.0
// See http_routes.h.
#include "services/router/http_routes.h"

#include <optional>

#include "absl/types/span.h"

namespace millrace::router {
namespace {

constexpr Route kPublicRoutes[] = {
    {"POST", "/v1/chat/completions", Route::kChat, "/v1/chat/completions"},
    {"POST", "/v1/completions", Route::kCompletions, "/v1/completions"},
    {"GET", "/v1/models", Route::kModels, "/v1/models"},
    {"GET", "/v1/models/*", Route::kModel, "/v1/models/{id}"},
    {"GET", "/healthz", Route::kHealth, "/healthz"},
    {"GET", "/readyz", Route::kReady, "/readyz"},
};
constexpr Route kOperatorRoutes[] = {
    {"GET", "/", Route::kStatus, "/"},
    {"GET", "/page/*", Route::kPage, "/page"},
    {"GET", "/requests", Route::kRequests, "/requests"},
    {"GET", "/requests/*", Route::kRequest, "/requests/{id}"},
    // For the status page, so that no other origin need be allowed.
    {"POST", "/v1/chat/completions", Route::kChat, "/v1/chat/completions"},
    {"POST", "/workers/*/drain", Route::kDrain, "/workers/{name}/drain"},
    {"GET", "/metrics", Route::kMetrics, "/metrics"},
    {"GET", "/healthz", Route::kHealth, "/healthz"},
    {"GET", "/readyz", Route::kReady, "/readyz"},
};

// What the pattern's '*' stands for in `path`, "" if it has none; nothing if they do not match.
std::optional<std::string_view> Match(std::string_view pattern, std::string_view path) {
  const size_t star = pattern.find('*');
  if (star == std::string_view::npos) return pattern == path ? std::optional<std::string_view>("") : std::nullopt;
  const std::string_view before = pattern.substr(0, star), after = pattern.substr(star + 1);
  if (path.size() <= before.size() + after.size() || path.substr(0, before.size()) != before ||
      path.substr(path.size() - after.size()) != after) {
    return std::nullopt;
  }
  return path.substr(before.size(), path.size() - before.size() - after.size());
}

// Bytes of a path segment with %XX undone; empty if malformed, which no name is. Only ever compared with names.
std::string PercentDecode(std::string_view text) {
  std::string decoded;
  const auto hex = [](char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
  };
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      decoded += text[i];
      continue;
    }
    if (i + 2 >= text.size() || hex(text[i + 1]) < 0 || hex(text[i + 2]) < 0) return "";
    decoded += static_cast<char>(hex(text[i + 1]) * 16 + hex(text[i + 2]));
    i += 2;
  }
  return decoded;
}

}  // namespace

RouteMatch MatchRoute(Listener listener, const HttpRequest& request) {
  const absl::Span<const Route> routes =
      listener == Listener::kPublic ? absl::MakeConstSpan(kPublicRoutes) : absl::MakeConstSpan(kOperatorRoutes);
  RouteMatch match;
  for (const Route& route : routes) {
    const auto name = Match(route.path, request.path);
    if (!name) continue;
    match.methods.push_back(route.method);
    if (route.method != request.method && !(route.method == "GET" && request.method == "HEAD")) continue;
    match.route = &route;
    match.name = PercentDecode(*name);
  }
  return match;
}

}  // namespace millrace::router
