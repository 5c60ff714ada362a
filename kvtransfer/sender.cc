// SPDX-License-Identifier: Apache-2.0
// Sends, remembers and re-sends the extents of one hand-off; the contract is in sender.h.
//
// Extents whose digest is known wait in `ready`; Pump gives them to the transport while the hand-off's budget lasts,
// small ones gathered into one message. Completions free budget and pump again. The hand-off is idle when nothing is
// ready, on the wire or being digested; flushes and releases are answered then. Callbacks run without the lock.
#include "kvtransfer/sender.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvtransfer/extent_header.h"
#include "kvtransfer/status.h"

namespace millrace::kvtransfer {
namespace {

using internal::ExtentHeader;
using internal::PackedEntry;

// How soon to try again when the transport's queue for this peer is full and nothing of ours is on the wire, whose
// completion would tell.
constexpr absl::Duration kRetry = absl::Milliseconds(1);

struct Extent {
  ConstMemory source;
  uint64_t digest = 0;  // bound
  bool digested = false;
};

// What goes into one message.
struct Message {
  std::vector<uint64_t> extent_ids;
  size_t bytes = 0;
};

}  // namespace

struct Sender::State : public std::enable_shared_from_this<Sender::State> {
  State(Transport& t, PeerId p, LeaseKey k, SenderOptions o) : transport(t), peer(p), key(k), options(std::move(o)) {}

  Transport& transport;
  const PeerId peer;
  const LeaseKey key;
  const SenderOptions options;

  mutable std::mutex mu;
  std::map<uint64_t, Extent> extents;
  std::deque<Message> ready;
  Message pack;  // small extents waiting for company
  std::map<uint64_t, SendId> on_wire;
  uint64_t next_message = 0;
  size_t bytes_in_flight = 0;
  size_t launching = 0;  // messages between `ready` and `on_wire`
  size_t digesting = 0;
  bool retry_set = false;
  absl::Status error;  // the first; Cancelled after Cancel
  std::vector<absl::AnyInvocable<void(absl::Status)>> flushes;
  std::vector<absl::AnyInvocable<void()>> releases;
  SenderStatistics statistics;

  // With mu held.
  bool WireIdle() const { return on_wire.empty() && launching == 0 && digesting == 0; }
  bool Packs(const Extent& extent) const {
    return extent.source.kind == MemoryKind::kHost && extent.source.bytes < options.pack_below_bytes;
  }
  size_t PackedBytes() const { return pack.bytes + pack.extent_ids.size() * sizeof(PackedEntry); }
  void ClosePack() {
    if (pack.extent_ids.empty()) return;
    pack.bytes = PackedBytes();
    ready.push_back(std::exchange(pack, {}));
  }
  void MakeReady(uint64_t id, const Extent& extent) {
    if (!Packs(extent)) {
      ready.push_back({{id}, extent.source.bytes});
      return;
    }
    if (PackedBytes() + extent.source.bytes + sizeof(PackedEntry) > options.max_packed_bytes) ClosePack();
    pack.extent_ids.push_back(id);
    pack.bytes += extent.source.bytes;
  }
  void Fail(const absl::Status& why) {
    if (error.ok()) error = why;
    ready.clear();
    pack = {};
  }

