// SPDX-License-Identifier: Apache-2.0
// The handler's end of one request. Detached (connection_ null) once the reply has left or the client has, after which
// everything but Post does nothing.
//
// Private to the HTTP server. Thread: Post any, everything else the connection's strand.
#pragma once

#include <memory>

#include "services/router/http_connection.h"

namespace millrace::router {

class ConnectionExchange : public HttpExchange, public std::enable_shared_from_this<ConnectionExchange> {
 public:
  ConnectionExchange(std::shared_ptr<HttpConnection> connection, bool head_only);

  void Post(std::function<void()> function) override;
  void BodyConsumed() override;
  void Respond(HttpResponse response) override;
  void StartStream(HttpResponse head) override;
  void Write(std::string_view bytes) override;
  void EndStream(bool close) override;
  void DropUnsent() override;
  void SetCallbacks(Callbacks callbacks) override;
  void SetTimer(std::chrono::milliseconds delay) override;

  // For the connection:
  // A callback may end the exchange and so clear itself: calls a copy.
  template <typename F, typename... Args>
  void Call(F Callbacks::*callback, Args... args) {
    if (const auto function = callbacks_.*callback) function(args...);
  }
  // Returns the callbacks as they were.
  Callbacks Detach();

 private:
  const std::shared_ptr<HttpConnection> home_;  // for its strand
  HttpConnection* connection_;
  const bool head_only_;
  bool started_ = false;
  bool streaming_ = false;
  bool chunked_ = false;
  Callbacks callbacks_;
};

}  // namespace millrace::router
