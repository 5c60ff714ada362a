// SPDX-License-Identifier: Apache-2.0
// 128 random bits that name one start of one process, so that what an earlier start left behind is recognised.
//
// Thread: values, no state.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/str_format.h"
#include "millrace/v1/types.pb.h"

namespace millrace {

struct IncarnationId {
  uint64_t high = 0;
  uint64_t low = 0;

  static IncarnationId Random();  // from the kernel; CHECK-fails if it has no randomness
  static IncarnationId From(const v1::Incarnation& proto) { return {proto.high(), proto.low()}; }

  void To(v1::Incarnation* proto) const {
    proto->set_high(high);
    proto->set_low(low);
  }
  v1::Incarnation ToProto() const {
    v1::Incarnation proto;
    To(&proto);
    return proto;
  }
  bool empty() const { return high == 0 && low == 0; }
  std::string ToString() const { return absl::StrFormat("%016x%016x", high, low); }

  friend bool operator==(const IncarnationId&, const IncarnationId&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const IncarnationId& id) {
    return H::combine(std::move(h), id.high, id.low);
  }
};

}  // namespace millrace
