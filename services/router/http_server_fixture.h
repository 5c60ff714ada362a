// SPDX-License-Identifier: Apache-2.0
// A server for the tests of HTTP, with short timeouts and a handler that echoes what it understood, so that a test sees
// what got through. /hold and /flood leave the exchange to the test.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/test_wait.h"
#include "services/router/http_server.h"
#include "services/router/http_test_client.h"

namespace millrace::router {

inline constexpr char kGet[] = "GET /x HTTP/1.1\r\nHost: a\r\n\r\n";

inline std::string Post(const std::string& body) {
  return absl::StrCat("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: ", body.size(), "\r\n\r\n", body);
}

class HttpServerTest : public ::testing::Test {
 protected:
  void StartServer(HttpLimits limits = ShortLimits()) {
    HttpServerOptions options;
    options.limits = limits;
    auto server = HttpServer::Start(options, [this](HttpRequest request, std::shared_ptr<HttpExchange> exchange) {
      Handle(std::move(request), std::move(exchange));
    });
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  static HttpLimits ShortLimits() {
    HttpLimits limits;
    limits.header_timeout = limits.body_idle_timeout = std::chrono::milliseconds(400);
    limits.body_rate_grace = std::chrono::milliseconds(300);
    limits.linger_timeout = std::chrono::milliseconds(200);
    limits.slow_reader_timeout = std::chrono::milliseconds(500);
    return limits;
  }

  void Handle(HttpRequest request, std::shared_ptr<HttpExchange> exchange) {
    ++requests_;
    if (request.path == "/hold" || request.path == "/flood") {
      HttpExchange::Callbacks callbacks;
      callbacks.on_gone = [this] { ++gone_; };
      callbacks.on_pause = [this](bool paused) { (paused ? paused_ : resumed_) += 1; };
      callbacks.on_slow_reader = [this, exchange] {
        ++slow_;
        exchange->DropUnsent();
        exchange->Write("last word");
        exchange->EndStream(true);
      };
      exchange->SetCallbacks(std::move(callbacks));
      exchange->StartStream({.content_type = "text/plain"});
      const std::lock_guard lock(mutex_);
      held_ = exchange;
      return;
    }
    const auto length = request.Header("content-length");
    exchange->Respond({.body = absl::StrCat(request.method, " ", request.path, " ", request.body.size(), " ",
                                            request.body.substr(0, 100), length ? "" : " no-length")});
  }

  std::shared_ptr<HttpExchange> Held() {
    for (int i = 0; i < 2000; ++i) {
      {
        const std::lock_guard lock(mutex_);
        if (held_) return std::exchange(held_, nullptr);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return nullptr;
  }

  // Asks for a stream and writes more to it than kernel buffers take. Null: the request did not get through.
  std::shared_ptr<HttpExchange> Flood(TestClient& client) {
    client.Send("GET /flood HTTP/1.1\r\nHost: a\r\n\r\n");
    std::shared_ptr<HttpExchange> exchange = Held();
    if (exchange == nullptr) return nullptr;
    exchange->Post([exchange] {
      for (int i = 0; i < 80; ++i) exchange->Write(std::string(100'000, 'f'));
    });
    return exchange;
  }

  uint16_t port() const { return server_->port(); }

  // The whole exchange of one byte string on a connection of its own.
  TestReply Ask(const std::string& bytes) {
    TestClient client(port());
    client.Send(bytes);
    return client.Read();
  }

  static std::string CodeOf(const TestReply& reply) {
    const auto json = nlohmann::json::parse(reply.body, nullptr, false);
    return json.is_object() && json.contains("error") ? json["error"]["code"].get<std::string>() : reply.body;
  }

  std::mutex mutex_;
  std::shared_ptr<HttpExchange> held_;
  std::atomic<int> requests_{0}, gone_{0}, paused_{0}, resumed_{0}, slow_{0};
  std::unique_ptr<HttpServer> server_;
};

}  // namespace millrace::router
