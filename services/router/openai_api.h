// SPDX-License-Identifier: Apache-2.0
// The routes of both listeners, and what every request passes before it is one: media types, request ids, deadlines,
// limits on how many there are.
//
// Public: POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /v1/models/{id}, GET /healthz,
// GET /readyz. Operator: GET / (status, the page or JSON), GET /page/FILE, GET /requests, GET /requests/ID (explain),
// GET /metrics, GET /healthz, GET /readyz, POST /workers/NAME/drain, and POST /v1/chat/completions for the page's
// prompt. Anything else is 404. The tables are http_routes.cc.
//
// Thread: any; handlers run on the server's strands, long parsing on threads of its own.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "services/common/metrics.h"
#include "services/common/request_trace.h"
#include "services/router/api_keys.h"
#include "services/router/generation.h"
#include "services/router/http_server.h"
#include "services/router/openai_request.h"

namespace millrace::router {

struct OpenAiApiOptions {
  ServedModel model;
  ApiLimits limits;
  GenerationService* generations = nullptr;        // must outlive the servers
  const prometheus::Registry* registry = nullptr;  // for /metrics; must outlive the servers
  TraceLog* traces = nullptr;             // where requests' time is recorded; must outlive the servers; may be null
  std::vector<std::string> metric_names;  // sets of other servers' names that /metrics has too
  HttpMetrics* metrics = nullptr;         // must outlive the servers
  std::string version;                    // "millrace 0.1.0", in the status
  std::function<Json()> status;           // what the status page shows; any thread; may be empty
  // Asks a worker to drain, for the operator's POST /workers/NAME/drain; NotFound: there is no such worker. Any thread.
  std::function<absl::Status(const std::string& name)> drain_worker;
  // Names under which the operator's listener is reached, besides addresses and those of loopback (operator_access.h).
  std::vector<std::string> operator_hosts;
  // Who may use the public routes but health, and the operator's POSTs; must outlive the servers. Null: everybody.
  ApiKeys* keys = nullptr;
  int parse_threads = 1;
  // Browsers on this origin may call the API ("*": any). Empty: none, which keeps web pages away from a server on
  // loopback.
  std::string cors_allow_origin;
};

class OpenAiApi {
 public:
  explicit OpenAiApi(OpenAiApiOptions options);
  // After the servers that use its handlers.
  ~OpenAiApi();

  HttpHandler PublicHandler();
  // With keys: no body is read of whom they do not let in. Without: empty.
  HttpGate PublicGate();
  HttpHandler OperatorHandler();

  // From now on /readyz says no and new generation requests get 503.
  void BeginDrain();
  // Generation requests not yet answered.
  int num_requests() const;

 private:
  class Core;
  std::shared_ptr<Core> core_;
};

}  // namespace millrace::router
