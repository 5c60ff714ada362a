// SPDX-License-Identifier: Apache-2.0
// The ApiError payload is a small JSON object, so that it reads well in a log and crosses gRPC as bytes.
#include "services/common/error.h"

#include <nlohmann/json.hpp>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

namespace millrace {
namespace {

constexpr std::string_view kPayloadUrl = "type.millrace.dev/ApiError";
constexpr size_t kQuotedBytes = 64;

// The code word of a status that carries none.
std::string_view DefaultCode(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
      return "invalid_request";
    case absl::StatusCode::kOutOfRange:
      return "out_of_range";
    case absl::StatusCode::kNotFound:
      return "not_found";
    case absl::StatusCode::kAlreadyExists:
      return "already_exists";
    case absl::StatusCode::kPermissionDenied:
      return "permission_denied";
    case absl::StatusCode::kUnauthenticated:
      return "invalid_api_key";
    case absl::StatusCode::kResourceExhausted:
      return "overloaded";
    case absl::StatusCode::kUnavailable:
      return "no_capacity";
    case absl::StatusCode::kAborted:
      return "aborted";
    case absl::StatusCode::kCancelled:
      return "cancelled";
    case absl::StatusCode::kDeadlineExceeded:
      return "deadline_exceeded";
    case absl::StatusCode::kUnimplemented:
      return "unsupported";
    case absl::StatusCode::kDataLoss:
      return "data_loss";
    default:
      return "internal_error";
  }
}

// Messages without an ApiError come from inside the cluster and may name hosts, leases and files.
std::string_view DefaultMessage(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kResourceExhausted:
      return "The cluster is busy; try again later.";
    case absl::StatusCode::kUnavailable:
      return "No worker can take this request now; try again later.";
    case absl::StatusCode::kAborted:
      return "The request was interrupted; try again.";
    case absl::StatusCode::kCancelled:
      return "The request was cancelled.";
    case absl::StatusCode::kDeadlineExceeded:
      return "The request's deadline passed.";
    case absl::StatusCode::kInvalidArgument:
      return "The request is not valid.";
    case absl::StatusCode::kNotFound:
      return "Not found.";
    case absl::StatusCode::kUnimplemented:
      return "Not supported.";
    default:
      return "The server failed while answering this request.";
  }
}

}  // namespace

absl::Status MakeError(absl::StatusCode status_code, absl::string_view message, ApiError error) {
  absl::Status status(status_code, message);
  nlohmann::json payload = {{"code", error.code}};
  if (!error.param.empty()) payload["param"] = error.param;
  if (error.http_status != 0) payload["http_status"] = error.http_status;
  if (error.retry_after_s) payload["retry_after_s"] = *error.retry_after_s;
  status.SetPayload(absl::string_view(kPayloadUrl.data(), kPayloadUrl.size()),
                    absl::Cord(payload.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)));
  return status;
}

absl::Status InvalidRequest(std::string_view code, std::string_view param, absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, message,
                   {.code = std::string(code), .param = std::string(param)});
}

std::optional<ApiError> GetApiError(const absl::Status& status) {
  const auto payload = status.GetPayload(absl::string_view(kPayloadUrl.data(), kPayloadUrl.size()));
  if (!payload) return std::nullopt;
  const auto json = nlohmann::json::parse(std::string(*payload), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return std::nullopt;  // a peer of another version; the status code still speaks
  ApiError error;
  const auto text = [&](const char* key) {
    const auto it = json.find(key);
    return it != json.end() && it->is_string() ? it->get<std::string>() : std::string();
  };
  error.code = text("code");
  error.param = text("param");
  if (const auto it = json.find("http_status"); it != json.end() && it->is_number_integer()) {
    const auto http_status = it->get<int64_t>();
    if (http_status >= 400 && http_status <= 599) error.http_status = static_cast<int>(http_status);
  }
  if (const auto it = json.find("retry_after_s"); it != json.end() && it->is_number()) {
    error.retry_after_s = it->get<double>();
  }
  return error;
}

PublicError ToPublicError(const absl::Status& status) {
  PublicError result;
  if (auto error = GetApiError(status)) {
    result.error = *std::move(error);
    result.message = std::string(status.message());
  }
  if (result.error.code.empty()) result.error.code = std::string(DefaultCode(status.code()));
  if (result.message.empty()) result.message = std::string(DefaultMessage(status.code()));
  return result;
}

std::string QuoteInput(std::string_view input) {
  std::string quoted = "'";
  bool cut = false;
  for (const unsigned char c : input) {
    std::string piece(1, static_cast<char>(c));
    if (c < 0x20 || c > 0x7e || c == '\'' || c == '\\') {
      constexpr char kHex[] = "0123456789abcdef";
      piece = {'\\', 'x', kHex[c >> 4], kHex[c & 15]};
    }
    if (quoted.size() + piece.size() > kQuotedBytes) {
      cut = true;
      break;
    }
    quoted += piece;
  }
  return absl::StrCat(quoted, cut ? "...'" : "'");
}

}  // namespace millrace
