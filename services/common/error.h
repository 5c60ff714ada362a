// SPDX-License-Identifier: Apache-2.0
// What a caller is told when a request fails, carried inside absl::Status.
//
// The status code says what kind of failure it is; an ApiError rides along as a payload and says which one: a stable
// code word, the field at fault, and when to come back. The message of a status that carries an ApiError is written for
// the caller: it names fields and limits and never a path, an address, a prompt or a stack. The message of a status
// without one was written for the log, and PublicError replaces it where it could say too much.
//
// Thread: values, no state.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace millrace {

struct ApiError {
  std::string code;     // snake_case and stable: "model_not_found", "overloaded"; never empty in a reply
  std::string param;    // the field at fault, "messages[3].content"; empty: none
  int http_status = 0;  // 0: the status code decides (http_status.h); set where HTTP is finer, such as 413
  std::optional<double> retry_after_s;  // when the same request may succeed; absent: retrying will not help, or unknown
};

// A status with its ApiError. `message` goes to the caller as it is.
absl::Status MakeError(absl::StatusCode status_code, absl::string_view message, ApiError error);

// The common case: the caller sent something wrong.
absl::Status InvalidRequest(std::string_view code, std::string_view param, absl::string_view message);

// The ApiError of a status, or nothing if it carries none.
std::optional<ApiError> GetApiError(const absl::Status& status);

// What may be said in public about `status`, complete: code and message always set.
struct PublicError {
  ApiError error;
  std::string message;
};
PublicError ToPublicError(const absl::Status& status);

// At most 64 bytes of somebody's input, printable ASCII as it is and everything else escaped, for an error message.
std::string QuoteInput(std::string_view input);

}  // namespace millrace
