// SPDX-License-Identifier: Apache-2.0
// The life of a connection: head, body, reply, again; and its ways to end.
//
//   [kHandshake -->] kIdle --first byte--> kHead --empty line--> kBody --last byte--> kReplying --last byte written-->
//   kIdle
//                 any error or timeout --> kFailing (the answer leaves, input is discarded) --> kLingering --> kClosed
//
// One read is pending in every phase, also while replying: it is the only prompt way to see a client hang up. What it
// reads then is the next, pipelined, request; beyond max_read_ahead_bytes it waits and TCP holds the client back. The
// price is that such a client's hang-up is seen only when a write fails.
//
// The gate (http_head.h) looks at a head first, then Beast parses it and the body; both must agree.
#include "services/router/http_connection.h"

#include <netinet/tcp.h>

#include <algorithm>
#include <array>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <cctype>
#include <ctime>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "services/common/error.h"
#include "services/common/http_status.h"
#include "services/router/http_head.h"

namespace millrace::router {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;
using RequestParser = http::request_parser<http::string_body>;

constexpr size_t kReadBytes = 16u << 10;
constexpr size_t kMaxLingerBytes = 256u << 10;
constexpr size_t kMaxChunkHeaderBytes = 8u << 10;

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

std::string HttpDate() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[40];
  const size_t length = std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &parts);
  return std::string(text, length);
}

std::string FormatHead(const HttpResponse& response, bool keep_alive) {
  std::string head = absl::StrCat("HTTP/1.1 ", response.status, " ", View(HttpReason(response.status)),
                                  "\r\nDate: ", HttpDate(), "\r\nConnection: ", keep_alive ? "keep-alive" : "close");
  if (!response.content_type.empty()) absl::StrAppend(&head, "\r\nContent-Type: ", response.content_type);
  for (const auto& [name, value] : response.headers) absl::StrAppend(&head, "\r\n", name, ": ", value);
  return head;
}

absl::Status Refuse(int http_status, std::string_view code, absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, message,
                   {.code = std::string(code), .http_status = http_status});
}

class Exchange;

