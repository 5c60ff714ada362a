// SPDX-License-Identifier: Apache-2.0
// The sending side of one hand-off: send extents, remember their digests, send again what the receiver asks for.
//
// Send is called for each extent as soon as it is final, while later ones are still being computed. The sender keeps
// the source's address until the hand-off ends, because the receiver may ask again; BuildManifest then says what was
// sent. Neighbours below pack_below_bytes travel together in one message, so that many small extents do not cost a
// message each. An Ok from Flush says that the transport let go of the bytes; only the receiver's Verify says that they
// are right.
//
// Ownership: source memory is the caller's and must not change or go away until the sender is destroyed or Cancel's
// callback has run. Threads: any; callbacks on the transport thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kvtransfer/digest.h"
#include "kvtransfer/manifest.h"
#include "kvtransfer/memory.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/transport.h"

namespace millrace::kvtransfer {

struct SenderOptions {
  uint16_t channel = kHandoffChannel;
  MemoryFunctions memory = HostMemoryFunctions();
  size_t max_in_flight_bytes = 128u << 20;  // of this hand-off; the rest waits here
  size_t pack_below_bytes = 16u << 10;      // host extents smaller than this are gathered; 0 never
  size_t max_packed_bytes = 256u << 10;     // at most the receiver's
  // The destructor waits this long for the wire to let go of the sources, then disconnects the peer.
  absl::Duration release_grace = absl::Milliseconds(500);
};

struct SenderStatistics {
  uint64_t extents_sent = 0, extents_resent = 0, messages = 0, bytes = 0;
  uint64_t extents_waiting = 0, bytes_in_flight = 0;
};

class Sender {
 public:
  // `transport` must outlive the sender.
  Sender(Transport& transport, PeerId peer, LeaseKey key, SenderOptions options = {});
  ~Sender();  // cancels; returns when the wire has let go of every source; not from callbacks
  Sender(const Sender&) = delete;
  Sender& operator=(const Sender&) = delete;

  // Digests the extent (on the calling thread for host memory) and sends it, now or when there is room. AlreadyExists:
  // id sent before. Cancelled, or the hand-off's first error (Unavailable: the peer is gone): nothing was taken.
  absl::Status Send(uint64_t extent_id, ConstMemory source);

  // Sends extents again, with the digests of the first time. NotFound: never sent.
  absl::Status Resend(absl::Span<const uint64_t> extent_ids);

  // Calls back once everything sent so far has left, with Ok or the hand-off's first error. Small extents that wait for
  // company leave now. Call it, or BuildManifest, after the last Send.
  void Flush(absl::AnyInvocable<void(absl::Status)> done);
  absl::Status FlushAndWait(absl::Duration timeout);  // DeadlineExceeded; not from callbacks

  // All extents sent so far, sealed. Fails with the hand-off's first error, or Unavailable while a digest is pending
  // (device memory only; Flush first).
  absl::StatusOr<Manifest> BuildManifest(std::string metadata);

  // Nothing more is sent. `released` (may be null) is called when the wire has let go of every source: at once if idle.
  // An abort still has to be said to the receiver by the control plane.
  void Cancel(absl::AnyInvocable<void()> released);

  absl::Status status() const;  // Ok, or the first error
  SenderStatistics statistics() const;

 private:
  struct State;
  std::shared_ptr<State> state_;  // shared with completion callbacks
};

}  // namespace millrace::kvtransfer
