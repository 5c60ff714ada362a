// SPDX-License-Identifier: Apache-2.0
// Requests from bytes: heads, bodies and their limits, until one is whole and Dispatch takes it.
//
// The gate (http_head.h) looks at a head first, then Beast parses it and the body; both must agree.
#include <algorithm>
#include <cctype>

#include "absl/strings/str_cat.h"
#include "services/common/error.h"
#include "services/router/http_connection.h"
#include "services/router/http_head.h"

namespace millrace::router {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;

constexpr size_t kMaxLingerBytes = 256u << 10;
constexpr size_t kMaxChunkHeaderBytes = 8u << 10;

absl::Status Refuse(int http_status, std::string_view code, absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, message,
                   {.code = std::string(code), .http_status = http_status});
}

absl::Status BodyTimeout() { return Refuse(408, "body_timeout", "The request body did not arrive in time."); }

}  // namespace

void HttpConnection::BeginRequest() {
  phase_ = Phase::kIdle;
  parser_.reset();
  skipped_empty_line_ = false;
  if (input_.empty() && (shared_->draining || input_ended_)) return Shut();
  ArmReadTimer(limits_.keep_alive_timeout);
  if (!input_.empty()) ReadHead();
  Read();
}

void HttpConnection::Read() {
  if (read_pending_ || input_ended_ || phase_ == Phase::kClosed) return;
  if (phase_ == Phase::kReplying && input_.size() >= limits_.max_read_ahead_bytes) return;
  read_pending_ = true;
  auto done = [self = shared_from_this()](ErrorCode error, size_t bytes) { self->OnRead(error, bytes); };
  const auto space = asio::buffer(read_buffer_);
  if (tls_) return tls_->async_read_some(space, std::move(done));
  socket_.async_read_some(space, std::move(done));
}

void HttpConnection::OnRead(ErrorCode error, size_t bytes) {
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

void HttpConnection::ReadHead() {
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
  ErrorCode error;
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
void HttpConnection::TakeHead() {
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

void HttpConnection::ReadBody() {
  while (!input_.empty() && !parser_->is_done()) {
    ErrorCode error;
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
  if (input_.size() > kMaxChunkHeaderBytes) return Fail(Refuse(400, "malformed_body", "A chunk's header is too long."));
  if (raw_body_bytes_ > body_bytes + body_bytes / 2 + limits_.max_chunk_overhead_bytes) {
    return Fail(Refuse(413, "chunk_overhead", "The body comes in too many small chunks."));
  }
  const auto elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - body_start_);
  if (elapsed > limits_.body_rate_grace &&
      raw_body_bytes_ * 1000 < limits_.min_body_bytes_per_second * static_cast<size_t>(elapsed.count())) {
    return Fail(BodyTimeout());
  }
  if (input_ended_) return Shut();
  ArmReadTimer(limits_.body_idle_timeout);
}

// Bodies of all connections share one budget.
bool HttpConnection::AccountBody(size_t bytes) {
  shared_->body_bytes += bytes - accounted_body_bytes_;
  accounted_body_bytes_ = bytes;
  return shared_->body_bytes <= limits_.max_body_bytes_total;
}

void HttpConnection::ReleaseBody() {
  shared_->body_bytes -= accounted_body_bytes_;
  accounted_body_bytes_ = 0;
}

void HttpConnection::ArmReadTimer(std::chrono::milliseconds timeout) {
  read_timer_.expires_after(timeout);
  read_timer_.async_wait([weak = weak_from_this()](ErrorCode error) {
    if (auto self = weak.lock(); self && !error) self->OnReadTimer();
  });
}

void HttpConnection::OnReadTimer() {
  if (read_timer_.expiry() > Clock::now()) return;  // armed again while this was on its way
  switch (phase_) {
    case Phase::kHandshake:
    case Phase::kIdle:
    case Phase::kLingering:
      return Shut();
    case Phase::kHead:
      return Fail(Refuse(408, "header_timeout", "The request header did not arrive in time."));
    case Phase::kBody:
      return Fail(BodyTimeout());
    default:
      return;
  }
}

absl::Status HttpConnection::BodyTooLarge() const {
  return Refuse(413, "body_too_large", absl::StrCat("The body exceeds ", limits_.max_body_bytes, " bytes."));
}

}  // namespace millrace::router
