// SPDX-License-Identifier: Apache-2.0
// The loopback transport: endpoints of one process that post tasks to each other (loopback_endpoint.h); the contract is
// in loopback_transport.h.
#include "kvtransfer/loopback_transport.h"

#include <utility>

#include "kvtransfer/loopback_endpoint.h"

namespace millrace::kvtransfer {
namespace loopback {

bool Hub::Fail(absl::string_view address) {
  std::shared_ptr<Endpoint> endpoint = Find(address);
  if (endpoint == nullptr) return false;
  endpoint->FailNow();
  return true;
}

bool Hub::SetFrozen(absl::string_view address, bool frozen) {
  std::shared_ptr<Endpoint> endpoint = Find(address);
  if (endpoint == nullptr) return false;
  endpoint->SetFrozen(frozen);
  return true;
}

}  // namespace loopback

namespace {

using loopback::Endpoint;
using loopback::Hub;

class LoopbackTransport final : public Transport {
 public:
  LoopbackTransport(std::shared_ptr<LoopbackHub> hub, TransportOptions options)
      : endpoint_(std::make_shared<Endpoint>(std::static_pointer_cast<Hub>(std::move(hub)), std::move(options))) {
    endpoint_->Start();
  }
  ~LoopbackTransport() override { endpoint_->Close(); }

  const std::string& address() const override { return endpoint_->address(); }
  bool Supports(MemoryKind) const override { return true; }  // whatever MemoryFunctions can copy
  void SetHandler(uint16_t channel, MessageHandler* handler) override { endpoint_->SetHandler(channel, handler); }
  void OnPeerFailed(PeerFailed callback) override { endpoint_->OnPeerFailed(std::move(callback)); }
  absl::StatusOr<PeerId> Connect(absl::string_view address) override { return endpoint_->Connect(address); }
  absl::StatusOr<SendId> SendMessage(PeerId peer, uint16_t channel, absl::Span<const uint8_t> header,
                                     ConstMemory payload, SendDone done) override {
    return endpoint_->SendMessage(peer, channel, header, payload, std::move(done));
  }
  void Cancel(SendId send) override { endpoint_->Cancel(send); }
  void Disconnect(PeerId peer, absl::AnyInvocable<void()> fenced) override {
    endpoint_->Disconnect(peer, std::move(fenced));
  }
  void RunAfter(absl::Duration delay, absl::AnyInvocable<void()> callback) override {
    endpoint_->RunAfter(delay, std::move(callback));
  }
  bool WaitFor(absl::FunctionRef<bool()> done, absl::Duration timeout) override {
    return endpoint_->WaitFor(done, timeout);
  }
  void Close() override { endpoint_->Close(); }
  TransportStatistics statistics() const override { return endpoint_->statistics(); }
  std::string Describe() const override { return "loopback within one process"; }

 private:
  // Shared because tasks in other endpoints' queues name it until they have run.
  std::shared_ptr<Endpoint> endpoint_;
};

}  // namespace

std::shared_ptr<LoopbackHub> LoopbackHub::Create() { return std::make_shared<Hub>(); }

std::unique_ptr<Transport> CreateLoopbackTransport(std::shared_ptr<LoopbackHub> hub, TransportOptions options) {
  return std::make_unique<LoopbackTransport>(std::move(hub), std::move(options));
}

}  // namespace millrace::kvtransfer
