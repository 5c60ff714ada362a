// SPDX-License-Identifier: Apache-2.0
// Seals what goes, opens what comes; the contract is in sealed_transport.h.
//
// A sealed header is a frame in clear, two tags, and the caller's header encrypted. The frame names the connection by
// the public key of whoever began it, so the first message of a connection is enough to derive its keys: there is no
// handshake of ours. A connection that both sides asked for has a session each way; each side sends over the one that
// it began, if it did.
//
// A lock guards the table of sessions; a session's window is touched under that lock too.
#include "kvtransfer/sealed_transport.h"

#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "kvtransfer/digest.h"
#include "kvtransfer/forwarding_transport.h"
#include "kvtransfer/seal.h"
#include "kvtransfer/staging_buffer.h"
#include "kvtransfer/status.h"

namespace millrace::kvtransfer {
namespace {

using internal::SealBytes;
using internal::SealKeyPair;
using internal::SealKeys;
using internal::SealPart;
using internal::StagingBudget;
using internal::StagingBuffer;

// Connections that were begun with us are remembered so long after they ended, so that none can be begun again with
// what was heard on it. Beyond it leases and batches that are long over refuse what is repeated.
constexpr size_t kRememberedConnections = 1u << 20;

struct Frame {
  static constexpr uint32_t kMagic = 0x4c53524d;  // "MRSL"
  uint32_t magic = kMagic;
  uint16_t version = 1;
  uint16_t channel = 0;
  uint64_t by_initiator = 0;  // 1: from the side that began the connection
  uint64_t counter = 0;       // of this session and direction
  uint64_t payload_bytes = 0;
  SealBytes initiator{};  // public key: names the session
};
static_assert(sizeof(Frame) == 64, "travels as it lies in memory: no padding, little endian");

struct Tags {
  uint8_t header[internal::kSealTagBytes] = {};
  uint8_t payload[internal::kSealTagBytes] = {};
};
constexpr size_t kSealedBytes = sizeof(Frame) + sizeof(Tags);  // before the caller's header

template <typename T>
absl::Span<const uint8_t> BytesOf(const T& value) {
  return {reinterpret_cast<const uint8_t*>(&value), sizeof(value)};
}

// The payload belongs to its frame and to its header.
std::vector<uint8_t> PayloadPlace(const Frame& frame, absl::Span<const uint8_t> header) {
  std::vector<uint8_t> place(sizeof(frame) + header.size());
  std::memcpy(place.data(), &frame, sizeof(frame));
  if (!header.empty()) std::memcpy(place.data() + sizeof(frame), header.data(), header.size());
  return place;
}

struct Session {
  SealBytes initiator{};
  bool we_began = false;
  std::unique_ptr<const SealKeys> keys;
  std::atomic<uint64_t> next_counter{0};
  internal::ReplayWindow window;  // guarded by the transport's mu_

  const SealBytes& send_key() const { return we_began ? keys->to_acceptor : keys->to_initiator; }
  const SealBytes& receive_key() const { return we_began ? keys->to_initiator : keys->to_acceptor; }
};

struct Sessions {
  std::shared_ptr<Session> ours, theirs;  // by who began it
};

class SealedTransport final : public ForwardingTransport<Transport> {
 public:
  SealedTransport(std::unique_ptr<Transport> inner, MemoryFunctions memory, size_t max_sealing_bytes)
      : ForwardingTransport(std::move(inner)),
        memory_(std::move(memory)),
        budget_(std::make_shared<StagingBudget>(max_sealing_bytes)),
        pair_(SealKeyPair::Random()),
        admission_(internal::RandomSealBytes()),
        address_(MakeAddress()) {
    for (size_t channel = 0; channel < kMaxChannels; ++channel) {
      handlers_[channel].transport = this;
      handlers_[channel].channel = static_cast<uint16_t>(channel);
    }
    this->inner()->OnPeerFailed([this](PeerId peer, const absl::Status&) {
      std::lock_guard lock(mu_);
      sessions_.erase(peer);
    });
  }
  ~SealedTransport() override { inner()->Close(); }

  const std::string& address() const override { return address_; }
  bool Supports(MemoryKind kind) const override { return kind == MemoryKind::kHost; }
  size_t max_header_bytes() const override { return inner()->max_header_bytes() - kSealedBytes; }
  std::string Describe() const override { return "sealed with AES-256-GCM; " + inner()->Describe(); }

