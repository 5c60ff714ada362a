// SPDX-License-Identifier: Apache-2.0
// What ucx_transport.cc puts around UCX's bytes: the frame of an address and the frame of a message. Internal to
// kvtransfer.
//
// UCX's address parser takes no length and trusts what it reads, so an address travels framed: magic, version, length
// and a digest over all of it. A message's frame names the connection by a token that its receiver chose; a message of
// an earlier connection or incarnation carries a token that nobody knows any more.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kvtransfer/digest.h"

namespace millrace::kvtransfer::internal {

inline constexpr size_t kMaxAddressBytes = 8192;

struct AddressFrame {
  static constexpr uint64_t kMagic = 0x313058435552524dull;  // "MRRUCX01"
  uint64_t magic = kMagic;
  uint16_t ucx_major = 0, ucx_minor = 0;  // mixed releases are refused: their wire was never proved to be the same
  uint32_t blob_bytes = 0;
  uint64_t incarnation = 0;  // of the transport, random
  uint64_t digest = 0;       // content digest of the frame up to here and of the blob
};
static_assert(sizeof(AddressFrame) == 32);

struct ParsedAddress {
  AddressFrame frame;
  absl::string_view blob;
};

inline uint64_t AddressDigest(const AddressFrame& frame, absl::string_view blob) {
  return ContentDigest(
      absl::StrCat(absl::string_view(reinterpret_cast<const char*>(&frame), offsetof(AddressFrame, digest)), blob));
}

inline std::string FrameAddress(AddressFrame frame, absl::string_view blob) {
  frame.blob_bytes = static_cast<uint32_t>(blob.size());
  frame.digest = AddressDigest(frame, blob);
  return absl::StrCat(absl::string_view(reinterpret_cast<const char*>(&frame), sizeof(frame)), blob);
}

inline absl::StatusOr<ParsedAddress> ParseAddress(absl::string_view bytes, uint16_t ucx_major, uint16_t ucx_minor) {
  ParsedAddress address;
  if (bytes.size() <= sizeof(AddressFrame) || bytes.size() > kMaxAddressBytes) {
    return absl::InvalidArgumentError(absl::StrCat("UCX address has ", bytes.size(), " bytes, expected ",
                                                   sizeof(AddressFrame) + 1, " to ", kMaxAddressBytes));
  }
  std::memcpy(&address.frame, bytes.data(), sizeof(AddressFrame));
  address.blob = bytes.substr(sizeof(AddressFrame));
  if (address.frame.magic != AddressFrame::kMagic) return absl::InvalidArgumentError("UCX address: bad magic");
  if (address.frame.blob_bytes != address.blob.size()) {
    return absl::InvalidArgumentError(absl::StrCat("UCX address: ", address.blob.size(),
                                                   " bytes follow the frame, expected ", address.frame.blob_bytes));
  }
  if (address.frame.digest != AddressDigest(address.frame, address.blob))
    return absl::InvalidArgumentError("UCX address: digest wrong, damaged on its way");
  if (address.frame.ucx_major != ucx_major || address.frame.ucx_minor != ucx_minor) {
    return absl::InvalidArgumentError(absl::StrCat("UCX address: peer runs UCX ", address.frame.ucx_major, ".",
                                                   address.frame.ucx_minor, ", we run ", ucx_major, ".", ucx_minor));
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

// Follows the frame of a hello (payload: the sender's framed address) and of its answer.
struct Hello {
  uint64_t token = 0;               // what the other side shall put into its frames
  uint64_t incarnation = 0;         // the sender's
  uint64_t target_incarnation = 0;  // whom it means
};
static_assert(sizeof(Hello) == 24);

}  // namespace millrace::kvtransfer::internal
