// SPDX-License-Identifier: Apache-2.0
// A server stream that is written from elsewhere: a queue between an engine thread and gRPC's one write at a time.
//
// The engine thread calls Send and Close; gRPC's threads take from the queue. What a slow reader has not taken counts
// towards Congested, on which the producer must act; the queue itself takes what comes, so it is bounded by the
// producer's good manners: one step's worth beyond the limit. The object deletes itself when gRPC is done and the
// producer has let go.
//
// Thread: Send, Close and queued_bytes any; OnCancelled and OnDrained are called on gRPC's threads and must not block.
#pragma once

#include <grpcpp/support/server_callback.h>

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/status/status.h"
#include "services/common/grpc_status.h"

namespace millrace {

template <typename Event>
class EventWriter : public grpc::ServerWriteReactor<Event>, public std::enable_shared_from_this<EventWriter<Event>> {
 public:
  // gRPC keeps a plain pointer until OnDone, so the object keeps itself alive until then.
  void KeepUntilDone() { self_ = this->shared_from_this(); }

  void Send(Event event) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_ || finished_) return;
    queued_bytes_ += event.ByteSizeLong();
    queue_.push_back(std::move(event));
    WriteNext();
  }

  // Finishes with `status` once everything queued has been written. Only the first call counts.
  void Close(absl::Status status) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_ || finished_) return;
    closing_ = true;
    status_ = std::move(status);
    WriteNext();
  }

  size_t queued_bytes() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return queued_bytes_;
  }

 protected:
  // The caller has gone or cancelled. At most once.
  virtual void OnCancelled() = 0;
  // The queue has run empty after having held something.
  virtual void OnDrained() {}

 private:
  void WriteNext() {  // mutex_ held
    if (writing_ || finished_) return;
    if (!queue_.empty()) {
      writing_ = true;
      current_ = std::move(queue_.front());
      queue_.pop_front();
      this->StartWrite(&current_);
    } else if (closing_) {
      finished_ = true;
      this->Finish(ToGrpcStatus(status_));
    }
  }

  void OnWriteDone(bool ok) final {
    bool drained = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
      queued_bytes_ -= std::min(queued_bytes_, current_.ByteSizeLong());
      if (!ok) {  // the stream is broken: what is queued has no reader
        queue_.clear();
        queued_bytes_ = 0;
        if (!closing_) {
          closing_ = true;
          status_ = absl::CancelledError("stream broken");
        }
      }
      WriteNext();
      drained = queue_.empty();
    }
    if (drained) OnDrained();
  }

  void OnCancel() final {
    OnCancelled();
    Close(absl::CancelledError("cancelled by the caller"));
  }

  void OnDone() final {
    const auto self = std::move(self_);  // may delete this when it goes out of scope
  }

  mutable std::mutex mutex_;
  std::deque<Event> queue_;  // guarded by mutex_, as all below but self_
  Event current_;
  absl::Status status_;
  size_t queued_bytes_ = 0;
  bool writing_ = false, closing_ = false, finished_ = false;
  std::shared_ptr<EventWriter> self_;
};

}  // namespace millrace