  void SetHandler(uint16_t channel, MessageHandler* handler) override {
    if (channel >= kMaxChannels || handler == nullptr) return inner()->SetHandler(channel, handler);
    // The inner transport calls ours, which asks the caller's. Taken away first: nobody is inside when it changes.
    inner()->SetHandler(channel, nullptr);
    handlers_[channel].handler = handler;
    inner()->SetHandler(channel, &handlers_[channel]);
  }

  absl::StatusOr<PeerId> Connect(absl::string_view address) override;
  absl::StatusOr<SendId> SendMessage(PeerId peer, uint16_t channel, absl::Span<const uint8_t> header,
                                     ConstMemory payload, SendDone done) override;
  TransportStatistics statistics() const override {
    TransportStatistics statistics = inner()->statistics();
    if (const uint64_t broken = broken_arrivals_.load(); broken != 0) statistics.drops["seal_broken"] += broken;
    return statistics;
  }

 private:
  struct OpeningHandler final : MessageHandler {
    SealedTransport* transport = nullptr;
    MessageHandler* handler = nullptr;
    uint16_t channel = 0;
    Placement OnMessage(const IncomingMessage& message) override {
      return transport->OnSealed(message, channel, *handler);
    }
  };

  // Magic, public key, admission secret, the inner transport's address, digest of all that.
  std::string MakeAddress() const {
    std::string address(kSealedAddressMagic);
    address.append(reinterpret_cast<const char*>(pair_.public_key().data()), pair_.public_key().size());
    address.append(reinterpret_cast<const char*>(admission_.data()), admission_.size());
    address += inner()->address();
    const uint64_t digest = ContentDigest(address);
    address.append(reinterpret_cast<const char*>(&digest), sizeof(digest));
    return address;
  }

  absl::StatusOr<std::shared_ptr<Session>> Begin(const SealBytes& acceptor, const SealBytes& admission) const {
    const SealKeyPair own = SealKeyPair::Random();
    auto session = std::make_shared<Session>();
    session->initiator = own.public_key();
    session->we_began = true;
    ASSIGN_OR_RETURN(session->keys, SealKeys::Derive(own, acceptor, own.public_key(), acceptor, admission));
    return session;
  }

  std::shared_ptr<Session> SessionOf(PeerId peer) {
    std::lock_guard lock(mu_);
    auto it = sessions_.find(peer);
    if (it == sessions_.end()) return nullptr;
    return it->second.ours != nullptr ? it->second.ours : it->second.theirs;
  }

  std::shared_ptr<Session> OpenHeader(PeerId from, const Frame& frame, const Tags& tags,
                                      absl::Span<const uint8_t> sealed, uint8_t* header, const char*& why);
  Placement OnSealed(const IncomingMessage& message, uint16_t channel, MessageHandler& handler);
  Placement OnPayloadHere(const IncomingMessage& message, absl::Span<const uint8_t> sealed, const Session& session,
                          const Frame& frame, const Tags& tags, MessageHandler& handler);

  const MemoryFunctions memory_;
  const std::shared_ptr<StagingBudget> budget_;
  const SealKeyPair pair_;
  const SealBytes admission_;
  const std::string address_;
  std::array<OpeningHandler, kMaxChannels> handlers_;
  std::vector<uint8_t> opened_;  // handlers' turn: a small payload, opened
  std::atomic<uint64_t> broken_arrivals_{0};

