// SPDX-License-Identifier: Apache-2.0
// A decorator that breaks messages on purpose: drop, delay, reorder, duplicate, truncate, flip bits.
//
// Faults act on what this endpoint sends, before the transport beneath sees it, and are drawn from a seeded generator,
// so that a failing run can be run again. Connections, cancels and statistics pass through. Host memory only. For
// tests: no production code links to it by flag or default.
//
// Thread: as the transport beneath.
#pragma once

#include <cstdint>
#include <memory>

#include "kvtransfer/transport.h"

namespace millrace::kvtransfer {

// Probabilities in [0, 1], drawn for each message in this order; a dropped message meets no other fault.
struct FaultPlan {
  uint64_t seed = 1;
  uint64_t max_faults = ~0ull;  // after so many the transport is honest
  double drop = 0;              // completes with Ok and never arrives
  double fail = 0;              // completes with Unavailable and never arrives
  double truncate = 0;          // arrives shorter, by at least one byte
  double flip_payload = 0;      // one bit of the payload differs
  double flip_header = 0;       // one bit of the header differs
  double duplicate = 0;         // arrives twice
  double reorder = 0;           // leaves after the next message, or after `delay_up_to` if none follows
  double delay = 0;             // leaves late
  absl::Duration delay_up_to = absl::Milliseconds(20);
};

struct FaultCounts {
  uint64_t dropped = 0, failed = 0, truncated = 0, payload_flipped = 0, header_flipped = 0, duplicated = 0,
           reordered = 0, delayed = 0;
  uint64_t total() const {
    return dropped + failed + truncated + payload_flipped + header_flipped + duplicated + reordered + delayed;
  }
};

class FaultTransport : public Transport {
 public:
  static std::unique_ptr<FaultTransport> Wrap(std::unique_ptr<Transport> inner, FaultPlan plan);
  virtual void SetPlan(FaultPlan plan) = 0;  // restarts the generator and the count towards max_faults
  virtual FaultCounts counts() const = 0;
};

}  // namespace millrace::kvtransfer
