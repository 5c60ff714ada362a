// SPDX-License-Identifier: Apache-2.0
// See grpc_status.h.
#include "services/common/grpc_status.h"

#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "services/common/error.h"
#include "services/common/http_status.h"

namespace millrace {
namespace {

constexpr char kDomain[] = "millrace";

// Status messages travel percent-encoded in a header: three bytes for each byte that is not printable, so what is not
// ASCII is replaced rather than carried.
std::string HeaderSafe(absl::string_view message) {
  std::string out(message.substr(0, kMaxGrpcMessageBytes));
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7e) c = '?';
  }
  return out;
}

google::rpc::Status WithErrorInfo(const absl::Status& status, absl::string_view message, absl::string_view code_word) {
  google::rpc::Status details;
  details.set_code(static_cast<int>(status.code()));
  details.set_message(HeaderSafe(message));
  google::rpc::ErrorInfo info;
  info.set_reason(absl::AsciiStrToUpper(code_word));
  info.set_domain(kDomain);
  details.add_details()->PackFrom(info);
  return details;
}

grpc::Status Packed(const google::rpc::Status& details) {
  return grpc::Status(static_cast<grpc::StatusCode>(details.code()), details.message(), details.SerializeAsString());
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  if (const auto error = GetApiError(status)) return Packed(WithErrorInfo(status, status.message(), error->code));
  return grpc::Status(static_cast<grpc::StatusCode>(static_cast<int>(status.code())), HeaderSafe(status.message()));
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const int code = static_cast<int>(status.error_code());
  if (code < 1 || code > 16) return absl::UnknownError(status.error_message());
  const auto status_code = static_cast<absl::StatusCode>(code);
  google::rpc::Status details;
  google::rpc::ErrorInfo info;
  if (!status.error_details().empty() && details.ParseFromString(status.error_details())) {
    for (const auto& detail : details.details()) {
      if (!detail.UnpackTo(&info) || info.domain() != kDomain) continue;
      return MakeError(status_code, status.error_message(), {.code = absl::AsciiStrToLower(info.reason())});
    }
  }
  return absl::Status(status_code, status.error_message());
}

grpc::Status ToPublicGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  // The table of HTTP decides what may be said and when to come back: both fronts tell the same.
  const HttpError error = ToHttpError(status);
  google::rpc::Status details = WithErrorInfo(status, absl::StrCat(error.code, ": ", error.message), error.code);
  if (error.retry_after_s) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(*error.retry_after_s);
    details.add_details()->PackFrom(retry);
  }
  if (!error.param.empty() && details.code() == grpc::StatusCode::INVALID_ARGUMENT) {
    google::rpc::BadRequest bad;
    auto* violation = bad.add_field_violations();
    violation->set_field(HeaderSafe(error.param));
    violation->set_description(HeaderSafe(error.message));
    details.add_details()->PackFrom(bad);
  }
  return Packed(details);
}

}  // namespace millrace
