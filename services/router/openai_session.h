// SPDX-License-Identifier: Apache-2.0
// One generation request while it is being answered: n choices on the cluster's side, one reply or stream on the
// client's.
//
// Before the first byte an error is an HTTP status with a JSON body. After it the only honest thing left is an event
// `data: {"error":...}` and the end of the connection without [DONE]. Whatever happens, every generation started is
// finished or cancelled, and the session ends once.
//
// Thread: everything on the exchange's strand; the cluster's calls are posted to it.
#pragma once

#include <functional>
#include <memory>

#include "services/common/metrics.h"
#include "services/router/generation.h"
#include "services/router/http_limits.h"
#include "services/router/http_server.h"
#include "services/router/openai_request.h"

namespace millrace::router {

struct SessionContext {
  std::shared_ptr<HttpExchange> exchange;
  GenerationService* generations = nullptr;  // outlives the session
  HttpMetrics* metrics = nullptr;            // outlives the session
  const ServedModel* model = nullptr;        // outlives the session
  ApiLimits limits;
  std::string route;                                         // for the metric
  std::string request_id;                                    // in replies and errors
  std::string generation_id;                                 // unique, for the cluster
  std::vector<std::pair<std::string, std::string>> headers;  // of every reply to this request
  std::chrono::steady_clock::time_point received_at;
  std::chrono::steady_clock::time_point deadline;
  std::shared_ptr<RequestTrace> trace;  // of this request; may be null
  std::function<void()> on_end;         // once, on the strand or in the session's destructor
};

// Starts the generations and answers. Returns at once; the session lives until it has answered.
void StartSession(SessionContext context, ApiRequest request);

// The reply for an error before the first byte.
HttpResponse ErrorResponse(const absl::Status& status, const std::string& request_id,
                           const std::vector<std::pair<std::string, std::string>>& headers);

}  // namespace millrace::router
