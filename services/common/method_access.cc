// SPDX-License-Identifier: Apache-2.0
// See method_access.h.
#include "services/common/method_access.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "engine/status.h"

namespace millrace {
namespace {

using enum PeerRole;

// One line a method, in the order of a request's life.
const std::vector<MethodAccess>& Table() {
  static const auto* const table = new std::vector<MethodAccess>{
      {"/millrace.v1.Cluster/Join", {kPrefill, kDecode, kExpert}},
      {"/millrace.v1.Handoff/Reserve", {kRouter}},
      {"/millrace.v1.Handoff/Renew", {kRouter}},
      {"/millrace.v1.Prefill/Prefill", {kRouter}},
      {"/millrace.v1.Prefill/Abort", {kRouter}},
      {"/millrace.v1.Handoff/Commit", {kPrefill}},
      {"/millrace.v1.Handoff/Abort", {kRouter, kPrefill}},
      {"/millrace.v1.Decode/Decode", {kRouter}},
      {"/millrace.v1.Handoff/Release", {kRouter}},
      {"/millrace.v1.Expert/Describe", {kPrefill, kDecode, kOperator}},
      {"/millrace.v1.Expert/Attach", {kPrefill, kDecode}},
      {"/millrace.v1.Expert/Exchange", {kPrefill, kDecode}},
      {"/grpc.health.v1.Health/Check", {kRouter, kPrefill, kDecode, kExpert, kOperator}},
      {"/grpc.health.v1.Health/Watch", {kRouter, kPrefill, kDecode, kExpert, kOperator}},
      {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", {kOperator}},
  };
  return *table;
}

}  // namespace

absl::string_view PeerRoleWord(PeerRole role) {
  switch (role) {
    case kRouter:
      return "router";
    case kPrefill:
      return "prefill";
    case kDecode:
      return "decode";
    case kExpert:
      return "expert";
    case kOperator:
      return "operator";
  }
  return "";
}

PeerRole PeerRoleOf(v1::Role role) {
  CHECK(role == v1::ROLE_PREFILL || role == v1::ROLE_DECODE || role == v1::ROLE_EXPERT);
  return role == v1::ROLE_PREFILL ? kPrefill : role == v1::ROLE_DECODE ? kDecode : kExpert;
}

std::string SpiffeId(absl::string_view trust_domain, PeerRole role) {
  return absl::StrCat("spiffe://", trust_domain, "/millrace/", PeerRoleWord(role));
}

std::optional<PeerRole> RoleOfSpiffeId(absl::string_view id, absl::string_view trust_domain) {
  for (const PeerRole role : kPeerRoles) {
    if (id == SpiffeId(trust_domain, role)) return role;
  }
  return std::nullopt;
}

absl::Span<const MethodAccess> MethodAccessTable() { return Table(); }

bool MayCall(PeerRole caller, absl::string_view method) {
  const auto& table = Table();
  const auto row = std::find_if(table.begin(), table.end(), [&](const auto& entry) { return entry.method == method; });
  return row != table.end() && std::find(row->callers.begin(), row->callers.end(), caller) != row->callers.end();
}

}  // namespace millrace
