// SPDX-License-Identifier: Apache-2.0
// Who may call which internal method: one table, deny by default.
//
// The server asks it for every call (peer_security.cc), and its test tries every cell over TLS, so a method that is
// added to a service and not to the table is refused and noticed. Public methods are not in it: they are on a port of
// their own, where keys decide (services/router/api_keys.h).
//
// Thread: a constant.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "millrace/v1/types.pb.h"

namespace millrace {

// What a certificate may be for. kOperator is a person with grpcurl, no process of ours.
enum class PeerRole { kRouter, kPrefill, kDecode, kExpert, kOperator };
inline constexpr PeerRole kPeerRoles[] = {PeerRole::kRouter, PeerRole::kPrefill, PeerRole::kDecode, PeerRole::kExpert,
                                          PeerRole::kOperator};

absl::string_view PeerRoleWord(PeerRole role);  // "router", "prefill", ...
PeerRole PeerRoleOf(v1::Role role);             // CHECK-fails on ROLE_UNSPECIFIED

// "spiffe://TRUST_DOMAIN/millrace/ROLE", and back; nothing if it is not exactly that.
std::string SpiffeId(absl::string_view trust_domain, PeerRole role);
std::optional<PeerRole> RoleOfSpiffeId(absl::string_view id, absl::string_view trust_domain);

struct MethodAccess {
  absl::string_view method;  // "/package.Service/Method"
  std::vector<PeerRole> callers;
};
absl::Span<const MethodAccess> MethodAccessTable();

bool MayCall(PeerRole caller, absl::string_view method);

}  // namespace millrace
