// SPDX-License-Identifier: Apache-2.0
// An HTTP/1.1 listener: bytes on one side, whole requests and replies or streams on the other.
//
// It knows nothing of OpenAI: routes, JSON and events are the handler's. It owns what makes a public port safe to leave
// open: limits (http_limits.h), timeouts, one framing per request, bounded buffers in both directions, and telling the
// handler at once when a client hangs up, which is why a read stays pending while a reply is made.
//
// Thread: the server runs its own threads. Each connection lives on a strand of them; the handler and every callback of
// an exchange run there, so the state of one request needs no lock. They must not block.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/common/metrics.h"
#include "services/router/http_limits.h"

namespace millrace::router {

class HttpTls;

struct HttpRequest {
  std::string method;
  std::string target;                                        // as received
  std::string path;                                          // of the target, before '?', not decoded
  std::vector<std::pair<std::string, std::string>> headers;  // names in lower case, in order
  std::string body;
  std::chrono::steady_clock::time_point received_at;  // when its last byte had arrived

  // The first header of that name (lower case).
  std::optional<std::string_view> Header(std::string_view name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";  // empty: no such header
  std::vector<std::pair<std::string, std::string>> headers;
  std::string body;
};

// One request being answered: either Respond once, or StartStream, Write ..., EndStream.
//
// Everything but Post must be called on the connection's strand. Once the client is gone all of it does nothing, so
// that a handler need not check.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;

  // Runs `function` on the strand, in the order posted. Any thread. Dropped once the server has stopped.
  virtual void Post(std::function<void()> function) = 0;

  // The handler no longer holds the request's body, which counts against a budget that all connections share.
  virtual void BodyConsumed() = 0;

  virtual void Respond(HttpResponse response) = 0;

  // `head.body` is ignored. Chunked for HTTP/1.1; HTTP/1.0 clients get plain bytes until the end.
  virtual void StartStream(HttpResponse head) = 0;
  // Queues bytes. One write is in flight at a time; what is queued meanwhile leaves together.
  virtual void Write(std::string_view bytes) = 0;
  // With `close` the connection ends too: nothing on it can be trusted to be complete.
  virtual void EndStream(bool close) = 0;
  // Forgets what is queued but not yet being sent, to make room for a last word to a slow reader.
  virtual void DropUnsent() = 0;

  // What the handler wants to know while it answers; cleared when the exchange ends, after which none is called.
  struct Callbacks {
    std::function<void()> on_gone;              // the client hung up, or the server stops
    std::function<void(bool paused)> on_pause;  // over the soft write limit; under half of it again
    std::function<void()> on_slow_reader;       // it did not help: say so and end the stream
    std::function<void()> on_timer;
  };
  virtual void SetCallbacks(Callbacks callbacks) = 0;
  // Calls on_timer once after `delay`; replaces the one before.
  virtual void SetTimer(std::chrono::milliseconds delay) = 0;
};

// Looks at the head of a request that has a body, before any of the body is read; an error is the answer, and the end
// of the connection. On the connection's strand.
using HttpGate = std::function<absl::Status(const HttpRequest& head)>;

using HttpHandler = std::function<void(HttpRequest request, std::shared_ptr<HttpExchange> exchange)>;

struct HttpServerOptions {
  std::string address = "127.0.0.1";
  uint16_t port = 0;  // 0: any free one
  int threads = 2;
  HttpLimits limits;
  HttpGate gate;                   // empty: none
  std::shared_ptr<HttpTls> tls;    // null: plain
  HttpMetrics* metrics = nullptr;  // may be null; must outlive the server
};

// A fresh id for a request: "req-" and 24 hex digits, unpredictable.
std::string NewRequestId();

class HttpServer {
 public:
  // Errors: Unavailable when the address cannot be bound, InvalidArgument when it is none.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(HttpServerOptions options, HttpHandler handler);
  // Stops at once: open exchanges see on_gone.
  ~HttpServer();

  uint16_t port() const;

  // Stops accepting and closes idle connections; replies under way go on and their connections close after them.
  void BeginDrain();
  int num_connections() const;

 private:
  class Impl;
  explicit HttpServer(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace millrace::router
