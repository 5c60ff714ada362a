// SPDX-License-Identifier: Apache-2.0
// See expert_link.h.
#include "services/expert/expert_link.h"

#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

#include "millrace/v1/expert.grpc.pb.h"

namespace millrace::expert {
namespace {

class TransportLink final : public ExpertLink {
 public:
  TransportLink(kvtransfer::Transport& transport, kvtransfer::PeerId peer) : transport_(transport), peer_(peer) {}

  absl::Status Send(const ExpertHeader& header, std::shared_ptr<const std::vector<uint8_t>> payload) override {
    const kvtransfer::ConstMemory source(payload->data(), payload->size());
    const auto sent = transport_.SendMessage(peer_, kRequestChannel, HeaderBytes(header), source,
                                             [payload = std::move(payload)](const absl::Status&) {});
    if (absl::IsNotFound(sent.status())) return absl::UnavailableError(sent.status().message());
    return sent.status();
  }
  kvtransfer::PeerId peer() const override { return peer_; }

 private:
  kvtransfer::Transport& transport_;
  const kvtransfer::PeerId peer_;
};

class StreamLink final : public ExpertLink, public grpc::ClientBidiReactor<v1::ExchangeFrame, v1::ExchangeFrame> {
 public:
  StreamLink(std::shared_ptr<grpc::Channel> channel, std::function<void(absl::string_view)> on_message,
             std::function<void(absl::Status)> on_broken)
      : stub_(v1::Expert::NewStub(channel)), on_message_(std::move(on_message)), on_broken_(std::move(on_broken)) {
    stub_->async()->Exchange(&context_, this);
    AddHold();  // Send writes from a thread that is not gRPC's
    StartRead(&incoming_);
    StartCall();
  }

  ~StreamLink() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      silent_ = true;
    }
    context_.TryCancel();
    RemoveHold();
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_; });  // local, hence prompt: the call was cancelled
  }

  absl::Status Send(const ExpertHeader& header, std::shared_ptr<const std::vector<uint8_t>> payload) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (broken_) return absl::UnavailableError("the stream to the expert worker is broken");
    v1::ExchangeFrame frame;
    frame.set_message(MakeFrame(header, *payload));
    outbox_.push_back(std::move(frame));
    WriteNext();
    return absl::OkStatus();
  }

 private:
  void WriteNext() {  // mutex_ held
    if (writing_ || broken_ || outbox_.empty()) return;
    writing_ = true;
    outgoing_ = std::move(outbox_.front());
    outbox_.pop_front();
    StartWrite(&outgoing_);
  }
  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    if (!ok) broken_ = true;
    WriteNext();
  }
  void OnReadDone(bool ok) override {
    bool silent;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      silent = silent_;
      if (!ok) broken_ = true;
    }
    if (!ok) {
      // The end of the stream shows here: OnDone waits for our hold, which only the destructor gives up.
      if (!silent) on_broken_(absl::UnavailableError("its stream broke"));
      return;
    }
    if (!silent) on_message_(incoming_.message());
    StartRead(&incoming_);
  }
  void OnDone(const grpc::Status&) override {
    // Notified under the lock: the destructor may go on as soon as it sees done_.
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    finished_.notify_all();
  }

  const std::unique_ptr<v1::Expert::Stub> stub_;
  const std::function<void(absl::string_view)> on_message_;
  const std::function<void(absl::Status)> on_broken_;
  grpc::ClientContext context_;
  v1::ExchangeFrame incoming_, outgoing_;
  std::mutex mutex_;
  std::condition_variable finished_;
  std::deque<v1::ExchangeFrame> outbox_;
  bool writing_ = false, broken_ = false, silent_ = false, done_ = false;
};

}  // namespace

std::shared_ptr<ExpertLink> MakeTransportLink(kvtransfer::Transport& transport, kvtransfer::PeerId peer) {
  return std::make_shared<TransportLink>(transport, peer);
}

std::shared_ptr<ExpertLink> MakeStreamLink(std::shared_ptr<grpc::Channel> channel,
                                           std::function<void(absl::string_view)> on_message,
                                           std::function<void(absl::Status)> on_broken) {
  return std::make_shared<StreamLink>(std::move(channel), std::move(on_message), std::move(on_broken));
}

}  // namespace millrace::expert
