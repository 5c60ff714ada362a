// SPDX-License-Identifier: Apache-2.0
// Where this process can be reached: its network addresses, and which host and network namespace it is in. Internal to
// kvtransfer.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace millrace::kvtransfer::internal {

struct IpAddress {
  bool is_v6 = false;
  std::array<uint8_t, 16> bytes{};  // network order; the first four for IPv4
  friend bool operator==(const IpAddress&, const IpAddress&) = default;
};

inline constexpr IpAddress kLoopbackV4{false, {127, 0, 0, 1}};
inline constexpr IpAddress kLoopbackV6{true, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}};

struct LocalAddresses {
  std::vector<IpAddress> addresses;  // IPv4 first
  bool chosen = false;               // `devices` named their interfaces
};

// Addresses of the interfaces that are up and that `devices` (UCX_NET_DEVICES: names separated by commas, ports after a
// colon) names; if it names none that has an address, of all but loopback. Link-local ones are left out.
LocalAddresses FindLocalAddresses(const std::string& devices);

// One address of this host and the interface it belongs to. `where` is the address in digits, or the name of an
// interface, which then gives its first (IPv4 before IPv6). NotFound lists what there is.
struct NamedAddress {
  IpAddress address;
  std::string interface;
};
absl::StatusOr<NamedAddress> FindLocalAddress(const std::string& where);

// Equal in two processes exactly if 127.0.0.1 is the same place for both.
uint64_t HostId();

std::string ToString(const IpAddress& address);

}  // namespace millrace::kvtransfer::internal