class Connection : public HttpConnection, public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<HttpShared> shared, asio::ip::tcp::socket socket,
             std::shared_ptr<asio::ssl::context> tls_context, std::function<void()> on_end)
      : shared_(std::move(shared)),
        limits_(shared_->options.limits),
        socket_(std::move(socket)),
        tls_context_(std::move(tls_context)),
        read_timer_(socket_.get_executor()),
        write_timer_(socket_.get_executor()),
        exchange_timer_(socket_.get_executor()),
        on_end_(std::move(on_end)) {}

  ~Connection() override {
    ReleaseBody();
    on_end_();
  }

  void Start() override {
    OnStrand([this] {
      ConfigureSocket();
      if (tls_context_ != nullptr) return Handshake();
      BeginRequest();
    });
  }

  void CloseIfIdle() override {
    OnStrand([this] {
      if (phase_ == Phase::kIdle || phase_ == Phase::kHandshake) Shut();
    });
  }

  void Close() override {
    OnStrand([this] { Shut(); });
  }

 private:
  friend class Exchange;

  enum class Phase { kHandshake, kIdle, kHead, kBody, kReplying, kFailing, kLingering, kClosed };

  // Keeps the connection alive for the call; the strand orders it.
  template <typename F>
  void OnStrand(F function) {
    if (shared_->stopped.load(std::memory_order_acquire)) return;
    asio::post(socket_.get_executor(),
               [self = shared_from_this(), function = std::move(function)]() mutable { function(); });
  }

  void ConfigureSocket() {
    error_code ignored;  // an option the kernel lacks costs promptness, not correctness
    socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
    const auto user_timeout = static_cast<unsigned>(limits_.tcp_user_timeout.count());
    ::setsockopt(socket_.native_handle(), IPPROTO_TCP, TCP_USER_TIMEOUT, &user_timeout, sizeof user_timeout);
  }

  void Handshake() {
    phase_ = Phase::kHandshake;
    tls_.emplace(socket_, *tls_context_);
    ArmReadTimer(limits_.header_timeout);
    tls_->async_handshake(asio::ssl::stream_base::server, [self = shared_from_this()](error_code error) {
      if (self->phase_ != Phase::kHandshake) return;
      if (error) return self->Shut();
      self->BeginRequest();
    });
  }

  // ---- Reading.

  void BeginRequest() {
    phase_ = Phase::kIdle;
    parser_.reset();
    skipped_empty_line_ = false;
    if (input_.empty() && (shared_->draining || input_ended_)) return Shut();
    ArmReadTimer(limits_.keep_alive_timeout);
    if (!input_.empty()) ReadHead();
    Read();
  }

  void Read() {
    if (read_pending_ || input_ended_ || phase_ == Phase::kClosed) return;
    if (phase_ == Phase::kReplying && input_.size() >= limits_.max_read_ahead_bytes) return;
    read_pending_ = true;
    auto done = [self = shared_from_this()](error_code error, size_t bytes) { self->OnRead(error, bytes); };
    const auto space = asio::buffer(read_buffer_);
    if (tls_) return tls_->async_read_some(space, std::move(done));
    socket_.async_read_some(space, std::move(done));
  }

  void OnRead(error_code error, size_t bytes) {
    read_pending_ = false;
    if (phase_ == Phase::kClosed) return;
    if (error) {
      // Half a request needs no reply, and an answer still being made nobody to read it. One that is leaving goes on,
      // and so do requests pipelined before the client closed its half.
      input_ended_ = true;
      const bool answer_is_leaving = phase_ == Phase::kReplying && last_bytes_queued_;
      if (phase_ != Phase::kFailing && !answer_is_leaving) Shut();
      return;
    }
    if (phase_ == Phase::kFailing || phase_ == Phase::kLingering) {
      lingered_bytes_ += bytes;
      if (lingered_bytes_ > kMaxLingerBytes && phase_ == Phase::kLingering) return Shut();
      if (lingered_bytes_ > kMaxLingerBytes) return;
    } else {
      input_.append(read_buffer_.data(), bytes);
    }
    if (phase_ == Phase::kIdle || phase_ == Phase::kHead) {
      ReadHead();
    } else if (phase_ == Phase::kBody) {
      ReadBody();
    }
    Read();
  }

  void ReadHead() {
    if (!skipped_empty_line_ && input_.compare(0, 2, "\r\n") == 0) {  // RFC 9112 §2.2: some clients end a body so
      input_.erase(0, 2);
      skipped_empty_line_ = true;
    }
    if (input_.empty()) return;
    if (phase_ == Phase::kIdle) {
      phase_ = Phase::kHead;
      ArmReadTimer(limits_.header_timeout);
    }
    auto head = CheckHttpHead(input_, limits_);
    if (!head.ok()) return Fail(head.status());
    if (head->bytes == 0) return input_ended_ ? Shut() : void();
    if (head->content_length.value_or(0) > limits_.max_body_bytes) return Fail(BodyTooLarge());

    parser_ = std::make_unique<RequestParser>();
    parser_->header_limit(static_cast<std::uint32_t>(limits_.max_header_bytes + 1024));
    parser_->body_limit(limits_.max_body_bytes);
    error_code error;
    parser_->put(asio::buffer(input_.data(), head->bytes), error);
    if (error || !parser_->is_header_done()) {
      return Fail(Refuse(400, "malformed_header", "The request head is not valid HTTP."));
    }
    input_.erase(0, head->bytes);
    TakeHead();
    if (parser_->is_done()) return Dispatch();
    if (shared_->options.gate) {
      if (const absl::Status refusal = shared_->options.gate(request_); !refusal.ok()) return Fail(refusal);
    }

    if (head->expects_continue && input_.empty()) Send("HTTP/1.1 100 Continue\r\n\r\n");
    phase_ = Phase::kBody;
    parser_->eager(true);
    body_start_ = Clock::now();
    raw_body_bytes_ = 0;
    ReadBody();
  }

  // Names in lower case: nothing downstream can then tell Content-Length from content-length.
  void TakeHead() {
    request_ = HttpRequest{};
    const auto& message = parser_->get();
    request_.method = std::string(message.method_string());
    request_.target = std::string(message.target());
    is_http11_ = message.version() >= 11;
    keep_alive_ = parser_->keep_alive();
    std::string_view path = request_.target;
    if (path.substr(0, 7) == "http://" || path.substr(0, 8) == "https://") {  // absolute form
      const size_t slash = path.find('/', 8);
      path = slash == std::string_view::npos ? "/" : path.substr(slash);
    }
    request_.path = std::string(path.substr(0, path.find('?')));
    for (const auto& field : message) {
      std::string name(field.name_string());
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      request_.headers.emplace_back(std::move(name), std::string(field.value()));
    }
  }

  void ReadBody() {
    while (!input_.empty() && !parser_->is_done()) {
      error_code error;
      const size_t used = parser_->put(asio::buffer(input_), error);
      input_.erase(0, used);
      raw_body_bytes_ += used;
      if (error == http::error::need_more) break;
      if (error == http::error::body_limit) return Fail(BodyTooLarge());
      if (error) return Fail(Refuse(400, "malformed_body", "The chunked body is not valid HTTP."));
      if (used == 0) break;
    }
    const size_t body_bytes = parser_->get().body().size();
    if (!AccountBody(body_bytes)) {
      return Fail(MakeError(absl::StatusCode::kUnavailable, "Too many request bodies at once; try again later.",
                            {.code = "overloaded", .retry_after_s = 1}));
    }
    if (parser_->is_done()) {
      request_.body = std::move(parser_->get().body());
      return Dispatch();
    }
    if (input_.size() > kMaxChunkHeaderBytes)
      return Fail(Refuse(400, "malformed_body", "A chunk's header is too long."));
    if (raw_body_bytes_ > body_bytes + body_bytes / 2 + limits_.max_chunk_overhead_bytes) {
      return Fail(Refuse(413, "chunk_overhead", "The body comes in too many small chunks."));
    }
    const auto elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - body_start_);
    if (elapsed > limits_.body_rate_grace &&
        raw_body_bytes_ * 1000 < limits_.min_body_bytes_per_second * static_cast<size_t>(elapsed.count())) {
      return Fail(Timeout());
    }
    if (input_ended_) return Shut();
    ArmReadTimer(limits_.body_idle_timeout);
  }

  // Bodies of all connections share one budget.
  bool AccountBody(size_t bytes) {
    shared_->body_bytes += bytes - accounted_body_bytes_;
    accounted_body_bytes_ = bytes;
    return shared_->body_bytes <= limits_.max_body_bytes_total;
  }

  void ReleaseBody() {
    shared_->body_bytes -= accounted_body_bytes_;
    accounted_body_bytes_ = 0;
  }

  void ArmReadTimer(std::chrono::milliseconds timeout) {
    read_timer_.expires_after(timeout);
    read_timer_.async_wait([weak = weak_from_this()](error_code error) {
      if (auto self = weak.lock(); self && !error) self->OnReadTimer();
    });
  }

  void OnReadTimer() {
    if (read_timer_.expiry() > Clock::now()) return;  // armed again while this was on its way
    switch (phase_) {
      case Phase::kHandshake:
      case Phase::kIdle:
      case Phase::kLingering:
        return Shut();
      case Phase::kHead:
        return Fail(Refuse(408, "header_timeout", "The request header did not arrive in time."));
      case Phase::kBody:
        return Fail(Timeout());
      default:
        return;
    }
  }

  absl::Status Timeout() const { return Refuse(408, "body_timeout", "The request body did not arrive in time."); }
  absl::Status BodyTooLarge() const {
    return Refuse(413, "body_too_large", absl::StrCat("The body exceeds ", limits_.max_body_bytes, " bytes."));
  }

  // ---- Answering.

  void Dispatch();
  void EndExchange();

  // An answer of the connection itself, to something that is no request. Framing is lost: it closes.
  void Fail(const absl::Status& status) {
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

  void Send(std::string_view bytes) {
    if (phase_ == Phase::kClosed) return;
    unsent_.append(bytes);
    if (sending_.empty()) SendNext();
    if (last_bytes_queued_) {
      ArmWriteTimer();
    } else {
      CheckSlowReader();
    }
  }

  void SendNext() {
    sending_.swap(unsent_);
    unsent_.clear();
    sent_ = 0;
    SendRest();
  }

  void SendRest() {
    auto done = [self = shared_from_this()](error_code error, size_t bytes) { self->OnSent(error, bytes); };
    const auto rest = asio::buffer(sending_.data() + sent_, sending_.size() - sent_);
    if (tls_) return tls_->async_write_some(rest, std::move(done));
    socket_.async_write_some(rest, std::move(done));
  }

  void OnSent(error_code error, size_t bytes) {
    if (phase_ == Phase::kClosed) return;
    if (error) return Shut();
    sent_ += bytes;
    if (last_bytes_queued_) {
      ArmWriteTimer();  // progress
    } else {
      CheckSlowReader();
      if (phase_ == Phase::kClosed) return;
    }
    if (sent_ < sending_.size()) return SendRest();
    sending_.clear();
    if (!unsent_.empty()) return SendNext();
    if (last_bytes_queued_) OnReplySent();
  }

  size_t buffered() const { return unsent_.size() + sending_.size() - sent_; }

  void CheckSlowReader();
  void OnSlowReader();

  // While streaming the timer means "over the soft limit for too long"; after the last byte was queued, "no progress".
  void ArmWriteTimer() {
    write_timer_.expires_after(limits_.slow_reader_timeout);
    write_timer_.async_wait([weak = weak_from_this()](error_code error) {
      auto self = weak.lock();
      if (!self || error || self->write_timer_.expiry() > Clock::now()) return;
      if (self->last_bytes_queued_) {
        self->Shut();
      } else {
        self->OnSlowReader();
      }
    });
  }

  void OnReplySent() {
    last_bytes_queued_ = false;
    write_timer_.cancel();
    EndExchange();
    if (keep_alive_ && !shared_->draining) return BeginRequest();
    Linger();
  }

  // Closing with input unread would reset the connection and could take the answer with it.
  void Linger() {
    if (input_ended_) return Shut();
    phase_ = Phase::kLingering;
    input_.clear();
    ArmReadTimer(limits_.linger_timeout);
    if (tls_) {  // says that the end is the end, and not a cut
      tls_->async_shutdown([self = shared_from_this()](error_code) { self->ShutdownSend(); });
    } else {
      ShutdownSend();
    }
    Read();
  }

  void ShutdownSend() {
    error_code ignored;
    socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  }

  void Shut();

  const std::shared_ptr<HttpShared> shared_;  // first: the io_context outlives what is bound to it
  const HttpLimits& limits_;
  asio::ip::tcp::socket socket_;
  const std::shared_ptr<asio::ssl::context> tls_context_;         // null: plain
  std::optional<asio::ssl::stream<asio::ip::tcp::socket&>> tls_;  // over socket_, from the handshake on
  asio::steady_timer read_timer_, write_timer_, exchange_timer_;
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
  std::shared_ptr<Exchange> exchange_;

  std::string sending_;  // being written, from sent_ on
  size_t sent_ = 0;
  std::string unsent_;
  bool last_bytes_queued_ = false;  // of this reply
  bool over_soft_limit_ = false;
};

