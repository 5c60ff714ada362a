// SPDX-License-Identifier: Apache-2.0
// One client connection. Private to the HTTP server.
//
//   [kHandshake -->] kIdle --first byte--> kHead --empty line--> kBody --last byte--> kReplying --last byte written-->
//   kIdle
//                 any error or timeout --> kFailing (the answer leaves, input is discarded) --> kLingering --> kClosed
//
// One read is pending in every phase, also while replying: it is the only prompt way to see a client hang up. What it
// reads then is the next, pipelined, request; beyond max_read_ahead_bytes it waits and TCP holds the client back. The
// price is that such a client's hang-up is seen only when a write fails.
//
// Its beginning and its ends are http_connection.cc, requests http_connection_read.cc, replies
// http_connection_write.cc, and what the handler holds meanwhile http_exchange.h.
//
// Thread: Start, CloseIfIdle, Close and OnStrand: any. Everything else: the connection's strand.
#pragma once

#include <array>
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "services/router/http_server.h"

namespace millrace::router {

class ConnectionExchange;

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

class HttpConnection : public std::enable_shared_from_this<HttpConnection> {
 public:
  // `socket` is accepted and has a strand for executor. `tls_context` null: plain. `on_end` runs once, in the
  // destructor.
  HttpConnection(std::shared_ptr<HttpShared> shared, boost::asio::ip::tcp::socket socket,
                 std::shared_ptr<boost::asio::ssl::context> tls_context, std::function<void()> on_end);
  ~HttpConnection();

  void Start();
  void CloseIfIdle();
  void Close();

 private:
  friend class ConnectionExchange;
  using ErrorCode = boost::system::error_code;
  using Clock = std::chrono::steady_clock;
  using RequestParser = boost::beast::http::request_parser<boost::beast::http::string_body>;

  static constexpr size_t kReadBytes = 16u << 10;

  enum class Phase { kHandshake, kIdle, kHead, kBody, kReplying, kFailing, kLingering, kClosed };

  // Keeps the connection alive for the call; the strand orders it.
  template <typename F>
  void OnStrand(F function) {
    if (shared_->stopped.load(std::memory_order_acquire)) return;
    boost::asio::post(socket_.get_executor(),
                      [self = shared_from_this(), function = std::move(function)]() mutable { function(); });
  }

  void ConfigureSocket();
  void Handshake();

  // Reading.
  void BeginRequest();
  void Read();
  void OnRead(ErrorCode error, size_t bytes);
  void ReadHead();
  void TakeHead();
  void ReadBody();
  bool AccountBody(size_t bytes);
  void ReleaseBody();
  void ArmReadTimer(std::chrono::milliseconds timeout);
  void OnReadTimer();
  absl::Status BodyTooLarge() const;

  // Answering.
  void Dispatch();
  HttpExchange::Callbacks EndExchange();  // as they were; none without an exchange
  void Fail(const absl::Status& status);
  void Send(std::string_view bytes);
  void SendNext();
  void SendRest();
  void OnSent(ErrorCode error, size_t bytes);
  size_t buffered() const { return unsent_.size() + sending_.size() - sent_; }
  void CheckSlowReader();
  void OnSlowReader();
  void ArmWriteTimer();
  void OnReplySent();

  // Ending.
  void Linger();
  void ShutdownSend();
  void Shut();

  const std::shared_ptr<HttpShared> shared_;  // first: the io_context outlives what is bound to it
  const HttpLimits& limits_;
  boost::asio::ip::tcp::socket socket_;
  const std::shared_ptr<boost::asio::ssl::context> tls_context_;                // null: plain
  std::optional<boost::asio::ssl::stream<boost::asio::ip::tcp::socket&>> tls_;  // over socket_, from the handshake on
  boost::asio::steady_timer read_timer_, write_timer_, exchange_timer_;
  std::function<void()> on_end_;
  Phase phase_ = Phase::kIdle;

  std::array<char, kReadBytes> read_buffer_;
  bool read_pending_ = false;
  bool input_ended_ = false;
  std::string input_;  // received, not parsed
  bool skipped_empty_line_ = false;
  std::unique_ptr<RequestParser> parser_;
  Clock::time_point body_start_;
  size_t raw_body_bytes_ = 0;  // with chunk framing
  size_t accounted_body_bytes_ = 0;
  size_t lingered_bytes_ = 0;

  HttpRequest request_;
  bool is_http11_ = true;
  bool keep_alive_ = false;
  std::shared_ptr<ConnectionExchange> exchange_;

  std::string sending_;  // being written, from sent_ on
  size_t sent_ = 0;
  std::string unsent_;
  bool last_bytes_queued_ = false;  // of this reply
  bool over_soft_limit_ = false;
};

}  // namespace millrace::router
