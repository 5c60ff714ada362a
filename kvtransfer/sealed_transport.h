// SPDX-License-Identifier: Apache-2.0
// Messages that nobody between two processes can read, change, repeat or move: a decorator of any transport.
//
// Every message is sealed with AES-256-GCM, header and payload each under a tag. Associated data is where the message
// stands: direction, connection, counter, channel and length for the header, and the whole header besides for the
// payload. A header names the place of what it brings (lease, epoch and extent of a block; caller, batch, piece and
// layer of expert rows), so bytes open only in the place that they were sealed for.
//
// Keys. Each transport makes an X25519 key pair and an admission secret when it starts, and both the public key and the
// secret are part of its address. Addresses travel in the cluster's control messages, under mutual TLS: that is what
// makes the keys in them authentic, and why sealing asks for TLS. Whoever connects makes a key pair for that connection
// alone, agrees with the address's public key on a secret (Diffie-Hellman), and both derive two session keys from it, a
// direction each, with the admission secret as salt. So a key is known to the two ends only, not to the router that
// passed the address on; a process that was not given the address is not admitted; a new connection has new keys and a
// new incarnation has new everything. Nonces are counters of a connection, so no key meets one twice.
//
// What does not open is dropped and counted (TransportStatistics::drops): "not_sealed", "seal_broken", "seal_replayed".
// A payload whose header opened is answered like one that was damaged: its arrival ends with DataLoss, so that the
// hand-off asks for it again. Sizes, times and who talks to whom are not hidden.
//
// Host memory only: what is on a device goes through staged_transport.h, above this. Sealing happens on the thread that
// sends, opening on the transport thread, in place where the payload has landed.
#pragma once

#include <memory>

#include "absl/strings/string_view.h"
#include "kvtransfer/transport.h"

namespace millrace::kvtransfer {

// At most `max_sealing_bytes` of sealed copies wait or travel at once; a send beyond that is ResourceExhausted, one
// larger message goes alone.
std::unique_ptr<Transport> SealTransport(std::unique_ptr<Transport> inner, MemoryFunctions memory,
                                         size_t max_sealing_bytes = size_t{1} << 30);

inline constexpr absl::string_view kSealedAddressMagic = "MRSEAL01";
inline bool IsSealedAddress(absl::string_view address) {
  return address.substr(0, kSealedAddressMagic.size()) == kSealedAddressMagic;
}

}  // namespace millrace::kvtransfer
