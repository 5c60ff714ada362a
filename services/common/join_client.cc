// SPDX-License-Identifier: Apache-2.0
// See join_client.h.
#include "services/common/join_client.h"

#include <algorithm>
#include <deque>

#include "absl/strings/str_cat.h"
#include "services/common/clock.h"
#include "services/common/rpc.h"
#include "spdlog/spdlog.h"

namespace millrace {
namespace {

constexpr absl::Duration kFirstRedial = absl::Milliseconds(200);
constexpr absl::Duration kSlowestRedial = absl::Seconds(1);
// A router floods nobody; more unread messages than this mean that we are stuck, and the stream is given up.
constexpr size_t kMaxUnread = 1024;

}  // namespace

// One attempt at the stream. gRPC's threads fill `inbox_`; the client's thread takes from it and writes.
class JoinClient::Stream : public grpc::ClientBidiReactor<v1::WorkerMessage, v1::RouterMessage> {
 public:
  Stream(JoinClient& client, v1::Cluster::Stub& stub) : client_(client) {
    stub.async()->Join(&context_, this);
    AddHold();  // we write from a thread that is not gRPC's
    StartRead(&incoming_);
    StartCall();
  }

  void Write(v1::WorkerMessage message) {
    std::lock_guard<std::mutex> lock(mutex_);
    outbox_.push_back(std::move(message));
    if (!writing_) WriteNext();
  }
  // A beat is not worth queueing behind another: the router hears that we are slow, which is true.
  bool Idle() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return !writing_;
  }
  std::deque<v1::RouterMessage> Take() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(inbox_, {});
  }
  bool HasNews() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_ || broken_ || !inbox_.empty();
  }
  bool broken() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return broken_ || done_;
  }
  // Ends the call and waits until gRPC has let go of this object; local, hence prompt. Returns how it ended: what broke
  // it, or Cancelled.
  grpc::Status Close() {
    if (!broken()) context_.TryCancel();
    RemoveHold();
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_; });
    return status_;
  }

 private:
  void WriteNext() {  // mutex_ held
    writing_ = true;
    outgoing_ = std::move(outbox_.front());
    outbox_.pop_front();
    StartWrite(&outgoing_);
  }
  void OnWriteDone(bool ok) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
      if (!ok) {
        broken_ = true;
      } else if (!outbox_.empty()) {
        WriteNext();
      }
    }
    client_.wake_.notify_all();
  }
  void OnReadDone(bool ok) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!ok || inbox_.size() >= kMaxUnread) {
        broken_ = true;
      } else {
        inbox_.push_back(std::move(incoming_));
        StartRead(&incoming_);
      }
    }
    client_.wake_.notify_all();
  }
  void OnDone(const grpc::Status& status) override {
    // Notified under the lock: Close may destroy this object as soon as it sees done_.
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    status_ = status;
    client_.wake_.notify_all();
    finished_.notify_all();
  }

  JoinClient& client_;
  grpc::ClientContext context_;
  v1::RouterMessage incoming_;
  v1::WorkerMessage outgoing_;
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  std::deque<v1::WorkerMessage> outbox_;
  std::deque<v1::RouterMessage> inbox_;
  grpc::Status status_;
  bool writing_ = false, broken_ = false, done_ = false;
};

JoinClient::JoinClient(JoinOptions options, JoinCallbacks callbacks)
    : options_(std::move(options)),
      callbacks_(std::move(callbacks)),
      heartbeat_(options_.heartbeat),
      dead_after_(options_.dead_after),
      last_heard_(MonotonicNow()),
      thread_([this] { Run(); }) {}

JoinClient::~JoinClient() { Stop(); }

void JoinClient::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void JoinClient::SetReady(v1::WorkerReady ready) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ready_ = std::move(ready);
    nudged_ = true;
  }
  wake_.notify_all();
}

void JoinClient::Nudge() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    nudged_ = true;
  }
  wake_.notify_all();
}

bool JoinClient::AwaitHeard(absl::Duration limit) {
  const absl::Time end = MonotonicNow() + limit;
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t fresh = beat_ + 1;  // a status under way may have been filled before what we want heard
  nudged_ = true;
  wake_.notify_all();
  while (heard_beat_ < fresh) {
    const absl::Duration left = end - MonotonicNow();
    if (!connected_ || stop_ || left <= absl::ZeroDuration()) return false;
    wake_.wait_for(lock, absl::ToChronoMicroseconds(left));
  }
  return true;
}

bool JoinClient::connected() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return connected_;
}

