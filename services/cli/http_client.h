// SPDX-License-Identifier: Apache-2.0
// A small HTTP/1.1 client for our own commands: `chat` and `up` talk to a router as any client would.
//
// One request per connection, plain or TLS, bodies whole or streamed. Every wait is bounded. Thread: any, blocking.
#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace millrace::cli {

// How a server is reached and what opens it.
struct HttpDoor {
  bool tls = false;
  std::string ca;         // PEM file that the server's certificate must lead to; empty: the system's
  bool any_name = false;  // do not compare the certificate with the address: `up` knows its own file
  std::string api_key;    // empty: none
};

// The first line of `file`, or else the value of this environment variable, or else nothing: a key on a command line
// would be everybody's to read. NotFound: no such file. InvalidArgument: no header can carry it.
absl::StatusOr<std::string> ReadApiKey(const std::string& file, const char* variable);

struct HttpReply {
  int status = 0;
  std::vector<std::pair<std::string, std::string>> headers;  // names in lower case
  std::string body;                                          // empty if it went to on_body
};

struct HttpCall {
  std::string address;  // "host:port"
  HttpDoor door;
  std::string method = "GET";
  std::string path = "/";
  std::string accept = "application/json";
  std::string body;  // sent as application/json when not empty
  std::chrono::milliseconds connect_timeout{2000};
  std::chrono::milliseconds read_timeout{600000};  // between two pieces of the reply
  // If set and the status is 2xx, gets the body as it comes; returning false ends the call (Cancelled).
  std::function<bool(absl::string_view)> on_body;
};

// Unavailable: no connection, or it broke before the reply was whole. DeadlineExceeded: a wait ran out.
absl::StatusOr<HttpReply> Send(const HttpCall& call);

// Splits a server-sent event stream into the data of its events.
class SseReader {
 public:
  explicit SseReader(std::function<bool(absl::string_view data)> on_event) : on_event_(std::move(on_event)) {}
  bool Push(absl::string_view bytes);

 private:
  std::function<bool(absl::string_view)> on_event_;
  std::string pending_;
};

}  // namespace millrace::cli
