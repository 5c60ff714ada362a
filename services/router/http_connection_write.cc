// SPDX-License-Identifier: Apache-2.0
// Bytes of replies on their way out: one write in flight, the rest queued, and what happens when a client reads slowly.
#include "services/router/http_connection.h"
#include "services/router/http_exchange.h"

namespace millrace::router {

namespace asio = boost::asio;

void HttpConnection::Send(std::string_view bytes) {
  if (phase_ == Phase::kClosed) return;
  unsent_.append(bytes);
  if (sending_.empty()) SendNext();
  if (last_bytes_queued_) {
    ArmWriteTimer();
  } else {
    CheckSlowReader();
  }
}

void HttpConnection::SendNext() {
  sending_.swap(unsent_);
  unsent_.clear();
  sent_ = 0;
  SendRest();
}

void HttpConnection::SendRest() {
  auto done = [self = shared_from_this()](ErrorCode error, size_t bytes) { self->OnSent(error, bytes); };
  const auto rest = asio::buffer(sending_.data() + sent_, sending_.size() - sent_);
  if (tls_) return tls_->async_write_some(rest, std::move(done));
  socket_.async_write_some(rest, std::move(done));
}

void HttpConnection::OnSent(ErrorCode error, size_t bytes) {
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

void HttpConnection::CheckSlowReader() {
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

void HttpConnection::OnSlowReader() {
  if (shared_->options.metrics) shared_->options.metrics->CountSlowConsumer();
  keep_alive_ = false;
  last_bytes_queued_ = true;  // whatever the handler adds is the last
  ArmWriteTimer();
  if (exchange_) exchange_->Call(&HttpExchange::Callbacks::on_slow_reader);
}

// While streaming the timer means "over the soft limit for too long"; after the last byte was queued, "no progress".
void HttpConnection::ArmWriteTimer() {
  write_timer_.expires_after(limits_.slow_reader_timeout);
  write_timer_.async_wait([weak = weak_from_this()](ErrorCode error) {
    auto self = weak.lock();
    if (!self || error || self->write_timer_.expiry() > Clock::now()) return;
    if (self->last_bytes_queued_) {
      self->Shut();
    } else {
      self->OnSlowReader();
    }
  });
}

void HttpConnection::OnReplySent() {
  last_bytes_queued_ = false;
  write_timer_.cancel();
  EndExchange();
  if (keep_alive_ && !shared_->draining) return BeginRequest();
  Linger();
}

}  // namespace millrace::router