// The handler's end of one request. Detached (connection_ null) once the reply has left or the client has.
class Exchange : public HttpExchange, public std::enable_shared_from_this<Exchange> {
 public:
  Exchange(std::shared_ptr<Connection> connection, bool head_only)
      : home_(connection), connection_(connection.get()), head_only_(head_only) {}

  void Post(std::function<void()> function) override { home_->OnStrand(std::move(function)); }

  void Respond(HttpResponse response) override {
    if (!connection_ || started_) return;
    started_ = true;
    connection_->last_bytes_queued_ = true;
    connection_->keep_alive_ = connection_->keep_alive_ && !connection_->shared_->draining;
    connection_->Send(FormatHttpResponse(response, connection_->keep_alive_, head_only_));
  }

  void StartStream(HttpResponse head) override {
    if (!connection_ || started_) return;
    started_ = streaming_ = true;
    chunked_ = connection_->is_http11_;
    connection_->keep_alive_ = connection_->keep_alive_ && chunked_ && !connection_->shared_->draining;
    std::string bytes = FormatHead(head, connection_->keep_alive_);
    absl::StrAppend(&bytes, chunked_ ? "\r\nTransfer-Encoding: chunked" : "", "\r\n\r\n");
    connection_->Send(bytes);
  }

  void Write(std::string_view bytes) override {
    if (!connection_ || !streaming_ || bytes.empty()) return;
    if (!chunked_) return connection_->Send(bytes);
    connection_->Send(absl::StrCat(absl::Hex(bytes.size()), "\r\n", View(bytes), "\r\n"));
  }

