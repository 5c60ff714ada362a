// SPDX-License-Identifier: Apache-2.0
// Places, proves and fences the extents of hand-offs; the contract is in receiver.h.
//
// An extent goes missing -> arriving -> proved, and back to missing when its transfer fails or its digest is wrong. A
// lease counts what is pending on it: arrivals that the transport still owns and digests that still read. A fence is
// over when that count is zero. User callbacks run without the lock.
#include "kvtransfer/receiver.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvtransfer/extent_header.h"
#include "kvtransfer/status.h"

namespace millrace::kvtransfer {
namespace {

using internal::ExtentHeader;
using internal::PackedEntry;

// Packed messages under way may hold this much memory of ours in all: 64 senders with one full message each. Beyond it
// they are dropped, counted, and sent again after Verify.
constexpr size_t kMaxGatherBytes = 64u << 20;

// Why an arrival that ended in error counts as rejected.
const char* WhyNotArrived(const absl::Status& status, bool fencing) {
  if (fencing) return "fenced";
  return absl::IsDataLoss(status) ? "seal_broken" : "transfer_failed";
}

struct Extent {
  enum State : uint8_t { kMissing, kArriving, kProved };
  uint64_t id = 0;
  Memory destination;
  State state = kMissing;
  uint64_t digest = 0;  // bound; meaningful when proved
};

struct Lease {
  LeaseKey key;
  uint64_t serial = 0;          // tells this life of the lease from a later one
  std::vector<Extent> extents;  // ascending id
  uint64_t proved = 0, proved_bytes = 0, expected_bytes = 0;
  uint64_t pending = 0;
  absl::flat_hash_map<PeerId, uint64_t> pending_by_peer;
  bool complete = false;
  uint64_t whole_digest = 0;  // of the manifest that made it complete
  bool fencing = false;
  std::vector<absl::AnyInvocable<void()>> fenced;

  Extent* Find(uint64_t id) {
    auto it = std::lower_bound(extents.begin(), extents.end(), id,
                               [](const Extent& e, uint64_t want) { return e.id < want; });
    return it != extents.end() && it->id == id ? &*it : nullptr;
  }
};

}  // namespace

struct Receiver::State : public std::enable_shared_from_this<Receiver::State> {
  State(Transport& t, ReceiverOptions o) : transport(t), options(std::move(o)) {}

  Transport& transport;
  const ReceiverOptions options;

  mutable std::mutex mu;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Lease>> leases;
  uint64_t next_serial = 0;
  size_t gather_bytes = 0;
  ReceiverStatistics statistics;

  // With mu held.
  Placement Reject(const char* reason, uint64_t extents = 1) {
    statistics.rejected[reason] += extents;
    return Placement::Drop(reason);
  }
  const char* WhyNotLive(LeaseKey key) {
    auto it = leases.find(key.lease);
    if (it == leases.end()) return "not_live";
    if (it->second->key.epoch != key.epoch) return "stale_epoch";
    return it->second->fencing ? "fenced" : nullptr;
  }
  Lease* FindLife(LeaseKey key, uint64_t serial) {
    auto it = leases.find(key.lease);
    return it != leases.end() && it->second->serial == serial ? it->second.get() : nullptr;
  }
  static const char* WhyNotWanted(const Extent* extent, uint64_t bytes) {
    if (extent == nullptr) return "unknown_extent";
    if (extent->destination.bytes != bytes) return "wrong_length";
    return extent->state == Extent::kMissing ? nullptr : "duplicate";
  }
  void BeginPending(Lease& lease, PeerId from) {
    ++lease.pending;
    ++lease.pending_by_peer[from];
  }
  void Prove(Lease& lease, Extent& extent, uint64_t bound_digest) {
    extent.state = Extent::kProved;
    extent.digest = bound_digest;
    ++lease.proved;
    lease.proved_bytes += extent.destination.bytes;
    ++statistics.extents_proved;
    statistics.bytes_proved += extent.destination.bytes;
  }

