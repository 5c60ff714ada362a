// SPDX-License-Identifier: Apache-2.0
// Certificates for tests, made by the script that operators use; each test program makes its own in a folder that goes
// with it.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "millrace/v1/config.pb.h"

namespace millrace {

class TestCertificates {
 public:
  // `options` as deploy/certificates.sh takes them. With `issuer` its CA signs these too.
  explicit TestCertificates(const std::string& options = "", const TestCertificates* issuer = nullptr)
      : options_(options) {
    std::string name = (std::filesystem::temp_directory_path() / "millrace-certificates-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::abort();
    directory_ = name;
    if (issuer != nullptr) {
      for (const char* file : {"ca.key", "ca.pem"}) std::filesystem::copy(issuer->Path(file), Path(file));
    }
    Renew();
  }
  ~TestCertificates() { std::filesystem::remove_all(directory_); }
  TestCertificates(const TestCertificates&) = delete;
  TestCertificates& operator=(const TestCertificates&) = delete;

  // New certificates of the same CA in the place of the old ones.
  void Renew() {
    const std::string command = absl::StrCat("deploy/certificates.sh ", directory_, " ", options_);
    if (std::system(command.c_str()) != 0) std::abort();
  }

  std::string Path(const std::string& file) const { return absl::StrCat(directory_, "/", file); }
  v1::TlsSection Tls() const {
    v1::TlsSection tls;
    tls.set_certificate(Path("{role}.pem"));
    tls.set_key(Path("{role}.key"));
    tls.set_ca(Path("ca.pem"));
    tls.set_trust_domain("cluster.local");
    tls.set_reload_interval_ms(1000);
    return tls;
  }
  v1::PublicTlsSection PublicTls() const {
    v1::PublicTlsSection tls;
    tls.set_certificate(Path("public.pem"));
    tls.set_key(Path("public.key"));
    return tls;
  }

 private:
  const std::string options_;
  std::string directory_;
};

}  // namespace millrace
