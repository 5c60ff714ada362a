// SPDX-License-Identifier: Apache-2.0
// CHECK for our own bugs and two macros for absl::Status, until Debian's Abseil has them.
//
// CHECK stays on in release builds: it prints the condition and the message, then aborts. What the world can cause
// (a file, a peer, a user, capacity, a deadline) is an absl::Status instead.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace millrace::internal {
[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition, const std::string& message) {
  std::fprintf(stderr, "%s:%d: CHECK failed: %s %s\n", file, line, condition, message.c_str());
  std::abort();
}
}  // namespace millrace::internal

// CHECK(condition) or CHECK(condition, absl::StrCat("values ", that, " matter")).
#define CHECK(condition, ...)                                                                      \
  do {                                                                                             \
    if (!(condition)) [[unlikely]]                                                                 \
      ::millrace::internal::CheckFailed(__FILE__, __LINE__, #condition, std::string(__VA_ARGS__)); \
  } while (false)

#define MILLRACE_CONCAT_INNER(a, b) a##b
#define MILLRACE_CONCAT(a, b) MILLRACE_CONCAT_INNER(a, b)

#define RETURN_IF_ERROR(expression)                                      \
  do {                                                                   \
    if (absl::Status status_ = (expression); !status_.ok()) [[unlikely]] \
      return status_;                                                    \
  } while (false)

#define ASSIGN_OR_RETURN(declaration, expression) \
  ASSIGN_OR_RETURN_INNER(MILLRACE_CONCAT(statusor_, __LINE__), declaration, expression)
#define ASSIGN_OR_RETURN_INNER(tmp, declaration, expression) \
  auto tmp = (expression);                                   \
  if (!tmp.ok()) [[unlikely]]                                \
    return tmp.status();                                     \
  declaration = std::move(tmp).value()
