// SPDX-License-Identifier: Apache-2.0
// Whether a request to the operator's listener comes from where its own pages and tools come from.
//
// A browser inside the network sends what any web page asks it to. Keys hold off nobody where none are configured, and
// a name that its owner points at our address (DNS rebinding) makes such a page same-origin, so that it may read and
// post. What it cannot change is the Host and the Origin that the browser writes. So a Host must be an address, a name
// of loopback, or a name that the configuration knows; and an Origin must be that Host, or such a name.
//
// Thread: any; a pure function.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "services/router/http_server.h"

namespace millrace::router {

// `names`: hosts without ports, compared without case. Errors: unknown_host (421), foreign_origin (403).
absl::Status CheckOperatorAccess(const HttpRequest& request, const std::vector<std::string>& names);

}  // namespace millrace::router
