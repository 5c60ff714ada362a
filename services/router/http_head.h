// SPDX-License-Identifier: Apache-2.0
// The gate before the HTTP parser: is this the head of an unambiguous HTTP/1.x request, within limits?
//
// Beast parses what passes. The gate exists for what a tolerant parser lets through and a server behind proxies must
// not (two framings in one request, folded lines, unknown transfer codings read as "no body") and for answers finer
// than "bad request". It looks at bytes only and can be called with half a head, so that a flood is refused before it
// ends.
//
// Thread: any; a pure function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "absl/status/statusor.h"
#include "services/router/http_limits.h"

namespace millrace::router {

struct HttpHead {
  size_t bytes = 0;  // through the empty line; 0: not complete yet
  bool chunked = false;
  std::optional<uint64_t> content_length;
  bool expects_continue = false;
};

// Checks what has arrived so far. `data` starts at a request line.
// Errors, each with an ApiError that carries the HTTP status: malformed_request_line, malformed_header, missing_host,
// ambiguous_framing, invalid_content_length (400), uri_too_long (414), headers_too_large (431),
// unsupported_expectation (417), unsupported_transfer_encoding (501), unsupported_http_version (505).
absl::StatusOr<HttpHead> CheckHttpHead(std::string_view data, const HttpLimits& limits);

}  // namespace millrace::router
