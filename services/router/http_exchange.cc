// SPDX-License-Identifier: Apache-2.0
// See http_exchange.h: what a handler asks for, in terms of its connection.
#include "services/router/http_exchange.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "services/router/http_format.h"

namespace millrace::router {

ConnectionExchange::ConnectionExchange(std::shared_ptr<HttpConnection> connection, bool head_only)
    : home_(connection), connection_(connection.get()), head_only_(head_only) {}

void ConnectionExchange::Post(std::function<void()> function) { home_->OnStrand(std::move(function)); }

void ConnectionExchange::Respond(HttpResponse response) {
  if (!connection_ || started_) return;
  started_ = true;
  connection_->last_bytes_queued_ = true;
  connection_->keep_alive_ = connection_->keep_alive_ && !connection_->shared_->draining;
  connection_->Send(FormatHttpResponse(response, connection_->keep_alive_, head_only_));
}

void ConnectionExchange::StartStream(HttpResponse head) {
  if (!connection_ || started_) return;
  started_ = streaming_ = true;
  chunked_ = connection_->is_http11_;
  connection_->keep_alive_ = connection_->keep_alive_ && chunked_ && !connection_->shared_->draining;
  std::string bytes = FormatHttpHead(head, connection_->keep_alive_);
  absl::StrAppend(&bytes, chunked_ ? "\r\nTransfer-Encoding: chunked" : "", "\r\n\r\n");
  connection_->Send(bytes);
}

void ConnectionExchange::Write(std::string_view bytes) {
  if (!connection_ || !streaming_ || bytes.empty()) return;
  if (!chunked_) return connection_->Send(bytes);
  connection_->Send(
      absl::StrCat(absl::Hex(bytes.size()), "\r\n", absl::string_view(bytes.data(), bytes.size()), "\r\n"));
}

void ConnectionExchange::EndStream(bool close) {
  if (!connection_ || !streaming_) return;
  streaming_ = false;
  if (close) connection_->keep_alive_ = false;
  connection_->last_bytes_queued_ = true;
  if (chunked_) return connection_->Send("0\r\n\r\n");
  if (connection_->sending_.empty()) return connection_->OnReplySent();
  connection_->ArmWriteTimer();
}

void ConnectionExchange::BodyConsumed() {
  if (connection_) connection_->ReleaseBody();
}

void ConnectionExchange::DropUnsent() {
  if (connection_) connection_->unsent_.clear();
}

void ConnectionExchange::SetCallbacks(Callbacks callbacks) {
  if (connection_) callbacks_ = std::move(callbacks);
}

void ConnectionExchange::SetTimer(std::chrono::milliseconds delay) {
  if (!connection_) return;
  auto& timer = connection_->exchange_timer_;
  timer.expires_after(delay);
  timer.async_wait([weak = weak_from_this(), &timer](boost::system::error_code error) {
    auto self = weak.lock();
    if (!self || error || !self->connection_ || timer.expiry() > std::chrono::steady_clock::now()) return;
    self->Call(&Callbacks::on_timer);
  });
}

HttpExchange::Callbacks ConnectionExchange::Detach() {
  connection_ = nullptr;
  return std::exchange(callbacks_, {});
}

}  // namespace millrace::router