void JoinClient::Run() {
  const auto channel = MakeChannel(options_.router_address, options_.security.get(), PeerRole::kRouter);
  const auto stub = v1::Cluster::NewStub(channel);
  absl::Duration redial = kFirstRedial;
  for (;;) {
    const absl::Time began = MonotonicNow();
    {
      Stream stream(*this, *stub);
      ServeStream(stream);
      LogEnd(stream.Close());
    }
    std::unique_lock<std::mutex> lock(mutex_);
    connected_ = false;
    wake_.notify_all();  // who waits to be heard waits for nobody now
    if (stop_) return;
    // A stream that lasted was a good one: the next break is dialled again at once.
    redial = MonotonicNow() - began > absl::Seconds(2) ? kFirstRedial : std::min(redial * 2, kSlowestRedial);
    const absl::Time next = MonotonicNow() + redial;
    for (absl::Time now = MonotonicNow(); now < next && !stop_; now = MonotonicNow()) {
      wake_.wait_for(lock, absl::ToChronoMicroseconds(next - now));
      lock.unlock();
      CheckSilence(MonotonicNow());
      lock.lock();
    }
    if (stop_) return;
  }
}

// Each reason once: a certificate that is refused is refused again at every attempt. A router that is not there yet is
// no cause for alarm.
void JoinClient::LogEnd(const grpc::Status& status) {
  if (status.ok() || status.error_code() == grpc::StatusCode::CANCELLED || status.error_message() == last_end_) return;
  last_end_ = status.error_message();
  const bool nobody = status.error_code() == grpc::StatusCode::UNAVAILABLE;
  spdlog::log(nobody ? spdlog::level::info : spdlog::level::warn, "the stream to the router at {} ended: {}",
              options_.router_address, last_end_);
}

void JoinClient::ServeStream(Stream& stream) {
  v1::WorkerMessage hello;
  *hello.mutable_hello() = options_.hello;
  stream.Write(std::move(hello));
  bool said_ready = false;
  absl::Time next_beat = MonotonicNow();
  const absl::Time began = MonotonicNow();
  bool heard = false;
  while (!stream.broken()) {
    for (const v1::RouterMessage& message : stream.Take()) {
      heard = true;
      Handle(stream, message);
    }
    const absl::Time now = MonotonicNow();
    CheckSilence(now);
    // Either we were dialling nobody for too long, or a stream that once spoke has fallen silent.
    if (now - std::max(began, heard ? last_heard_ : began) > dead_after_) return;

    std::optional<v1::WorkerReady> ready;
    bool nudged;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stop_) return;
      if (!said_ready) ready = ready_;
      nudged = std::exchange(nudged_, false);
    }
    if (ready.has_value()) {
      said_ready = true;
      v1::WorkerMessage message;
      *message.mutable_ready() = *std::move(ready);
      stream.Write(std::move(message));
    }
    if ((now >= next_beat || nudged) && stream.Idle()) {
      v1::WorkerMessage message;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        message.mutable_status()->set_beat(++beat_);
      }
      callbacks_.fill_status(*message.mutable_status());
      stream.Write(std::move(message));
      next_beat = now + heartbeat_;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    const absl::Duration wait = std::clamp(next_beat - MonotonicNow(), absl::Milliseconds(1), heartbeat_);
    wake_.wait_for(lock, absl::ToChronoMicroseconds(wait), [&] { return stop_ || nudged_ || stream.HasNews(); });
  }
}

void JoinClient::Handle(Stream&, const v1::RouterMessage& message) {
  last_heard_ = MonotonicNow();
  switch (message.message_case()) {
    case v1::RouterMessage::kWelcome:
      if (message.welcome().heartbeat_ms() >= 50) heartbeat_ = absl::Milliseconds(message.welcome().heartbeat_ms());
      if (message.welcome().dead_after_ms() > 0) dead_after_ = absl::Milliseconds(message.welcome().dead_after_ms());
      lost_ = false;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        connected_ = true;
        nudged_ = true;
      }
      if (callbacks_.on_router) callbacks_.on_router(IncarnationId::From(message.welcome().router()));
      break;
    case v1::RouterMessage::kPeers:
      if (callbacks_.on_peers) callbacks_.on_peers(message.peers());
      break;
    case v1::RouterMessage::kDrain:
      if (callbacks_.on_drain) callbacks_.on_drain(message.drain());
      break;
    case v1::RouterMessage::kEcho: {
      std::lock_guard<std::mutex> lock(mutex_);
      heard_beat_ = std::max(heard_beat_, message.echo());
    }
      wake_.notify_all();
      break;
    default:
      break;
  }
}

void JoinClient::CheckSilence(absl::Time now) {
  if (lost_ || now - last_heard_ <= dead_after_) return;
  lost_ = true;
  if (callbacks_.on_router_lost) {
    callbacks_.on_router_lost(absl::StrCat("nothing heard from the router for ", absl::FormatDuration(dead_after_)));
  }
}

}  // namespace millrace