  void EndStream(bool close) override {
    if (!connection_ || !streaming_) return;
    streaming_ = false;
    if (close) connection_->keep_alive_ = false;
    connection_->last_bytes_queued_ = true;
    if (chunked_) return connection_->Send("0\r\n\r\n");
    if (connection_->sending_.empty()) return connection_->OnReplySent();
    connection_->ArmWriteTimer();
  }

  void BodyConsumed() override {
    if (connection_) connection_->ReleaseBody();
  }

  void DropUnsent() override {
    if (connection_) connection_->unsent_.clear();
  }

  void SetCallbacks(Callbacks callbacks) override {
    if (connection_) callbacks_ = std::move(callbacks);
  }

  void SetTimer(std::chrono::milliseconds delay) override {
    if (!connection_) return;
    auto& timer = connection_->exchange_timer_;
    timer.expires_after(delay);
    timer.async_wait([weak = weak_from_this(), &timer](error_code error) {
      auto self = weak.lock();
      if (!self || error || !self->connection_ || timer.expiry() > Clock::now()) return;
      self->Call(&Callbacks::on_timer);
    });
  }

 private:
  friend class Connection;

  // A callback may end the exchange and so clear itself: call a copy.
  template <typename F, typename... Args>
  void Call(F Callbacks::*callback, Args... args) {
    if (const auto function = callbacks_.*callback) function(args...);
  }