  Placement OnSingle(PeerId from, const ExtentHeader& header, size_t payload_bytes);
  Placement OnPacked(const IncomingMessage& message, const ExtentHeader& header);
  void Arrived(LeaseKey key, uint64_t serial, PeerId from, uint64_t extent_id, uint64_t expected_digest,
               const absl::Status& status);
  void Digested(LeaseKey key, uint64_t serial, PeerId from, uint64_t extent_id, uint64_t expected_digest,
                absl::StatusOr<uint64_t> content_digest);
  void Scatter(LeaseKey key, uint64_t serial, const ExtentHeader& header, absl::Span<const uint8_t> payload);
  bool EndPending(Lease& lease, PeerId from, std::vector<absl::AnyInvocable<void()>>& fenced);
  void BreakFence(LeaseKey key, uint64_t serial);
};

Receiver::Receiver(Transport& transport, ReceiverOptions options)
    : state_(std::make_shared<State>(transport, std::move(options))) {
  transport.SetHandler(state_->options.channel, this);
}

Receiver::~Receiver() {
  state_->transport.SetHandler(state_->options.channel, nullptr);
  std::lock_guard lock(state_->mu);
  for (const auto& [id, lease] : state_->leases)
    CHECK(lease->pending == 0, absl::StrCat("receiver destroyed with arrivals pending on lease ", absl::Hex(id)));
}

absl::Status Receiver::Open(LeaseKey key, std::vector<ExpectedExtent> extents) {
  if (extents.size() > state_->options.max_extents_per_lease) {
    return absl::ResourceExhaustedError(absl::StrCat("lease ", absl::Hex(key.lease), ": ", extents.size(),
                                                     " extents, limit ", state_->options.max_extents_per_lease));
  }
  auto lease = std::make_unique<Lease>();
  lease->key = key;
  lease->extents.reserve(extents.size());
  std::sort(extents.begin(), extents.end(),
            [](const ExpectedExtent& a, const ExpectedExtent& b) { return a.extent_id < b.extent_id; });
  for (const ExpectedExtent& extent : extents) {
    if (!lease->extents.empty() && lease->extents.back().id == extent.extent_id) {
      return absl::InvalidArgumentError(
          absl::StrCat("lease ", absl::Hex(key.lease), ": extent ", extent.extent_id, " given twice"));
    }
    lease->extents.push_back({extent.extent_id, extent.destination});
    lease->expected_bytes += extent.destination.bytes;
  }
  std::lock_guard lock(state_->mu);
  if (state_->leases.size() >= state_->options.max_leases)
    return absl::ResourceExhaustedError(absl::StrCat(state_->leases.size(), " leases open, limit reached"));
  if (auto it = state_->leases.find(key.lease); it != state_->leases.end()) {
    return absl::AlreadyExistsError(
        absl::StrCat("lease ", absl::Hex(key.lease), it->second->fencing ? " is being fenced" : " is open"));
  }
  lease->serial = ++state_->next_serial;
  state_->leases[key.lease] = std::move(lease);
  return absl::OkStatus();
}

Placement Receiver::OnMessage(const IncomingMessage& message) {
  const auto header = internal::ParseExtentHeader(message.header);
  std::lock_guard lock(state_->mu);
  if (!header) return state_->Reject("bad_header");
  if (header->digest_algorithm != state_->options.memory.digest_algorithm)
    return state_->Reject("bad_algorithm", header->num_extents);
  if (header->bytes != message.payload_bytes) return state_->Reject("wrong_length", header->num_extents);
  if (const char* why = state_->WhyNotLive(header->key())) return state_->Reject(why, header->num_extents);
  return header->form == ExtentHeader::kPacked ? state_->OnPacked(message, *header)
                                               : state_->OnSingle(message.from, *header, message.payload_bytes);
}

Placement Receiver::State::OnSingle(PeerId from, const ExtentHeader& header, size_t payload_bytes) {
  Lease& lease = *leases[header.lease];
  Extent* extent = lease.Find(header.extent_id);
  if (const char* why = WhyNotWanted(extent, payload_bytes)) return Reject(why);
  extent->state = Extent::kArriving;
  BeginPending(lease, from);
  return Placement::Into(extent->destination, [self = shared_from_this(), key = lease.key, serial = lease.serial, from,
                                               id = extent->id, digest = header.digest](absl::Status status) {
    self->Arrived(key, serial, from, id, digest, status);
  });
}

void Receiver::State::Arrived(LeaseKey key, uint64_t serial, PeerId from, uint64_t extent_id, uint64_t expected_digest,
                              const absl::Status& status) {
  ConstMemory content;
  bool fencing = false;
  {
    std::lock_guard lock(mu);
    Lease* lease = FindLife(key, serial);
    CHECK(lease != nullptr, "a lease with pending arrivals was forgotten");
    content = lease->Find(extent_id)->destination;
    fencing = lease->fencing;
  }
  if (!status.ok()) return Digested(key, serial, from, extent_id, expected_digest, status);
  if (fencing) return Digested(key, serial, from, extent_id, expected_digest, absl::CancelledError("fenced"));
  options.memory.digest(content, [self = shared_from_this(), key, serial, from, extent_id,
                                  expected_digest](absl::StatusOr<uint64_t> digest) {
    self->Digested(key, serial, from, extent_id, expected_digest, std::move(digest));
  });
}

void Receiver::State::Digested(LeaseKey key, uint64_t serial, PeerId from, uint64_t extent_id, uint64_t expected_digest,
                               absl::StatusOr<uint64_t> content_digest) {
  std::vector<absl::AnyInvocable<void()>> fenced;
  {
    std::lock_guard lock(mu);
    Lease& lease = *FindLife(key, serial);
    Extent& extent = *lease.Find(extent_id);
    extent.state = Extent::kMissing;
    if (!content_digest.ok()) {
      ++statistics.rejected[WhyNotArrived(content_digest.status(), lease.fencing)];
    } else if (BindDigest(*content_digest, key, extent_id, extent.destination.bytes) != expected_digest) {
      ++statistics.rejected["digest_mismatch"];
    } else {
      Prove(lease, extent, expected_digest);
    }
    EndPending(lease, from, fenced);
  }
  for (auto& callback : fenced) callback();
}

// Small extents come many to a message. They are proved where they arrived and copied from there, so that a destination
// is only ever written with proved bytes.
Placement Receiver::State::OnPacked(const IncomingMessage& message, const ExtentHeader& header) {
  const size_t bytes = message.payload_bytes;
  if (bytes > options.max_packed_bytes || header.num_extents > bytes / sizeof(PackedEntry))
    return Reject("wrong_length", header.num_extents);
  Lease& lease = *leases[header.lease];
  ++statistics.messages_packed;
  if (message.payload.size() == bytes && bytes != 0) {
    Scatter(lease.key, lease.serial, header, message.payload);
    return Placement::Consumed();
  }
  if (gather_bytes + bytes > kMaxGatherBytes) return Reject("no_gather_memory", header.num_extents);
  gather_bytes += bytes;
  BeginPending(lease, message.from);
  auto gathered = std::make_unique<uint8_t[]>(bytes);
  Memory destination{gathered.get(), bytes, MemoryKind::kHost};
  return Placement::Into(destination, [self = shared_from_this(), gathered = std::move(gathered), bytes, header,
                                       serial = lease.serial, from = message.from](absl::Status status) {
    std::vector<absl::AnyInvocable<void()>> fenced;
    {
      std::lock_guard lock(self->mu);
      self->gather_bytes -= bytes;
      Lease& arrived = *self->FindLife(header.key(), serial);
      if (!status.ok() || arrived.fencing)
        self->statistics.rejected[WhyNotArrived(status, arrived.fencing)] += header.num_extents;
      else
        self->Scatter(header.key(), serial, header, {gathered.get(), bytes});
      self->EndPending(arrived, from, fenced);
    }
    for (auto& callback : fenced) callback();
  });
}

// With mu held: what is copied is at most max_packed_bytes, and the lease cannot be fenced in the middle.
void Receiver::State::Scatter(LeaseKey key, uint64_t serial, const ExtentHeader& header,
                              absl::Span<const uint8_t> payload) {
  const size_t table_bytes = header.num_extents * sizeof(PackedEntry);
  if (ContentDigest(payload.data(), table_bytes) != header.digest) {
    statistics.rejected["digest_mismatch"] += header.num_extents;
    return;
  }
  Lease& lease = *FindLife(key, serial);
  absl::Span<const uint8_t> content = payload.subspan(table_bytes);
  for (uint32_t i = 0; i < header.num_extents; ++i) {
    PackedEntry entry;
    std::memcpy(&entry, payload.data() + i * sizeof(entry), sizeof(entry));
    if (entry.bytes > content.size()) {
      statistics.rejected["wrong_length"] += header.num_extents - i;
      return;
    }
    const absl::Span<const uint8_t> bytes = content.first(entry.bytes);
    content.remove_prefix(entry.bytes);
    Extent* extent = lease.Find(entry.extent_id);
    const char* why = WhyNotWanted(extent, entry.bytes);
    if (why == nullptr &&
        BindDigest(ContentDigest(bytes.data(), bytes.size()), key, entry.extent_id, entry.bytes) != entry.digest)
      why = "digest_mismatch";
    if (why == nullptr && !options.memory.copy(extent->destination, {bytes.data(), bytes.size()}).ok())
      why = "transfer_failed";
    if (why == nullptr)
      Prove(lease, *extent, entry.digest);
    else
      ++statistics.rejected[why];
  }
}

// With mu held. True when this ended a fence: the lease is gone and `fenced` is to be called without the lock.
bool Receiver::State::EndPending(Lease& lease, PeerId from, std::vector<absl::AnyInvocable<void()>>& fenced) {
  --lease.pending;
  if (auto it = lease.pending_by_peer.find(from); --it->second == 0) lease.pending_by_peer.erase(it);
  if (!lease.fencing || lease.pending != 0) return false;
  fenced = std::move(lease.fenced);
  leases.erase(lease.key.lease);
  return true;
}

absl::StatusOr<VerifyResult> Receiver::Verify(const Manifest& manifest) {
  std::lock_guard lock(state_->mu);
  auto it = state_->leases.find(manifest.key.lease);
  if (it == state_->leases.end() || it->second->fencing)
    return absl::NotFoundError(absl::StrCat("lease ", absl::Hex(manifest.key.lease), " is not live"));
  Lease& lease = *it->second;
  std::vector<ExpectedLength> expected;
  expected.reserve(lease.extents.size());
  for (const Extent& extent : lease.extents) expected.push_back({extent.id, extent.destination.bytes});
  RETURN_IF_ERROR(CheckManifest(manifest, lease.key, state_->options.memory.digest_algorithm, expected));
  if (lease.complete && lease.whole_digest != manifest.whole_digest) {
    return absl::AbortedError(absl::StrCat("lease ", absl::Hex(lease.key.lease),
                                           ": a second manifest with other contents than the one that was complete"));
  }
  VerifyResult result;
  for (size_t i = 0; i < lease.extents.size(); ++i) {
    Extent& extent = lease.extents[i];
    if (extent.state == Extent::kProved && extent.digest == manifest.extents[i].digest) continue;
    if (extent.state == Extent::kProved) {  // proved against its message, but the manifest says other bytes
      extent.state = Extent::kMissing;
      --lease.proved;
      lease.proved_bytes -= extent.destination.bytes;
      ++state_->statistics.rejected["manifest_mismatch"];
    }
    result.resend.push_back(extent.id);
  }
  result.complete = result.resend.empty();
  if (result.complete) lease.complete = true, lease.whole_digest = manifest.whole_digest;
  return result;
}

void Receiver::Fence(uint64_t lease_id, absl::AnyInvocable<void()> fenced) {
  {
    std::unique_lock lock(state_->mu);
    auto it = state_->leases.find(lease_id);
    if (it != state_->leases.end() && it->second->pending != 0) {
      Lease& lease = *it->second;
      lease.fenced.push_back(std::move(fenced));
      if (std::exchange(lease.fencing, true)) return;
      const LeaseKey key = lease.key;
      const uint64_t serial = lease.serial;
      lock.unlock();
      state_->transport.RunAfter(state_->options.fence_grace, [weak = std::weak_ptr<State>(state_), key, serial] {
        if (auto self = weak.lock()) self->BreakFence(key, serial);
      });
      return;
    }
    if (it != state_->leases.end()) state_->leases.erase(it);
  }
  if (fenced) fenced();
}

// The arrivals did not end by themselves: their peers hang. Ending the connections ends them.
void Receiver::State::BreakFence(LeaseKey key, uint64_t serial) {
  std::vector<PeerId> peers;
  {
    std::lock_guard lock(mu);
    Lease* lease = FindLife(key, serial);
    if (lease == nullptr) return;
    for (const auto& [peer, count] : lease->pending_by_peer) peers.push_back(peer);
  }
  for (PeerId peer : peers) transport.Disconnect(peer, nullptr);
}

bool Receiver::FenceAndWait(uint64_t lease, absl::Duration timeout) {
  auto over = std::make_shared<std::atomic<bool>>(false);
  Fence(lease, [over] { over->store(true, std::memory_order_release); });
  return state_->transport.WaitFor([&] { return over->load(std::memory_order_acquire); }, timeout);
}

Receiver::Progress Receiver::progress(uint64_t lease_id) const {
  std::lock_guard lock(state_->mu);
  auto it = state_->leases.find(lease_id);
  if (it == state_->leases.end()) return {};
  const Lease& lease = *it->second;
  return {lease.proved, lease.proved_bytes, lease.extents.size(), lease.expected_bytes, lease.pending};
}

ReceiverStatistics Receiver::statistics() const {
  std::lock_guard lock(state_->mu);
  ReceiverStatistics statistics = state_->statistics;
  for (const auto& [id, lease] : state_->leases)
    ++(lease->fencing ? statistics.leases_fencing : statistics.leases_open);
  return statistics;
}

}  // namespace millrace::kvtransfer
