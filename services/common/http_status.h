// SPDX-License-Identifier: Apache-2.0
// The one table from absl::StatusCode to HTTP and to OpenAI's error object.
//
// Everything the router says over HTTP when something fails goes through ToHttpError, so that a code means one thing
// everywhere. gRPC has its own table in grpc_status.cc.
//
// Thread: values, no state.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "services/common/error.h"

namespace millrace {

struct HttpError {
  int http_status = 500;
  std::optional<int>
      retry_after_s;  // whole seconds, 1 .. 30 unless the error asked for more; for the Retry-After header
  std::string type;   // OpenAI's error type
  std::string code;
  std::string param;  // empty: null in JSON
  std::string message;

  // {"error":{"message","type","param","code","request_id"}}. After the first token `delivered_tokens` says how many of
  // them the client has.
  std::string ToJson(std::string_view request_id, std::optional<int64_t> delivered_tokens = std::nullopt) const;
};

// CHECK-fails on an OK status.
HttpError ToHttpError(const absl::Status& status);

// The reason phrase of an HTTP status; "Unknown" for one we never send.
std::string_view HttpReason(int http_status);

}  // namespace millrace
