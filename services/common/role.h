// SPDX-License-Identifier: Apache-2.0
// The word for a worker's role in logs, metrics, status and certificates' owners: "prefill", "decode" or "expert".
#pragma once

#include "millrace/v1/types.pb.h"

namespace millrace {

inline const char* RoleWord(v1::Role role) {
  return role == v1::ROLE_PREFILL ? "prefill" : role == v1::ROLE_DECODE ? "decode" : "expert";
}

}  // namespace millrace
