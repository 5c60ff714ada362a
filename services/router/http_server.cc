// SPDX-License-Identifier: Apache-2.0
// Accepting connections within limits, and stopping. What happens on a connection is http_connection.cc.
#include "services/router/http_server.h"

#include <openssl/rand.h>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/error.h"
#include "services/common/http_status.h"
#include "services/router/http_connection.h"
#include "services/router/http_format.h"
#include "services/router/http_tls.h"

namespace millrace::router {

namespace asio = boost::asio;
using boost::system::error_code;

std::optional<std::string_view> HttpRequest::Header(std::string_view name) const {
  for (const auto& [field, value] : headers) {
    if (field == name) return value;
  }
  return std::nullopt;
}

std::string NewRequestId() {
  unsigned char bytes[12];
  CHECK(RAND_bytes(bytes, sizeof bytes) == 1);
  return absl::StrCat("req-", absl::BytesToHexString({reinterpret_cast<const char*>(bytes), sizeof bytes}));
}

class HttpServer::Impl : public std::enable_shared_from_this<HttpServer::Impl> {
 public:
  Impl(HttpServerOptions options, HttpHandler handler)
      : shared_(std::make_shared<HttpShared>(std::move(options), std::move(handler))),
        strand_(asio::make_strand(shared_->io)),
        acceptor_(strand_),
        retry_timer_(strand_) {}

  absl::Status Listen() {
    const HttpServerOptions& options = shared_->options;
    error_code error;
    const auto address = asio::ip::make_address(options.address, error);
    if (error)
      return absl::InvalidArgumentError(absl::StrCat("http listen address ", options.address, ": not an address"));
    const asio::ip::tcp::endpoint endpoint(address, options.port);
    const auto failed = [&](absl::string_view what) {
      return absl::UnavailableError(
          absl::StrCat("http listen ", options.address, ":", options.port, ": ", what, ": ", error.message()));
    };
    if (acceptor_.open(endpoint.protocol(), error)) return failed("socket");
    if (acceptor_.set_option(asio::socket_base::reuse_address(true), error)) return failed("reuse address");
    if (acceptor_.bind(endpoint, error)) return failed("bind");
    if (acceptor_.listen(asio::socket_base::max_listen_connections, error)) return failed("listen");
    port_ = acceptor_.local_endpoint(error).port();
    return absl::OkStatus();
  }

  void Run() {
    work_.emplace(shared_->io.get_executor());
    asio::post(strand_, [self = shared_from_this()] { self->Accept(); });
    for (int i = 0; i < std::max(1, shared_->options.threads); ++i) {
      threads_.emplace_back([this] {
        shared_->io.run();
        const std::lock_guard lock(mutex_);
        ++threads_done_;
        done_.notify_all();
      });
    }
  }

  uint16_t port() const { return port_; }

  int num_connections() const {
    const std::lock_guard lock(mutex_);
    return static_cast<int>(connections_.size());
  }

  void BeginDrain() {
    shared_->draining = true;
    CloseAcceptor();
    for (const auto& connection : Connections()) connection->CloseIfIdle();
  }

