// SPDX-License-Identifier: Apache-2.0
// One client connection, as http_server.cc sees it. Private to the HTTP server; the state machine is in the .cc file,
// the only one that includes Beast.
//
// Thread: methods post to the connection's strand and may be called from any thread.
#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <memory>

#include "services/router/http_server.h"

namespace millrace::router {

// What the connections of a server share. It outlives every connection, and connections that a slow sink still holds
// outlive the server: sockets and timers need their io_context to the last.
struct HttpShared {
  explicit HttpShared(HttpServerOptions server_options, HttpHandler server_handler)
      : options(std::move(server_options)), handler(std::move(server_handler)) {}

  boost::asio::io_context io;
  HttpServerOptions options;
  HttpHandler handler;
  std::atomic<bool> draining{false};
  std::atomic<bool> stopped{false};
  std::atomic<size_t> body_bytes{0};  // of requests being read or answered
};

class HttpConnection {
 public:
  virtual ~HttpConnection() = default;
  virtual void Start() = 0;
  virtual void CloseIfIdle() = 0;
  virtual void Close() = 0;
};

// `socket` is accepted and has a strand for executor. `tls` null: plain. `on_end` runs once, when the connection is
// destroyed.
std::shared_ptr<HttpConnection> MakeHttpConnection(std::shared_ptr<HttpShared> shared,
                                                   boost::asio::ip::tcp::socket socket,
                                                   std::shared_ptr<boost::asio::ssl::context> tls,
                                                   std::function<void()> on_end);

// The bytes of a reply without a body stream: head and body. `head_only` for HEAD.
std::string FormatHttpResponse(const HttpResponse& response, bool keep_alive, bool head_only);

}  // namespace millrace::router
