// SPDX-License-Identifier: Apache-2.0
// What the headers of a request say before its body is looked at: type, id and deadline; and the header that names what
// of the body was ignored.
//
// Thread: any; pure functions, but for fresh ids.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/router/http_limits.h"
#include "services/router/http_server.h"

namespace millrace::router {

// application/json, with no charset or UTF-8; nothing compressed. Else unsupported_media_type (415).
absl::Status CheckMediaType(const HttpRequest& request);

// The client's x-request-id, or one of ours. Errors: invalid_request_id.
absl::StatusOr<std::string> ReadRequestId(const HttpRequest& request, const ApiLimits& limits);

// x-request-timeout-ms within max_timeout, or the default. Errors: invalid_value.
absl::StatusOr<std::chrono::milliseconds> ReadTimeout(const HttpRequest& request, const ApiLimits& limits);

// x-ignored-params: names of fields, with whatever could break a header replaced.
std::string IgnoredHeader(std::vector<std::string> names);

}  // namespace millrace::router
