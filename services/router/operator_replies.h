// SPDX-License-Identifier: Apache-2.0
// What the operator's listener shows and does that the public one does not: the status and its page, requests
// explained, and draining a worker.
//
// Thread: any; pure functions of what they are given.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/common/request_trace.h"
#include "services/router/http_server.h"
#include "services/router/json_reader.h"

namespace millrace::router {

// The page for browsers, `status` for everything else.
HttpResponse StatusReply(const HttpRequest& request, const Json& status);

// A file of the page. NotFound: there is none of that path.
absl::StatusOr<HttpResponse> PageReply(std::string_view path);

// The latest requests, newest first. `traces` may be null.
HttpResponse RequestsReply(const TraceLog* traces);

// Where the time of one went. Errors: request_not_found.
absl::StatusOr<HttpResponse> ExplanationReply(const TraceLog* traces, const std::string& id);

// Asks `drain` for the worker. Errors: unsupported_media_type, worker_not_found, and drain's own.
absl::StatusOr<HttpResponse> DrainReply(const HttpRequest& request, const std::string& name,
                                        const std::function<absl::Status(const std::string& name)>& drain);

}  // namespace millrace::router
