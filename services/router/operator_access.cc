// SPDX-License-Identifier: Apache-2.0
// See operator_access.h.
#include "services/router/operator_access.h"

#include <arpa/inet.h>

#include <algorithm>
#include <string_view>

#include "absl/strings/match.h"
#include "absl/strings/strip.h"
#include "engine/text/concat.h"
#include "services/common/error.h"

namespace millrace::router {
namespace {

using text::AbslView;
using text::Concat;

// Quoted in errors; a Host may be as long as a header line.
constexpr size_t kMaxQuotedBytes = 100;

bool IsDigits(std::string_view text) { return text.find_first_not_of("0123456789") == std::string_view::npos; }

// The host of "host", "host:port" or "[IPv6]:port", without brackets, port and the root's dot; empty if it is none.
std::string HostOf(std::string_view authority) {
  std::string_view host = authority, port;
  if (authority.starts_with('[')) {
    const size_t end = authority.find(']');
    if (end == std::string_view::npos) return "";
    host = authority.substr(1, end - 1);
    port = authority.substr(end + 1);
  } else if (const size_t colon = authority.find(':'); colon != std::string_view::npos) {
    host = authority.substr(0, colon);
    port = authority.substr(colon);
    if (host.ends_with('.')) host.remove_suffix(1);
  } else if (host.ends_with('.')) {
    host.remove_suffix(1);
  }
  if (!port.empty() && (port.front() != ':' || !IsDigits(port.substr(1)))) return "";
  return std::string(host);
}

// No name can be made to mean another address than the one written.
bool IsAddress(const std::string& host) {
  in_addr v4{};
  in6_addr v6{};
  return inet_pton(AF_INET, host.c_str(), &v4) == 1 || inet_pton(AF_INET6, host.c_str(), &v6) == 1;
}

// RFC 6761: resolvers answer these by themselves.
bool IsLoopbackName(const std::string& host) {
  return absl::EqualsIgnoreCase(host, "localhost") || absl::EndsWithIgnoreCase(host, ".localhost");
}

bool IsAmong(const std::string& host, const std::vector<std::string>& names) {
  return std::any_of(names.begin(), names.end(),
                     [&](const std::string& name) { return absl::EqualsIgnoreCase(host, name); });
}

}  // namespace

absl::Status CheckOperatorAccess(const HttpRequest& request, const std::vector<std::string>& names) {
  const std::string_view authority = request.Header("host").value_or("");
  const std::string host = HostOf(authority);
  if (!IsAddress(host) && !IsLoopbackName(host) && !IsAmong(host, names)) {
    return MakeError(absl::StatusCode::kPermissionDenied,
                     Concat("The operator port does not answer to the host '", authority.substr(0, kMaxQuotedBytes),
                            "': use an address, localhost, or a name that router.operator_hosts lists."),
                     {.code = "unknown_host", .http_status = 421});
  }
  const auto origin = request.Header("origin");
  if (!origin) return absl::OkStatus();  // no browser, or a page of this listener that only reads
  absl::string_view from = AbslView(*origin);
  const bool is_web = absl::ConsumePrefix(&from, "http://") || absl::ConsumePrefix(&from, "https://");
  // Behind a proxy that writes its own Host the origin is the proxy's name, which is then listed.
  if (is_web &&
      (absl::EqualsIgnoreCase(from, AbslView(authority)) || IsAmong(HostOf({from.data(), from.size()}), names))) {
    return absl::OkStatus();
  }
  return MakeError(absl::StatusCode::kPermissionDenied,
                   Concat("The operator port takes nothing from pages of '", origin->substr(0, kMaxQuotedBytes),
                          "': only from its own, and those of hosts that router.operator_hosts lists."),
                   {.code = "foreign_origin"});
}

}  // namespace millrace::router