  void Detach() {
    connection_ = nullptr;
    callbacks_ = {};
  }

  const std::shared_ptr<Connection> home_;  // for its strand
  Connection* connection_;
  const bool head_only_;
  bool started_ = false;
  bool streaming_ = false;
  bool chunked_ = false;
  Callbacks callbacks_;
};

void Connection::Dispatch() {
  phase_ = Phase::kReplying;
  read_timer_.cancel();
  parser_.reset();
  request_.received_at = Clock::now();
  last_bytes_queued_ = over_soft_limit_ = false;
  exchange_ = std::make_shared<Exchange>(shared_from_this(), request_.method == "HEAD");
  shared_->handler(std::move(request_), exchange_);
}

void Connection::EndExchange() {
  exchange_timer_.cancel();
  ReleaseBody();
  if (auto exchange = std::move(exchange_)) exchange->Detach();
}

void Connection::CheckSlowReader() {
  if (!exchange_) return;
  if (buffered() > limits_.hard_write_buffer_bytes) return OnSlowReader();
  if (!over_soft_limit_ && buffered() > limits_.soft_write_buffer_bytes) {
    over_soft_limit_ = true;
    ArmWriteTimer();
    exchange_->Call(&HttpExchange::Callbacks::on_pause, true);
  } else if (over_soft_limit_ && buffered() <= limits_.soft_write_buffer_bytes / 2) {
    over_soft_limit_ = false;
    write_timer_.cancel();
    exchange_->Call(&HttpExchange::Callbacks::on_pause, false);
  }
}

void Connection::OnSlowReader() {
  if (shared_->options.metrics) shared_->options.metrics->CountSlowConsumer();
  keep_alive_ = false;
  last_bytes_queued_ = true;  // whatever the handler adds is the last
  ArmWriteTimer();
  if (exchange_) exchange_->Call(&HttpExchange::Callbacks::on_slow_reader);
}

void Connection::Shut() {
  if (phase_ == Phase::kClosed) return;
  phase_ = Phase::kClosed;
  error_code ignored;
  socket_.close(ignored);
  read_timer_.cancel();
  write_timer_.cancel();
  input_.clear();
  unsent_.clear();
  if (exchange_) {
    auto exchange = exchange_;
    auto callbacks = exchange->callbacks_;
    EndExchange();
    if (callbacks.on_gone) callbacks.on_gone();
  }
}

}  // namespace

std::shared_ptr<HttpConnection> MakeHttpConnection(std::shared_ptr<HttpShared> shared, asio::ip::tcp::socket socket,
                                                   std::shared_ptr<asio::ssl::context> tls,
                                                   std::function<void()> on_end) {
  return std::make_shared<Connection>(std::move(shared), std::move(socket), std::move(tls), std::move(on_end));
}

std::string FormatHttpResponse(const HttpResponse& response, bool keep_alive, bool head_only) {
  std::string bytes = FormatHead(response, keep_alive);
  if (response.status != 204) absl::StrAppend(&bytes, "\r\nContent-Length: ", response.body.size());
  absl::StrAppend(&bytes, "\r\n\r\n");
  if (!head_only) bytes += response.body;
  return bytes;
}

}  // namespace millrace::router
