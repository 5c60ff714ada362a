// SPDX-License-Identifier: Apache-2.0
// The beginning of a connection, the start and the end of each exchange on it, and its ways to end.
#include "services/router/http_connection.h"

#include <netinet/tcp.h>

#include "absl/strings/str_cat.h"
#include "services/common/http_status.h"
#include "services/router/http_exchange.h"
#include "services/router/http_format.h"

namespace millrace::router {

namespace asio = boost::asio;

HttpConnection::HttpConnection(std::shared_ptr<HttpShared> shared, asio::ip::tcp::socket socket,
                               std::shared_ptr<asio::ssl::context> tls_context, std::function<void()> on_end)
    : shared_(std::move(shared)),
      limits_(shared_->options.limits),
      socket_(std::move(socket)),
      tls_context_(std::move(tls_context)),
      read_timer_(socket_.get_executor()),
      write_timer_(socket_.get_executor()),
      exchange_timer_(socket_.get_executor()),
      on_end_(std::move(on_end)) {}

HttpConnection::~HttpConnection() {
  ReleaseBody();
  on_end_();
}

void HttpConnection::Start() {
  OnStrand([this] {
    ConfigureSocket();
    if (tls_context_ != nullptr) return Handshake();
    BeginRequest();
  });
}

void HttpConnection::CloseIfIdle() {
  OnStrand([this] {
    if (phase_ == Phase::kIdle || phase_ == Phase::kHandshake) Shut();
  });
}

void HttpConnection::Close() {
  OnStrand([this] { Shut(); });
}

void HttpConnection::ConfigureSocket() {
  ErrorCode ignored;  // an option the kernel lacks costs promptness, not correctness
  socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
  const auto user_timeout = static_cast<unsigned>(limits_.tcp_user_timeout.count());
  ::setsockopt(socket_.native_handle(), IPPROTO_TCP, TCP_USER_TIMEOUT, &user_timeout, sizeof user_timeout);
}

void HttpConnection::Handshake() {
  phase_ = Phase::kHandshake;
  tls_.emplace(socket_, *tls_context_);
  ArmReadTimer(limits_.header_timeout);
  tls_->async_handshake(asio::ssl::stream_base::server, [self = shared_from_this()](ErrorCode error) {
    if (self->phase_ != Phase::kHandshake) return;
    if (error) return self->Shut();
    self->BeginRequest();
  });
}

void HttpConnection::Dispatch() {
  phase_ = Phase::kReplying;
  read_timer_.cancel();
  parser_.reset();
  request_.received_at = Clock::now();
  last_bytes_queued_ = over_soft_limit_ = false;
  exchange_ = std::make_shared<ConnectionExchange>(shared_from_this(), request_.method == "HEAD");
  shared_->handler(std::move(request_), exchange_);
}

HttpExchange::Callbacks HttpConnection::EndExchange() {
  exchange_timer_.cancel();
  ReleaseBody();
  const auto exchange = std::move(exchange_);
  return exchange == nullptr ? HttpExchange::Callbacks{} : exchange->Detach();
}

// An answer of the connection itself, to something that is no request. Framing is lost: it closes.
void HttpConnection::Fail(const absl::Status& status) {
  const HttpError error = ToHttpError(status);
  const std::string request_id = NewRequestId();
  HttpResponse response{.status = error.http_status, .body = error.ToJson(request_id)};
  response.headers.emplace_back("x-request-id", request_id);
  if (error.retry_after_s) response.headers.emplace_back("Retry-After", absl::StrCat(*error.retry_after_s));
  if (error.http_status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  if (shared_->options.metrics) shared_->options.metrics->CountRequest("unmatched", error.http_status);
  phase_ = Phase::kFailing;
  keep_alive_ = false;
  input_.clear();
  ReleaseBody();
  read_timer_.cancel();
  last_bytes_queued_ = true;
  Send(FormatHttpResponse(response, false, false));
}

// Closing with input unread would reset the connection and could take the answer with it.
void HttpConnection::Linger() {
  if (input_ended_) return Shut();
  phase_ = Phase::kLingering;
  input_.clear();
  ArmReadTimer(limits_.linger_timeout);
  if (tls_) {  // says that the end is the end, and not a cut
    tls_->async_shutdown([self = shared_from_this()](ErrorCode) { self->ShutdownSend(); });
  } else {
    ShutdownSend();
  }
  Read();
}

void HttpConnection::ShutdownSend() {
  ErrorCode ignored;
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
}

void HttpConnection::Shut() {
  if (phase_ == Phase::kClosed) return;
  phase_ = Phase::kClosed;
  ErrorCode ignored;
  socket_.close(ignored);
  read_timer_.cancel();
  write_timer_.cancel();
  input_.clear();
  unsent_.clear();
  const HttpExchange::Callbacks callbacks = EndExchange();
  if (callbacks.on_gone) callbacks.on_gone();
}

}  // namespace millrace::router
