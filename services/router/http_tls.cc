// SPDX-License-Identifier: Apache-2.0
// See http_tls.h.
#include "services/router/http_tls.h"

#include <openssl/ssl.h>

#include <string_view>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "spdlog/spdlog.h"

namespace millrace::router {
namespace {

namespace ssl = boost::asio::ssl;
using boost::system::error_code;

constexpr auto kLookAgainAfter = std::chrono::seconds(1);

// A client that offers protocols gets http/1.1 if that is one of them; what it does without is its own affair.
int SelectProtocol(SSL*, const unsigned char** out, unsigned char* out_bytes, const unsigned char* in,
                   unsigned int in_bytes, void*) {
  constexpr std::string_view kHttp11 = "http/1.1";
  for (unsigned int at = 0; at < in_bytes; at += in[at] + 1u) {
    if (std::string_view(reinterpret_cast<const char*>(in + at + 1), in[at]) != kHttp11) continue;
    *out = in + at + 1;
    *out_bytes = in[at];
    return SSL_TLSEXT_ERR_OK;
  }
  return SSL_TLSEXT_ERR_NOACK;
}

}  // namespace

absl::StatusOr<std::shared_ptr<HttpTls>> HttpTls::Open(std::string certificate_path, std::string key_path) {
  std::shared_ptr<HttpTls> tls(new HttpTls(std::move(certificate_path), std::move(key_path)));
  tls->certificate_stamp_ = FileStamp::Of(tls->certificate_path_);
  tls->key_stamp_ = FileStamp::Of(tls->key_path_);
  tls->looked_at_ = std::chrono::steady_clock::now();
  ASSIGN_OR_RETURN(tls->context_, tls->Load());
  return tls;
}

absl::StatusOr<std::shared_ptr<ssl::context>> HttpTls::Load() const {
  auto context = std::make_shared<ssl::context>(ssl::context::tls_server);
  SSL_CTX_set_min_proto_version(context->native_handle(), TLS1_2_VERSION);
  SSL_CTX_set_options(context->native_handle(), SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  SSL_CTX_set_alpn_select_cb(context->native_handle(), SelectProtocol, nullptr);
  error_code error;
  if (context->use_certificate_chain_file(certificate_path_, error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("security.public_tls.certificate: ", certificate_path_, ": ", error.message()));
  }
  if (context->use_private_key_file(key_path_, ssl::context::pem, error)) {
    return absl::InvalidArgumentError(absl::StrCat("security.public_tls.key: ", key_path_, ": ", error.message()));
  }
  return context;
}

std::shared_ptr<ssl::context> HttpTls::Current() {
  const std::lock_guard lock(mutex_);
  const auto now = std::chrono::steady_clock::now();
  if (now - looked_at_ < kLookAgainAfter) return context_;
  looked_at_ = now;
  const FileStamp certificate = FileStamp::Of(certificate_path_), key = FileStamp::Of(key_path_);
  if (certificate == certificate_stamp_ && key == key_stamp_) return context_;
  certificate_stamp_ = certificate, key_stamp_ = key;
  auto loaded = Load();
  if (loaded.ok()) {
    spdlog::info("security.public_tls: {} read again", certificate_path_);
    context_ = *std::move(loaded);
  } else {
    spdlog::error("{}; the certificate before it stays", std::string(loaded.status().message()));
  }
  return context_;
}

}  // namespace millrace::router
