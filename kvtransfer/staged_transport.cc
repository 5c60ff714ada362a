// SPDX-License-Identifier: Apache-2.0
// See staged_transport.h.
#include "kvtransfer/staged_transport.h"

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvtransfer/forwarding_transport.h"
#include "kvtransfer/staging_buffer.h"
#include "kvtransfer/status.h"

namespace millrace::kvtransfer {
namespace {

using internal::StagingBudget;
using internal::StagingBuffer;

class StagedTransport final : public ForwardingTransport<Transport> {
 public:
  StagedTransport(std::unique_ptr<Transport> inner, MemoryFunctions memory, size_t max_staging_bytes)
      : ForwardingTransport(std::move(inner)),
        memory_(std::move(memory)),
        budget_(std::make_shared<StagingBudget>(max_staging_bytes)) {
    for (StagingHandler& handler : handlers_) handler.transport = this;
  }
  ~StagedTransport() override { inner()->Close(); }

  bool Supports(MemoryKind /*kind*/) const override { return inner()->Supports(MemoryKind::kHost); }
  void SetHandler(uint16_t channel, MessageHandler* handler) override {
    if (channel >= kMaxChannels || handler == nullptr) return inner()->SetHandler(channel, handler);
    // The inner transport calls ours, which asks the caller's. Taken away first: nobody is inside when it changes.
    inner()->SetHandler(channel, nullptr);
    handlers_[channel].handler = handler;
    inner()->SetHandler(channel, &handlers_[channel]);
  }

  absl::StatusOr<SendId> SendMessage(PeerId peer, uint16_t channel, absl::Span<const uint8_t> header,
                                     ConstMemory payload, SendDone done) override {
    if (payload.kind == MemoryKind::kHost) {
      return inner()->SendMessage(peer, channel, header, payload, std::move(done));
    }
    auto buffer = StagingBuffer::Take(budget_, payload.bytes);
    if (buffer == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat("no staging memory for ", payload.bytes, " bytes"));
    }
    RETURN_IF_ERROR(memory_.copy({buffer->data(), payload.bytes, MemoryKind::kHost}, payload));
    const ConstMemory staged(buffer->data(), payload.bytes);
    return inner()->SendMessage(peer, channel, header, staged,
                                [buffer = std::move(buffer), done = std::move(done)](absl::Status status) mutable {
                                  buffer.reset();
                                  done(std::move(status));
                                });
  }

  std::string Describe() const override { return "device memory through host buffers; " + inner()->Describe(); }

 private:
  struct StagingHandler final : MessageHandler {
    StagedTransport* transport = nullptr;
    MessageHandler* handler = nullptr;
    Placement OnMessage(const IncomingMessage& message) override {
      return transport->Stage(message.payload_bytes, handler->OnMessage(message));
    }
  };

  Placement Stage(size_t payload_bytes, Placement placement) {
    if (placement.verdict != Placement::Verdict::kPlace || placement.destination.kind == MemoryKind::kHost) {
      return placement;
    }
    const Memory destination = placement.destination;
    // A destination that is too small is the inner transport's to refuse: it sees its size, not ours.
    auto buffer = StagingBuffer::Take(budget_, destination.bytes);
    if (buffer == nullptr) {
      inner()->RunAfter(absl::ZeroDuration(), [done = std::move(placement.done)]() mutable {
        done(absl::ResourceExhaustedError("no staging memory"));
      });
      return Placement::Drop("no_staging_memory");
    }
    const Memory staged{buffer->data(), destination.bytes, MemoryKind::kHost};
    return Placement::Into(staged, [this, destination, payload_bytes, buffer = std::move(buffer),
                                    done = std::move(placement.done)](absl::Status status) mutable {
      if (status.ok() && payload_bytes != 0) {
        status = memory_.copy({destination.data, payload_bytes, destination.kind}, {buffer->data(), payload_bytes});
      }
      buffer.reset();
      done(std::move(status));
    });
  }

  const MemoryFunctions memory_;
  const std::shared_ptr<StagingBudget> budget_;
  std::array<StagingHandler, kMaxChannels> handlers_;
};

}  // namespace

std::unique_ptr<Transport> StageDeviceMemory(std::unique_ptr<Transport> inner, MemoryFunctions memory,
                                             size_t max_staging_bytes) {
  return std::make_unique<StagedTransport>(std::move(inner), std::move(memory), max_staging_bytes);
}

}  // namespace millrace::kvtransfer
