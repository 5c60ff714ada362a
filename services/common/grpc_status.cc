// SPDX-License-Identifier: Apache-2.0
// See grpc_status.h.
#include "services/common/grpc_status.h"

#include <string>

#include "absl/strings/string_view.h"

namespace millrace {
namespace {

// Status messages travel percent-encoded in a header: three bytes for each byte that is not printable, so what is not
// ASCII is replaced rather than carried.
std::string HeaderSafe(absl::string_view message) {
  std::string out(message.substr(0, kMaxGrpcMessageBytes));
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7e) c = '?';
  }
  return out;
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return grpc::Status(static_cast<grpc::StatusCode>(static_cast<int>(status.code())), HeaderSafe(status.message()));
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const int code = static_cast<int>(status.error_code());
  if (code < 1 || code > 16) return absl::UnknownError(status.error_message());
  return absl::Status(static_cast<absl::StatusCode>(code), status.error_message());
}

}  // namespace millrace
