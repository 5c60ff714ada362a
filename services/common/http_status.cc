// SPDX-License-Identifier: Apache-2.0
// See http_status.h.
#include "services/common/http_status.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/status.h"

namespace millrace {
namespace {

struct Row {
  absl::StatusCode code;
  int http_status;
  const char* type;
  int retry_after_s;  // when the error itself does not say; 0: no header
};

// 499 is what proxies log for a client that left; nobody reads that reply. FailedPrecondition is ours, not the
// client's: peers that do not fit each other.
constexpr Row kTable[] = {
    {absl::StatusCode::kInvalidArgument, 400, "invalid_request_error", 0},
    {absl::StatusCode::kOutOfRange, 400, "invalid_request_error", 0},
    {absl::StatusCode::kUnauthenticated, 401, "authentication_error", 0},
    {absl::StatusCode::kPermissionDenied, 403, "permission_error", 0},
    {absl::StatusCode::kNotFound, 404, "invalid_request_error", 0},
    {absl::StatusCode::kAlreadyExists, 409, "invalid_request_error", 0},
    {absl::StatusCode::kResourceExhausted, 429, "rate_limit_error", 2},
    {absl::StatusCode::kCancelled, 499, "cancelled_error", 0},
    {absl::StatusCode::kUnimplemented, 501, "invalid_request_error", 0},
    {absl::StatusCode::kAborted, 503, "server_error", 1},
    {absl::StatusCode::kUnavailable, 503, "server_error", 5},
    {absl::StatusCode::kDeadlineExceeded, 504, "timeout_error", 0},
    {absl::StatusCode::kFailedPrecondition, 500, "server_error", 0},
    {absl::StatusCode::kDataLoss, 500, "server_error", 0},
    {absl::StatusCode::kInternal, 500, "server_error", 0},
    {absl::StatusCode::kUnknown, 500, "server_error", 0},
};

const Row& FindRow(absl::StatusCode code) {
  for (const Row& row : kTable) {
    if (row.code == code) return row;
  }
  return kTable[std::size(kTable) - 1];
}

}  // namespace

HttpError ToHttpError(const absl::Status& status) {
  CHECK(!status.ok());
  const Row& row = FindRow(status.code());
  PublicError public_error = ToPublicError(status);
  HttpError http;
  http.http_status = public_error.error.http_status != 0 ? public_error.error.http_status : row.http_status;
  http.type = row.type;
  http.code = std::move(public_error.error.code);
  http.param = std::move(public_error.error.param);
  http.message = std::move(public_error.message);
  if (public_error.error.retry_after_s) {
    http.retry_after_s = static_cast<int>(std::clamp(std::ceil(*public_error.error.retry_after_s), 1.0, 3600.0));
  } else if (row.retry_after_s != 0) {
    http.retry_after_s = row.retry_after_s;
  }
  return http;
}

std::string HttpError::ToJson(std::string_view request_id, std::optional<int64_t> delivered_tokens) const {
  nlohmann::ordered_json error;
  error["message"] = message;
  error["type"] = type;
  error["param"] = param.empty() ? nlohmann::ordered_json(nullptr) : nlohmann::ordered_json(param);
  error["code"] = code;
  error["request_id"] = request_id;
  if (delivered_tokens) error["delivered_tokens"] = *delivered_tokens;
  return nlohmann::ordered_json{{"error", std::move(error)}}.dump(-1, ' ', false,
                                                                  nlohmann::json::error_handler_t::replace);
}

std::string_view HttpReason(int http_status) {
  switch (http_status) {
    case 100:
      return "Continue";
    case 200:
      return "OK";
    case 202:
      return "Accepted";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 409:
      return "Conflict";
    case 413:
      return "Content Too Large";
    case 414:
      return "URI Too Long";
    case 415:
      return "Unsupported Media Type";
    case 417:
      return "Expectation Failed";
    case 421:
      return "Misdirected Request";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 499:
      return "Client Closed Request";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 504:
      return "Gateway Timeout";
    case 505:
      return "HTTP Version Not Supported";
    default:
      return "Unknown";
  }
}

}  // namespace millrace
