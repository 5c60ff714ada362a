// SPDX-License-Identifier: Apache-2.0
// The certificate of an HTTPS listener, read again when its files change: new connections get the new one, open ones go
// on.
//
// TLS 1.2 and 1.3, HTTP/1.1 by ALPN, no renegotiation. What is wrong with a file at the start is better told by
// CheckKeyPair (services/common/peer_security.h).
//
// Thread: any.
#pragma once

#include <boost/asio/ssl/context.hpp>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "services/common/file_stamp.h"

namespace millrace::router {

class HttpTls {
 public:
  // PEM files, the chain with its leaf first. InvalidArgument says what OpenSSL says.
  static absl::StatusOr<std::shared_ptr<HttpTls>> Open(std::string certificate_path, std::string key_path);

  // For the next connection. Files that do not load, such as a certificate whose key has not been written yet, leave
  // the one before in use and are tried again.
  std::shared_ptr<boost::asio::ssl::context> Current();

 private:
  HttpTls(std::string certificate_path, std::string key_path)
      : certificate_path_(std::move(certificate_path)), key_path_(std::move(key_path)) {}
  absl::StatusOr<std::shared_ptr<boost::asio::ssl::context>> Load() const;

  const std::string certificate_path_, key_path_;
  std::mutex mutex_;
  FileStamp certificate_stamp_, key_stamp_;  // guarded by mutex_, as all below
  std::chrono::steady_clock::time_point looked_at_;
  std::shared_ptr<boost::asio::ssl::context> context_;
};

}  // namespace millrace::router