  std::mutex mu_;
  absl::flat_hash_map<PeerId, Sessions> sessions_;  // guarded by mu_
  absl::flat_hash_set<uint64_t> begun_with_us_;     // guarded by mu_; the first bytes of initiators' keys
  std::deque<uint64_t> begun_in_order_;             // guarded by mu_
};

absl::StatusOr<PeerId> SealedTransport::Connect(absl::string_view address) {
  if (!IsSealedAddress(address)) {
    return absl::InvalidArgumentError(
        absl::StrCat("not the address of a transport that seals (transfer.seal differs?): ", address.size(), " bytes"));
  }
  constexpr size_t kBefore = kSealedAddressMagic.size() + 2 * internal::kSealKeyBytes;
  uint64_t digest = 0;
  if (address.size() < kBefore + sizeof(digest))
    return absl::InvalidArgumentError(absl::StrCat("sealed address: ", address.size(), " bytes, too short"));
  std::memcpy(&digest, address.data() + address.size() - sizeof(digest), sizeof(digest));
  address.remove_suffix(sizeof(digest));
  if (digest != ContentDigest(address))
    return absl::InvalidArgumentError("sealed address: digest wrong, damaged on its way");
  SealBytes acceptor, admission;
  std::memcpy(acceptor.data(), address.data() + kSealedAddressMagic.size(), acceptor.size());
  std::memcpy(admission.data(), address.data() + kSealedAddressMagic.size() + acceptor.size(), admission.size());
  // Under the lock: a connection that fails at once takes its session away after it was put there, not before.
  std::lock_guard lock(mu_);
  ASSIGN_OR_RETURN(const PeerId peer, inner()->Connect(address.substr(kBefore)));
  std::shared_ptr<Session>& ours = sessions_[peer].ours;
  if (ours == nullptr) {
    ASSIGN_OR_RETURN(ours, Begin(acceptor, admission));
  }
  return peer;
}

absl::StatusOr<SendId> SealedTransport::SendMessage(PeerId peer, uint16_t channel, absl::Span<const uint8_t> header,
                                                    ConstMemory payload, SendDone done) {
  if (header.size() > max_header_bytes())
    return absl::InvalidArgumentError(absl::StrCat("header has ", header.size(), " bytes, limit ", max_header_bytes()));
  if (channel >= kMaxChannels) return absl::InvalidArgumentError(absl::StrCat("channel ", channel));
  if (!Supports(payload.kind)) return absl::InvalidArgumentError("a seal is put on host memory only");
  const std::shared_ptr<Session> session = SessionOf(peer);
  if (session == nullptr) return absl::NotFoundError(absl::StrCat("peer ", peer.value, " is unknown or has failed"));
  auto sealed = StagingBuffer::Take(budget_, payload.bytes);
  if (sealed == nullptr)
    return absl::ResourceExhaustedError(absl::StrCat("no memory to seal ", payload.bytes, " bytes in"));

  Frame frame;
  frame.channel = channel;
  frame.by_initiator = session->we_began ? 1 : 0;
  frame.counter = session->next_counter.fetch_add(1);
  frame.payload_bytes = payload.bytes;
  frame.initiator = session->initiator;
  Tags tags;
  std::vector<uint8_t> head(kSealedBytes + header.size());
  internal::Seal(session->send_key(), SealPart::kHeader, frame.counter, BytesOf(frame), header,
                 head.data() + kSealedBytes, tags.header);
  internal::Seal(session->send_key(), SealPart::kPayload, frame.counter, PayloadPlace(frame, header),
                 {static_cast<const uint8_t*>(payload.data), payload.bytes}, sealed->data(), tags.payload);
  std::memcpy(head.data(), &frame, sizeof(frame));
  std::memcpy(head.data() + sizeof(frame), &tags, sizeof(tags));
  const ConstMemory travels(sealed->data(), payload.bytes);
  return inner()->SendMessage(peer, channel, head, travels,
                              [sealed = std::move(sealed), done = std::move(done)](absl::Status status) mutable {
                                sealed.reset();
                                if (done) done(std::move(status));
                              });
}

// The session that the frame names, once its header has opened with it and was not seen before; else null and why.
std::shared_ptr<Session> SealedTransport::OpenHeader(PeerId from, const Frame& frame, const Tags& tags,
                                                     absl::Span<const uint8_t> sealed, uint8_t* header,
                                                     const char*& why) {
  std::lock_guard lock(mu_);
  auto it = sessions_.find(from);
  std::shared_ptr<Session> session;
  if (it != sessions_.end()) session = frame.by_initiator != 0 ? it->second.theirs : it->second.ours;
  why = "seal_broken";
  const bool first = session == nullptr;
  if (first) {
    if (frame.by_initiator == 0) return nullptr;  // an answer to nothing that we began
    session = std::make_shared<Session>();
    session->initiator = frame.initiator;
    auto keys = SealKeys::Derive(pair_, frame.initiator, frame.initiator, pair_.public_key(), admission_);
    if (!keys.ok()) return nullptr;
    session->keys = *std::move(keys);
  } else if (session->initiator != frame.initiator) {
    return nullptr;
  }
  if (!internal::Open(session->receive_key(), SealPart::kHeader, frame.counter, BytesOf(frame), sealed, header,
                      tags.header)) {
    return nullptr;
  }
  why = "seal_replayed";
  if (first) {
    uint64_t begun = 0;
    std::memcpy(&begun, frame.initiator.data(), sizeof(begun));
    if (!begun_with_us_.insert(begun).second) return nullptr;
    begun_in_order_.push_back(begun);
    if (begun_in_order_.size() > kRememberedConnections) {
      begun_with_us_.erase(begun_in_order_.front());
      begun_in_order_.pop_front();
    }
    sessions_[from].theirs = session;
  }
  return session->window.Accept(frame.counter) ? session : nullptr;
}

Placement SealedTransport::OnSealed(const IncomingMessage& message, uint16_t channel, MessageHandler& handler) {
  Frame frame;
  Tags tags;
  if (message.header.size() < kSealedBytes) return Placement::Drop("not_sealed");
  std::memcpy(&frame, message.header.data(), sizeof(frame));
  if (frame.magic != Frame::kMagic || frame.version != 1) return Placement::Drop("not_sealed");
  if (frame.channel != channel || frame.payload_bytes != message.payload_bytes) return Placement::Drop("seal_broken");
  std::memcpy(&tags, message.header.data() + sizeof(frame), sizeof(tags));
  const absl::Span<const uint8_t> sealed = message.header.subspan(kSealedBytes);
  std::array<uint8_t, kMaxHeaderBytes> header;
  const char* why = "";
  if (sealed.size() > header.size()) return Placement::Drop("not_sealed");
  const std::shared_ptr<Session> session = OpenHeader(message.from, frame, tags, sealed, header.data(), why);
  if (session == nullptr) return Placement::Drop(why);

  IncomingMessage open = message;
  open.header = {header.data(), sealed.size()};
  open.payload = {};
  if (message.payload.size() == message.payload_bytes)
    return OnPayloadHere(open, message.payload, *session, frame, tags, handler);

  Placement placement = handler.OnMessage(open);
  if (placement.verdict != Placement::Verdict::kPlace) return placement;
  const Memory destination = placement.destination;
  CHECK(destination.kind == MemoryKind::kHost, "a seal is opened in host memory only");
  return Placement::Into(
      destination, [this, session, frame, tags, destination, place = PayloadPlace(frame, open.header),
                    done = std::move(placement.done)](absl::Status status) mutable {
        auto* const data = static_cast<uint8_t*>(destination.data);
        if (status.ok() && !internal::Open(session->receive_key(), SealPart::kPayload, frame.counter, place,
                                           {data, frame.payload_bytes}, data, tags.payload)) {
          broken_arrivals_.fetch_add(1);
          status = absl::DataLossError("seal broken: the payload is not what was sent to this place");
        }
        if (done) done(std::move(status));
      });
}

// A small payload came with its header: it is opened beside, so that the handler can use it where it is.
Placement SealedTransport::OnPayloadHere(const IncomingMessage& open, absl::Span<const uint8_t> sealed,
                                         const Session& session, const Frame& frame, const Tags& tags,
                                         MessageHandler& handler) {
  IncomingMessage message = open;
  opened_.resize(std::max(opened_.size(), sealed.size()));
  const bool intact = internal::Open(session.receive_key(), SealPart::kPayload, frame.counter,
                                     PayloadPlace(frame, open.header), sealed, opened_.data(), tags.payload);
  if (!intact && sealed.empty()) return Placement::Drop("seal_broken");
  if (intact) message.payload = {opened_.data(), sealed.size()};
  Placement placement = handler.OnMessage(message);
  if (!intact) {  // the handler knows which place to wait for again
    if (placement.verdict == Placement::Verdict::kPlace && placement.done)
      placement.done(absl::DataLossError("seal broken: the payload is not what was sent to this place"));
    return Placement::Drop("seal_broken");
  }
  if (placement.verdict != Placement::Verdict::kPlace || placement.destination.bytes < sealed.size()) return placement;
  const absl::Status copied = memory_.copy({placement.destination.data, sealed.size(), placement.destination.kind},
                                           {opened_.data(), sealed.size()});
  if (placement.done) placement.done(copied);
  return Placement::Consumed();
}

}  // namespace

std::unique_ptr<Transport> SealTransport(std::unique_ptr<Transport> inner, MemoryFunctions memory,
                                         size_t max_sealing_bytes) {
  return std::make_unique<SealedTransport>(std::move(inner), std::move(memory), max_sealing_bytes);
}

}  // namespace millrace::kvtransfer