  void Pump();
  bool Launch(uint64_t number, Message message);
  void Completed(uint64_t number, const Message& message, const absl::Status& status);
  void AnswerIfIdle();
  void Flush(absl::AnyInvocable<void(absl::Status)> done);
  void Cancel(absl::AnyInvocable<void()> released);
};

Sender::Sender(Transport& transport, PeerId peer, LeaseKey key, SenderOptions options)
    : state_(std::make_shared<State>(transport, peer, key, std::move(options))) {}

Sender::~Sender() {
  auto released = std::make_shared<std::atomic<bool>>(false);
  Cancel([released] { released->store(true, std::memory_order_release); });
  auto is_released = [&] { return released->load(std::memory_order_acquire); };
  if (state_->transport.WaitFor(is_released, state_->options.release_grace)) return;
  // The peer does not take what is on the wire. The sources belong to our caller, who must have them back.
  state_->transport.Disconnect(state_->peer, nullptr);
  state_->transport.WaitFor(is_released, absl::InfiniteDuration());
}

absl::Status Sender::Send(uint64_t extent_id, ConstMemory source) {
  {
    std::lock_guard lock(state_->mu);
    RETURN_IF_ERROR(state_->error);
    if (!state_->extents.try_emplace(extent_id, Extent{source}).second) {
      return absl::AlreadyExistsError(
          absl::StrCat("lease ", absl::Hex(state_->key.lease), ": extent ", extent_id, " was sent before"));
    }
    ++state_->digesting;
  }
  state_->options.memory.digest(source, [self = state_, extent_id](absl::StatusOr<uint64_t> content) {
    {
      std::lock_guard lock(self->mu);
      --self->digesting;
      Extent& extent = self->extents[extent_id];
      if (!content.ok()) {
        self->Fail(content.status());
      } else {
        extent.digest = BindDigest(*content, self->key, extent_id, extent.source.bytes);
        extent.digested = true;
        if (self->error.ok()) self->MakeReady(extent_id, extent);
      }
    }
    self->Pump();
    self->AnswerIfIdle();
  });
  return absl::OkStatus();
}

absl::Status Sender::Resend(absl::Span<const uint64_t> extent_ids) {
  {
    std::lock_guard lock(state_->mu);
    RETURN_IF_ERROR(state_->error);
    for (uint64_t id : extent_ids) {
      auto it = state_->extents.find(id);
      if (it == state_->extents.end() || !it->second.digested) {
        return absl::NotFoundError(
            absl::StrCat("lease ", absl::Hex(state_->key.lease), ": extent ", id, " was never sent"));
      }
    }
    for (uint64_t id : extent_ids) state_->MakeReady(id, state_->extents[id]);
    state_->ClosePack();
    state_->statistics.extents_resent += extent_ids.size();
  }
  state_->Pump();
  return absl::OkStatus();
}

// Gives messages to the transport while the budget lasts. Any thread; several may pump at once.
void Sender::State::Pump() {
  while (true) {
    Message message;
    uint64_t number = 0;
    {
      std::lock_guard lock(mu);
      if (ready.empty()) return;
      const bool room = bytes_in_flight == 0 || bytes_in_flight + ready.front().bytes <= options.max_in_flight_bytes;
      if (!room) return;
      message = std::move(ready.front());
      ready.pop_front();
      bytes_in_flight += message.bytes;
      ++launching;
      number = ++next_message;
    }
    if (!Launch(number, std::move(message))) return;
  }
}

// False: the transport has no room; the message is ready again and a retry is set.
bool Sender::State::Launch(uint64_t number, Message message) {
  ExtentHeader header;
  header.digest_algorithm = options.memory.digest_algorithm;
  header.num_extents = static_cast<uint32_t>(message.extent_ids.size());
  header.lease = key.lease;
  header.epoch = key.epoch;
  header.bytes = message.bytes;
  ConstMemory payload;
  std::unique_ptr<uint8_t[]> gathered;
  {
    std::lock_guard lock(mu);
    const Extent& first = extents[message.extent_ids.front()];
    if (!Packs(first)) {
      header.extent_id = message.extent_ids.front();
      header.digest = first.digest;
      payload = first.source;
    } else {
      header.form = ExtentHeader::kPacked;
      gathered = std::make_unique<uint8_t[]>(message.bytes);
      uint8_t* entry_at = gathered.get();
      uint8_t* bytes_at = gathered.get() + message.extent_ids.size() * sizeof(PackedEntry);
      for (uint64_t id : message.extent_ids) {
        const Extent& extent = extents[id];
        const PackedEntry entry{id, extent.source.bytes, extent.digest};
        std::memcpy(entry_at, &entry, sizeof(entry));
        if (extent.source.bytes != 0) std::memcpy(bytes_at, extent.source.data, extent.source.bytes);
        entry_at += sizeof(entry);
        bytes_at += extent.source.bytes;
      }
      header.digest = ContentDigest(gathered.get(), message.extent_ids.size() * sizeof(PackedEntry));
      payload = {gathered.get(), message.bytes};
    }
  }
  header.Seal();
  // The transport may complete the message before SendMessage returns; `on_wire` gets its id only if it has not.
  const absl::Span<const uint8_t> header_bytes(reinterpret_cast<const uint8_t*>(&header), sizeof(header));
  {
    std::lock_guard lock(mu);
    on_wire[number] = {};
    --launching;
  }
  absl::StatusOr<SendId> sent =
      transport.SendMessage(peer, options.channel, header_bytes, payload,
                            [self = shared_from_this(), number, message, gathered = std::move(gathered)](
                                absl::Status status) { self->Completed(number, message, status); });
  bool cancel = false;
  {
    std::lock_guard lock(mu);
    auto it = on_wire.find(number);
    if (sent.ok()) {
      statistics.extents_sent += message.extent_ids.size();
      statistics.messages += 1;
      statistics.bytes += message.bytes;
      if (it != on_wire.end()) it->second = *sent;
      cancel = it != on_wire.end() && absl::IsCancelled(error);
    } else {
      on_wire.erase(it);
      bytes_in_flight -= message.bytes;
      if (absl::IsResourceExhausted(sent.status()) && error.ok()) {
        ready.push_front(std::move(message));
        if (std::exchange(retry_set, true)) return false;
      } else {
        Fail(absl::IsNotFound(sent.status()) ? absl::UnavailableError(sent.status().message()) : sent.status());
      }
    }
  }
  if (cancel) transport.Cancel(*sent);
  if (sent.ok()) return true;
  if (!absl::IsResourceExhausted(sent.status())) {
    AnswerIfIdle();
    return true;
  }
  transport.RunAfter(kRetry, [self = shared_from_this()] {
    {
      std::lock_guard lock(self->mu);
      self->retry_set = false;
    }
    self->Pump();
    self->AnswerIfIdle();
  });
  return false;
}

void Sender::State::Completed(uint64_t number, const Message& message, const absl::Status& status) {
  {
    std::lock_guard lock(mu);
    on_wire.erase(number);
    bytes_in_flight -= message.bytes;
    if (!status.ok()) Fail(status);
  }
  Pump();
  AnswerIfIdle();
}

void Sender::State::AnswerIfIdle() {
  std::vector<absl::AnyInvocable<void(absl::Status)>> flushed;
  std::vector<absl::AnyInvocable<void()>> released;
  absl::Status outcome;
  {
    std::lock_guard lock(mu);
    if (!WireIdle() || !ready.empty()) return;
    flushed = std::exchange(flushes, {});
    released = std::exchange(releases, {});
    outcome = error;
  }
  for (auto& callback : flushed) callback(outcome);
  for (auto& callback : released) callback();
}

void Sender::State::Flush(absl::AnyInvocable<void(absl::Status)> done) {
  {
    std::lock_guard lock(mu);
    ClosePack();
    flushes.push_back(std::move(done));
  }
  Pump();
  AnswerIfIdle();
}

void Sender::State::Cancel(absl::AnyInvocable<void()> released) {
  std::vector<SendId> sends;
  {
    std::lock_guard lock(mu);
    Fail(absl::CancelledError("hand-off cancelled by the sender"));
    if (released) releases.push_back(std::move(released));
    for (const auto& [number, send] : on_wire) {
      if (send.value != 0) sends.push_back(send);
    }
  }
  for (SendId send : sends) transport.Cancel(send);
  AnswerIfIdle();
}

void Sender::Flush(absl::AnyInvocable<void(absl::Status)> done) { state_->Flush(std::move(done)); }

absl::Status Sender::FlushAndWait(absl::Duration timeout) {
  struct Outcome {
    std::atomic<bool> over{false};
    absl::Status status;
  };
  auto outcome = std::make_shared<Outcome>();
  Flush([outcome](absl::Status status) {
    outcome->status = std::move(status);
    outcome->over.store(true, std::memory_order_release);
  });
  if (state_->transport.WaitFor([&] { return outcome->over.load(std::memory_order_acquire); }, timeout))
    return outcome->status;
  return absl::DeadlineExceededError(
      absl::StrCat("lease ", absl::Hex(state_->key.lease), ": not all sent after ", absl::FormatDuration(timeout)));
}

absl::StatusOr<Manifest> Sender::BuildManifest(std::string metadata) {
  Manifest manifest;
  {
    std::lock_guard lock(state_->mu);
    RETURN_IF_ERROR(state_->error);
    if (state_->digesting != 0)
      return absl::UnavailableError(absl::StrCat(state_->digesting, " digests are pending: flush first"));
    state_->ClosePack();
    manifest.key = state_->key;
    manifest.digest_algorithm = state_->options.memory.digest_algorithm;
    manifest.metadata = std::move(metadata);
    manifest.extents.reserve(state_->extents.size());
    for (const auto& [id, extent] : state_->extents)
      manifest.extents.push_back({id, extent.source.bytes, extent.digest});
  }
  state_->Pump();
  Seal(manifest);
  return manifest;
}

void Sender::Cancel(absl::AnyInvocable<void()> released) { state_->Cancel(std::move(released)); }

absl::Status Sender::status() const {
  std::lock_guard lock(state_->mu);
  return state_->error;
}

SenderStatistics Sender::statistics() const {
  std::lock_guard lock(state_->mu);
  SenderStatistics statistics = state_->statistics;
  for (const Message& message : state_->ready) statistics.extents_waiting += message.extent_ids.size();
  statistics.extents_waiting += state_->pack.extent_ids.size();
  statistics.bytes_in_flight = state_->bytes_in_flight;
  return statistics;
}

}  // namespace millrace::kvtransfer