  // Lets every connection close itself, so that nothing is left inside the io_context that keeps it alive; the wait is
  // bounded because a handler that blocks would be a bug, and stopping must not depend on there being none.
  void Stop() {
    shared_->draining = true;
    CloseAcceptor();
    for (const auto& connection : Connections()) connection->Close();
    work_.reset();
    {
      std::unique_lock lock(mutex_);
      done_.wait_for(lock, std::chrono::seconds(5), [this] { return threads_done_ == threads_.size(); });
    }
    shared_->stopped = true;
    shared_->io.stop();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  void CloseAcceptor() {
    asio::post(strand_, [self = shared_from_this()] {
      error_code ignored;
      self->acceptor_.close(ignored);
      self->retry_timer_.cancel();
    });
  }

  std::vector<std::shared_ptr<HttpConnection>> Connections() {
    const std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<HttpConnection>> open;
    for (const auto& [id, weak] : connections_) {
      if (auto connection = weak.lock()) open.push_back(std::move(connection));
    }
    return open;
  }

  void Accept() {
    if (!acceptor_.is_open()) return;
    acceptor_.async_accept(asio::make_strand(shared_->io),
                           [self = shared_from_this()](error_code error, asio::ip::tcp::socket socket) {
                             self->OnAccept(error, std::move(socket));
                           });
  }

  void OnAccept(error_code error, asio::ip::tcp::socket socket) {
    if (!acceptor_.is_open()) return;
    if (!error) {
      Admit(std::move(socket));
      return Accept();
    }
    // Out of descriptors, most likely: connections wait in the kernel until some close.
    retry_timer_.expires_after(std::chrono::milliseconds(50));
    retry_timer_.async_wait([self = shared_from_this()](error_code cancelled) {
      if (!cancelled) self->Accept();
    });
  }

  void Admit(asio::ip::tcp::socket socket) {
    error_code error;
    const auto endpoint = socket.remote_endpoint(error);
    if (error) return;  // gone already
    const std::string address = endpoint.address().to_string();
    const HttpLimits& limits = shared_->options.limits;
    const char* refusal = nullptr;
    uint64_t id = 0;
    {
      const std::lock_guard lock(mutex_);
      if (connections_.size() >= limits.max_connections) {
        refusal = "too_many_connections";
      } else if (by_address_[address] >= limits.max_connections_per_address) {
        refusal = "too_many_connections_from_address";
      } else {
        ++by_address_[address];
        connections_[id = next_id_++] = {};
      }
    }
    if (refusal != nullptr) return Refuse(socket, refusal);
    const auto& tls = shared_->options.tls;
    auto connection =
        std::make_shared<HttpConnection>(shared_, std::move(socket), tls == nullptr ? nullptr : tls->Current(),
                                         [self = shared_from_this(), id, address] { self->OnEnd(id, address); });
    {
      const std::lock_guard lock(mutex_);
      connections_[id] = connection;
    }
    if (shared_->options.metrics) shared_->options.metrics->connections().Increment();
    connection->Start();
  }

  // One try to say why; a full socket buffer at accept does not happen, and waiting would defeat the limit.
  void Refuse(asio::ip::tcp::socket& socket, const char* reason) {
    if (shared_->options.metrics) shared_->options.metrics->CountConnectionRefused(reason);
    if (shared_->options.tls != nullptr) return;  // words would need a handshake, which is what there is no room for
    const HttpError refusal = ToHttpError(
        MakeError(absl::StatusCode::kUnavailable, "Too many connections.", {.code = reason, .retry_after_s = 1}));
    HttpResponse response{.status = refusal.http_status, .body = refusal.ToJson(NewRequestId())};
    response.headers.emplace_back("Retry-After", "1");
    error_code ignored;
    socket.non_blocking(true, ignored);
    socket.write_some(asio::buffer(FormatHttpResponse(response, false, false)), ignored);
    socket.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  }

  void OnEnd(uint64_t id, const std::string& address) {
    const std::lock_guard lock(mutex_);
    connections_.erase(id);
    if (--by_address_[address] == 0) by_address_.erase(address);
    if (shared_->options.metrics && !shared_->stopped) shared_->options.metrics->connections().Decrement();
  }

  const std::shared_ptr<HttpShared> shared_;
  asio::strand<asio::io_context::executor_type> strand_;
  asio::ip::tcp::acceptor acceptor_;
  asio::steady_timer retry_timer_;
  uint16_t port_ = 0;
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> work_;
  std::vector<std::thread> threads_;

  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable done_;
  size_t threads_done_ = 0;
  uint64_t next_id_ = 0;
  std::map<uint64_t, std::weak_ptr<HttpConnection>> connections_;
  std::map<std::string, size_t> by_address_;
};

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(HttpServerOptions options, HttpHandler handler) {
  auto impl = std::make_shared<Impl>(std::move(options), std::move(handler));
  RETURN_IF_ERROR(impl->Listen());
  impl->Run();
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() { impl_->Stop(); }
uint16_t HttpServer::port() const { return impl_->port(); }
void HttpServer::BeginDrain() { impl_->BeginDrain(); }
int HttpServer::num_connections() const { return impl_->num_connections(); }

}  // namespace millrace::router
