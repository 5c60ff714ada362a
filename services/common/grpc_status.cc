// SPDX-License-Identifier: Apache-2.0
// See grpc_status.h.
#include "services/common/grpc_status.h"

#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "services/common/http_status.h"

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

grpc::Status ToPublicGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  // The table of HTTP decides what may be said and when to come back: both fronts tell the same.
  const HttpError error = ToHttpError(status);
  const grpc::Status plain = ToGrpcStatus(absl::Status(status.code(), absl::StrCat(error.code, ": ", error.message)));
  google::rpc::Status details;
  details.set_code(plain.error_code());
  details.set_message(plain.error_message());
  google::rpc::ErrorInfo info;
  info.set_reason(absl::AsciiStrToUpper(error.code));
  info.set_domain("millrace");
  details.add_details()->PackFrom(info);
  if (error.retry_after_s) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(*error.retry_after_s);
    details.add_details()->PackFrom(retry);
  }
  if (!error.param.empty() && plain.error_code() == grpc::StatusCode::INVALID_ARGUMENT) {
    google::rpc::BadRequest bad;
    auto* violation = bad.add_field_violations();
    violation->set_field(HeaderSafe(error.param));
    violation->set_description(HeaderSafe(error.message));
    details.add_details()->PackFrom(bad);
  }
  return grpc::Status(plain.error_code(), plain.error_message(), details.SerializeAsString());
}

}  // namespace millrace
