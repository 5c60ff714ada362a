// SPDX-License-Identifier: Apache-2.0
// A transport that hands every call to the one beneath: what decorators have in common. Internal to kvtransfer. A
// decorator overrides what it changes, and closes inner() in its destructor, while its own members still live.
//
// Thread: as the transport beneath.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "kvtransfer/transport.h"

namespace millrace::kvtransfer {

// `Interface` is Transport, or an extension of it whose additions the decorator defines. SendMessage and Describe are
// the decorator's own too.
template <typename Interface>
class ForwardingTransport : public Interface {
 public:
  explicit ForwardingTransport(std::unique_ptr<Transport> inner) : inner_(std::move(inner)) {}

  const std::string& address() const override { return inner_->address(); }
  size_t max_header_bytes() const override { return inner_->max_header_bytes(); }
  void SetHandler(uint16_t channel, MessageHandler* handler) override { inner_->SetHandler(channel, handler); }
  void OnPeerFailed(PeerFailed callback) override { inner_->OnPeerFailed(std::move(callback)); }
  absl::StatusOr<PeerId> Connect(absl::string_view address) override { return inner_->Connect(address); }
  void Cancel(SendId send) override { inner_->Cancel(send); }
  void Disconnect(PeerId peer, absl::AnyInvocable<void()> fenced) override {
    inner_->Disconnect(peer, std::move(fenced));
  }
  void RunAfter(absl::Duration delay, absl::AnyInvocable<void()> callback) override {
    inner_->RunAfter(delay, std::move(callback));
  }
  bool WaitFor(absl::FunctionRef<bool()> done, absl::Duration timeout) override {
    return inner_->WaitFor(done, timeout);
  }
  void SendAtOnce(absl::FunctionRef<void()> post) override { inner_->SendAtOnce(post); }
  void Close() override { inner_->Close(); }
  TransportStatistics statistics() const override { return inner_->statistics(); }

 protected:
  Transport* inner() const { return inner_.get(); }

 private:
  const std::unique_ptr<Transport> inner_;
};

}  // namespace millrace::kvtransfer
