// SPDX-License-Identifier: Apache-2.0
// Which request a line of the log is about.
//
// A LogScope on the stack says so for every line that this thread writes while it lives; the formatter
// (services/cli/logging) puts the ids into fields of their own, so that lines can be joined by them. Ids only: what a
// request holds is nobody's to log.
//
//   const LogScope about(attempt.wire_id, trace_id);
//   spdlog::warn("prefill at {} ended: {}", worker, status);
//
// Thread: a scope belongs to the thread that made it.
#pragma once

#include <string>
#include <string_view>

namespace millrace {

// The id that a client knows, of the name that a request has inside the cluster: what is before the last '#'.
inline std::string_view ClientRequestId(std::string_view wire_id) { return wire_id.substr(0, wire_id.rfind('#')); }

class LogScope {
 public:
  // Both are copied; empty ones are left out of the line. Scopes nest: the innermost is meant.
  LogScope(std::string_view request_id, std::string_view trace_id)
      : request_id_(request_id), trace_id_(trace_id), outer_(current_) {
    current_ = this;
  }
  ~LogScope() { current_ = outer_; }
  LogScope(const LogScope&) = delete;
  LogScope& operator=(const LogScope&) = delete;

  static const LogScope* current() { return current_; }
  const std::string& request_id() const { return request_id_; }
  const std::string& trace_id() const { return trace_id_; }

 private:
  const std::string request_id_, trace_id_;
  const LogScope* const outer_;
  static inline thread_local const LogScope* current_ = nullptr;
};

}  // namespace millrace
