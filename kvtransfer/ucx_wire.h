// SPDX-License-Identifier: Apache-2.0
// What the UCX transport says on the wire around UCX's own bytes: addresses and message frames. Internal to kvtransfer.
//
// An address is where a listener can be reached, framed by magic, lengths and a digest; nothing in it is UCX's, so no
// bytes of a peer's making reach a parser of UCX. A message's frame names the connection by a token that its receiver
// chose: a message of an earlier connection or incarnation carries a token that nobody knows any more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kvtransfer/digest.h"
#include "kvtransfer/local_addresses.h"
#include "kvtransfer/sealed_transport.h"

namespace millrace::kvtransfer::internal {

inline constexpr size_t kMaxAddresses = 16;

struct UcxAddress {
  uint16_t ucx_major = 0, ucx_minor = 0;  // mixed releases are refused: their wire was never proved to be the same
  uint16_t port = 0;
  uint64_t incarnation = 0;  // of the transport, random
  uint64_t host_id = 0;
  std::vector<IpAddress> addresses;  // at most kMaxAddresses
};

namespace wire {
struct Address {
  static constexpr uint64_t kMagic = 0x313058435552524dull;  // "MRRUCX01"
  uint64_t magic = kMagic;
  uint16_t ucx_major = 0, ucx_minor = 0, port = 0, num_addresses = 0;
  uint64_t incarnation = 0, host_id = 0;
};
static_assert(sizeof(Address) == 32);
inline constexpr size_t kIpBytes = 17;  // family (4 or 6), 16 bytes
inline constexpr size_t kDigestBytes = 8;
}  // namespace wire

inline std::string EncodeAddress(const UcxAddress& address) {
  wire::Address fixed;
  fixed.ucx_major = address.ucx_major, fixed.ucx_minor = address.ucx_minor, fixed.port = address.port;
  fixed.num_addresses = static_cast<uint16_t>(address.addresses.size());
  fixed.incarnation = address.incarnation, fixed.host_id = address.host_id;
  std::string out(reinterpret_cast<const char*>(&fixed), sizeof(fixed));
  for (const IpAddress& ip : address.addresses) {
    out.push_back(ip.is_v6 ? 6 : 4);
    out.append(reinterpret_cast<const char*>(ip.bytes.data()), ip.bytes.size());
  }
  const uint64_t digest = ContentDigest(out);
  out.append(reinterpret_cast<const char*>(&digest), sizeof(digest));
  return out;
}

inline absl::StatusOr<UcxAddress> DecodeAddress(absl::string_view bytes, uint16_t ucx_major, uint16_t ucx_minor) {
  wire::Address fixed;
  if (bytes.size() < sizeof(fixed) + wire::kDigestBytes)
    return absl::InvalidArgumentError(absl::StrCat("UCX address: ", bytes.size(), " bytes, too short"));
  std::memcpy(&fixed, bytes.data(), sizeof(fixed));
  if (IsSealedAddress(bytes))
    return absl::InvalidArgumentError(
        "UCX address: the peer seals what it sends and we do not (transfer.seal differs)");
  if (fixed.magic != wire::Address::kMagic) return absl::InvalidArgumentError("UCX address: bad magic");
  const size_t expected = sizeof(fixed) + fixed.num_addresses * wire::kIpBytes + wire::kDigestBytes;
  if (fixed.num_addresses > kMaxAddresses || bytes.size() != expected) {
    return absl::InvalidArgumentError(absl::StrCat("UCX address: ", bytes.size(), " bytes for ", fixed.num_addresses,
                                                   " network addresses, expected ", expected));
  }
  uint64_t digest = 0;
  std::memcpy(&digest, bytes.data() + bytes.size() - sizeof(digest), sizeof(digest));
  if (digest != ContentDigest(bytes.substr(0, bytes.size() - sizeof(digest))))
    return absl::InvalidArgumentError("UCX address: digest wrong, damaged on its way");
  if (fixed.ucx_major != ucx_major || fixed.ucx_minor != ucx_minor) {
    return absl::InvalidArgumentError(absl::StrCat("UCX address: peer runs UCX ", fixed.ucx_major, ".", fixed.ucx_minor,
                                                   ", we run ", ucx_major, ".", ucx_minor));
  }
  UcxAddress address;
  address.ucx_major = fixed.ucx_major, address.ucx_minor = fixed.ucx_minor, address.port = fixed.port;
  address.incarnation = fixed.incarnation, address.host_id = fixed.host_id;
  for (size_t i = 0; i < fixed.num_addresses; ++i) {
    const char* at = bytes.data() + sizeof(fixed) + i * wire::kIpBytes;
    IpAddress& ip = address.addresses.emplace_back();
    ip.is_v6 = at[0] == 6;
    std::memcpy(ip.bytes.data(), at + 1, ip.bytes.size());
  }
  return address;
}

enum class MessageType : uint16_t { kData = 1, kHello = 2, kHelloAnswer = 3, kGoodbye = 4 };

struct MessageFrame {
  static constexpr uint32_t kMagic = 0x3154524d;  // "MRT1"
  uint32_t magic = kMagic;
  MessageType type = MessageType::kData;
  uint16_t channel = 0;
  uint64_t token = 0;  // of the connection, the receiver's; in a hello 0
  uint64_t payload_bytes = 0;
};
static_assert(sizeof(MessageFrame) == 24);

// Follows the frame of a hello and of its answer.
struct Hello {
  uint64_t token = 0;               // what the other side shall put into its frames
  uint64_t incarnation = 0;         // the sender's
  uint64_t target_incarnation = 0;  // whom it means
};
static_assert(sizeof(Hello) == 24);

}  // namespace millrace::kvtransfer::internal
