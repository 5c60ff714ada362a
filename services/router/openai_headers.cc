// SPDX-License-Identifier: Apache-2.0
// See openai_headers.h.
#include "services/router/openai_headers.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/text/concat.h"
#include "services/common/error.h"

namespace millrace::router {

using text::AbslView;
using text::Concat;

namespace {

constexpr size_t kMaxIgnoredNames = 32;
constexpr size_t kMaxIgnoredNameBytes = 64;

}  // namespace

absl::Status CheckMediaType(const HttpRequest& request) {
  const auto unsupported = [](absl::string_view message) {
    return MakeError(absl::StatusCode::kInvalidArgument, message,
                     {.code = "unsupported_media_type", .http_status = 415});
  };
  const auto encoding = request.Header("content-encoding");
  if (encoding && !absl::EqualsIgnoreCase(AbslView(*encoding), "identity")) {
    return unsupported("Compressed request bodies are not supported.");
  }
  const auto type = request.Header("content-type");
  if (!type) return unsupported("Content-Type must be application/json.");
  const std::vector<std::string> parts = absl::StrSplit(AbslView(*type), ';');
  if (!absl::EqualsIgnoreCase(absl::StripAsciiWhitespace(parts[0]), "application/json")) {
    return unsupported("Content-Type must be application/json.");
  }
  for (size_t i = 1; i < parts.size(); ++i) {
    const std::string parameter = absl::AsciiStrToLower(absl::StripAsciiWhitespace(parts[i]));
    if (!absl::StartsWith(parameter, "charset=")) continue;
    if (parameter != "charset=utf-8" && parameter != "charset=\"utf-8\"") {
      return unsupported("The only charset is utf-8.");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadRequestId(const HttpRequest& request, const ApiLimits& limits) {
  const auto given = request.Header("x-request-id");
  if (!given) return NewRequestId();
  const bool printable = std::all_of(given->begin(), given->end(), [](char c) { return c > ' ' && c < 0x7f; });
  if (given->empty() || given->size() > limits.max_request_id_bytes || !printable) {
    return InvalidRequest("invalid_request_id", "x-request-id",
                          Concat("x-request-id: must have 1 to ", limits.max_request_id_bytes,
                                 " printable ASCII characters without spaces."));
  }
  return std::string(*given);
}

absl::StatusOr<std::chrono::milliseconds> ReadTimeout(const HttpRequest& request, const ApiLimits& limits) {
  const auto given = request.Header("x-request-timeout-ms");
  if (!given) return limits.default_timeout;
  int64_t timeout_ms = 0;
  const bool digits = !given->empty() && given->find_first_not_of("0123456789") == std::string_view::npos;
  if (!digits || given->size() > 10 || !absl::SimpleAtoi(AbslView(*given), &timeout_ms) || timeout_ms < 1) {
    return InvalidRequest("invalid_value", "x-request-timeout-ms",
                          "x-request-timeout-ms: expected a whole number of milliseconds, at least 1.");
  }
  return std::min(std::chrono::milliseconds(timeout_ms), limits.max_timeout);
}

std::string IgnoredHeader(std::vector<std::string> names) {
  const bool cut = names.size() > kMaxIgnoredNames;
  if (cut) names.resize(kMaxIgnoredNames);
  for (auto& name : names) {
    name.resize(std::min(name.size(), kMaxIgnoredNameBytes));
    for (char& c : name) {
      if (!absl::ascii_isalnum(c) && c != '_' && c != '-' && c != '.') c = '?';
    }
  }
  return absl::StrCat(absl::StrJoin(names, ", "), cut ? ", ..." : "");
}

}  // namespace millrace::router
