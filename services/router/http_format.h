// SPDX-License-Identifier: Apache-2.0
// The bytes of replies. Thread: any; pure functions but for the Date header.
#pragma once

#include <string>

#include "services/router/http_server.h"

namespace millrace::router {

// Status line and headers, without framing and without the empty line that ends them.
std::string FormatHttpHead(const HttpResponse& response, bool keep_alive);

// A reply without a body stream: head and body. `head_only` for HEAD.
std::string FormatHttpResponse(const HttpResponse& response, bool keep_alive, bool head_only);

}  // namespace millrace::router
