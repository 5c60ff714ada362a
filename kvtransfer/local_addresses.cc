// SPDX-License-Identifier: Apache-2.0
// Asks the kernel for addresses and identity; the contract is in local_addresses.h.
#include "kvtransfer/local_addresses.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kvtransfer/digest.h"

namespace millrace::kvtransfer::internal {
namespace {

bool ToIpAddress(const sockaddr* address, IpAddress& out) {
  if (address == nullptr) return false;
  if (address->sa_family == AF_INET) {
    std::memcpy(out.bytes.data(), &reinterpret_cast<const sockaddr_in*>(address)->sin_addr, 4);
    return true;
  }
  if (address->sa_family != AF_INET6) return false;
  const in6_addr& v6 = reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr;
  out.is_v6 = true;
  std::memcpy(out.bytes.data(), &v6, 16);
  return !IN6_IS_ADDR_LINKLOCAL(&v6);
}

}  // namespace

LocalAddresses FindLocalAddresses(const std::string& devices) {
  std::set<std::string> named;
  for (absl::string_view device : absl::StrSplit(devices, ',', absl::SkipEmpty()))
    named.emplace(device.substr(0, device.find(':')));
  std::vector<IpAddress> all, chosen;
  ifaddrs* interfaces = nullptr;
  if (getifaddrs(&interfaces) != 0) return {};
  for (const ifaddrs* i = interfaces; i != nullptr; i = i->ifa_next) {
    IpAddress address;
    if ((i->ifa_flags & IFF_UP) == 0 || !ToIpAddress(i->ifa_addr, address)) continue;
    if ((i->ifa_flags & IFF_LOOPBACK) == 0) all.push_back(address);
    if (named.count(i->ifa_name) != 0) chosen.push_back(address);
  }
  freeifaddrs(interfaces);
  LocalAddresses result{chosen.empty() ? all : chosen, !chosen.empty()};
  std::stable_sort(result.addresses.begin(), result.addresses.end(),
                   [](const auto& a, const auto& b) { return a.is_v6 < b.is_v6; });
  return result;
}

absl::StatusOr<NamedAddress> FindLocalAddress(const std::string& where) {
  ifaddrs* interfaces = nullptr;
  if (getifaddrs(&interfaces) != 0) return absl::InternalError("the addresses of this host cannot be listed");
  std::vector<NamedAddress> found;
  std::string present;
  for (const ifaddrs* i = interfaces; i != nullptr; i = i->ifa_next) {
    NamedAddress one;
    if ((i->ifa_flags & IFF_UP) == 0 || !ToIpAddress(i->ifa_addr, one.address)) continue;
    one.interface = i->ifa_name;
    absl::StrAppend(&present, present.empty() ? "" : ", ", one.interface, " ", ToString(one.address));
    if (where == one.interface || where == ToString(one.address)) found.push_back(std::move(one));
  }
  freeifaddrs(interfaces);
  if (found.empty()) {
    return absl::NotFoundError(absl::StrCat("no address or interface \"", where, "\" here; there are ", present));
  }
  return *std::min_element(found.begin(), found.end(),
                           [](const auto& a, const auto& b) { return a.address.is_v6 < b.address.is_v6; });
}

uint64_t HostId() {
  std::string boot_id;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), boot_id);
  struct stat network {};
  (void)stat("/proc/self/ns/net", &network);
  return ContentDigest(absl::StrCat(boot_id, "/", network.st_dev, "/", network.st_ino));
}

std::string ToString(const IpAddress& address) {
  char text[INET6_ADDRSTRLEN] = {};
  inet_ntop(address.is_v6 ? AF_INET6 : AF_INET, address.bytes.data(), text, sizeof(text));
  return text;
}

}  // namespace millrace::kvtransfer::internal
