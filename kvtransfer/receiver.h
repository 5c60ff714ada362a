// SPDX-License-Identifier: Apache-2.0
// The receiving side of hand-offs: place, prove, and either all of it or nothing.
//
// Open tells which extents of a lease may arrive and where each one lands. From then on messages for exactly that
// (lease, epoch) are placed, digested on arrival and ticked off; all others are dropped and counted. Verify compares
// the sender's manifest with what has been proved. Fence ends the lease: two lifetimes meet there, the owner's, which
// has just ended, and the transfers', which end when the last pending arrival has; only then may the memory be reused.
// Memory that was verified is never written again: a duplicate of a proved extent is dropped.
//
// One Receiver serves all leases of a process on one channel. It knows nothing of what extents mean.
//
// Threads: any. OnMessage and digests run on the transport thread. Must outlive the transport's use of it: destroy it
// after Transport::Close, or after every lease was fenced and SetHandler took it away (the destructor does the latter).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kvtransfer/digest.h"
#include "kvtransfer/manifest.h"
#include "kvtransfer/memory.h"
#include "kvtransfer/transport.h"

namespace millrace::kvtransfer {

inline constexpr uint16_t kHandoffChannel = 1;

struct ExpectedExtent {
  uint64_t extent_id = 0;
  Memory destination;  // its size is the only length accepted
};

struct ReceiverOptions {
  uint16_t channel = kHandoffChannel;
  MemoryFunctions memory = HostMemoryFunctions();
  size_t max_leases = 4096;
  size_t max_extents_per_lease = 1u << 20;
  // A packed message (sender.h) is gathered here before its extents are proved and copied; one larger is dropped.
  size_t max_packed_bytes = 1u << 20;
  // How long Fence waits for arrivals to end by themselves before it disconnects the peers they come from.
  absl::Duration fence_grace = absl::Milliseconds(500);
};

struct ReceiverStatistics {
  uint64_t leases_open = 0, leases_fencing = 0;
  uint64_t extents_proved = 0, bytes_proved = 0;
  uint64_t messages_packed = 0;                         // messages that carried several extents
  absl::flat_hash_map<std::string, uint64_t> rejected;  // extents by reason: not_live, stale_epoch, unknown_extent,
                                                        // wrong_length, duplicate, digest_mismatch, bad_header,
                                                        // bad_algorithm, fenced, seal_broken, transfer_failed,
                                                        // manifest_mismatch
};

// What is known about a lease against its manifest.
struct VerifyResult {
  bool complete = false;
  std::vector<uint64_t> resend;  // ascending; empty when complete
};

class Receiver final : public MessageHandler {
 public:
  // Takes the channel of `transport`, which must outlive this object.
  explicit Receiver(Transport& transport, ReceiverOptions options = {});
  ~Receiver() override;  // CHECK-fails while a fenced or open lease still has arrivals pending
  Receiver(const Receiver&) = delete;
  Receiver& operator=(const Receiver&) = delete;

  // Makes a lease live. The destinations must stay valid until its fence. AlreadyExists: that lease is open or being
  // fenced, in whatever epoch. InvalidArgument: an extent id repeated. ResourceExhausted: limits.
  absl::Status Open(LeaseKey key, std::vector<ExpectedExtent> extents);

  // Compares the manifest with what arrived. Complete: every extent was proved with the manifest's digest, and from now
  // on nothing more is accepted for this lease. Otherwise the extents to send again, each of which may now arrive once
  // more; extents still in flight are listed too. Idempotent. NotFound: lease not live; FailedPrecondition: stale
  // epoch; else CheckManifest's errors. Aborted: a second manifest with other contents after a complete one.
  absl::StatusOr<VerifyResult> Verify(const Manifest& manifest);

  // Ends a lease of any epoch. At once no new message is accepted; `fenced` is called, on the calling or the transport
  // thread, when none can write its memory any more. Fencing an unknown lease answers at once; fencing twice answers
  // both. Bounded: see fence_grace.
  void Fence(uint64_t lease, absl::AnyInvocable<void()> fenced);

  // The same, blocking; not from callbacks. False: not within `timeout`, the memory must stay quarantined (the fence
  // goes on and a later call may find it done).
  bool FenceAndWait(uint64_t lease, absl::Duration timeout);

  // Proved extents and bytes of a live lease; nullopt-like zeroes otherwise.
  struct Progress {
    uint64_t extents = 0, bytes = 0, expected_extents = 0, expected_bytes = 0, arriving = 0;
  };
  Progress progress(uint64_t lease) const;
  ReceiverStatistics statistics() const;

  Placement OnMessage(const IncomingMessage& message) override;  // Transport calls this

 private:
  struct State;
  std::shared_ptr<State> state_;  // shared with digest callbacks, which may answer from another thread
};

}  // namespace millrace::kvtransfer
