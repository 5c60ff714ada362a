// SPDX-License-Identifier: Apache-2.0
// gRPC 1.51's TLS credentials, and OpenSSL for what they would only say at the first handshake.
//
// Two traps of 1.51 are worked around here: its file watcher starts without complaint on files that are missing or do
// not fit each other, so they are checked before; and its default verifier compares host names, so ours replaces it.
#include "services/common/peer_security.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/auth_metadata_processor.h>
#include <grpcpp/security/tls_certificate_verifier.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "engine/status.h"

namespace millrace {
namespace {

using grpc::experimental::FileWatcherCertificateProvider;

template <typename T, void (*kFree)(T*)>
struct Freer {
  void operator()(T* object) const { kFree(object); }
};
using X509Ptr = std::unique_ptr<X509, Freer<X509, X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Freer<EVP_PKEY, EVP_PKEY_free>>;
using StorePtr = std::unique_ptr<X509_STORE, Freer<X509_STORE, X509_STORE_free>>;
using StoreContextPtr = std::unique_ptr<X509_STORE_CTX, Freer<X509_STORE_CTX, X509_STORE_CTX_free>>;
using BioPtr = std::unique_ptr<BIO, Freer<BIO, BIO_free_all>>;

absl::Status Wrong(absl::string_view field, absl::string_view path, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", path, ": ", what));
}

absl::StatusOr<std::vector<X509Ptr>> ReadCertificates(absl::string_view field, const std::string& path) {
  const BioPtr file(BIO_new_file(path.c_str(), "r"));
  if (file == nullptr) return Wrong(field, path, "cannot be read");
  std::vector<X509Ptr> found;
  while (X509* one = PEM_read_bio_X509(file.get(), nullptr, nullptr, nullptr)) found.emplace_back(one);
  ERR_clear_error();  // the end of the file is one
  if (found.empty()) return Wrong(field, path, "holds no PEM certificate");
  return found;
}

absl::StatusOr<KeyPtr> ReadKey(absl::string_view field, const std::string& path) {
  const BioPtr file(BIO_new_file(path.c_str(), "r"));
  if (file == nullptr) return Wrong(field, path, "cannot be read");
  // An empty password: a key that has one is an error here, and not a question on the terminal.
  KeyPtr key(PEM_read_bio_PrivateKey(file.get(), nullptr, nullptr, const_cast<char*>("")));
  ERR_clear_error();
  if (key == nullptr) return Wrong(field, path, "holds no PEM private key without a password");
  return key;
}

absl::StatusOr<std::vector<X509Ptr>> ReadPair(absl::string_view field, const std::string& certificate_path,
                                              const std::string& key_path) {
  ASSIGN_OR_RETURN(std::vector<X509Ptr> chain, ReadCertificates(absl::StrCat(field, ".certificate"), certificate_path));
  ASSIGN_OR_RETURN(const KeyPtr key, ReadKey(absl::StrCat(field, ".key"), key_path));
  if (X509_check_private_key(chain[0].get(), key.get()) != 1) {
    ERR_clear_error();
    return Wrong(absl::StrCat(field, ".key"), key_path, absl::StrCat("is not the key of ", certificate_path));
  }
  if (X509_cmp_current_time(X509_get0_notBefore(chain[0].get())) > 0) {
    return Wrong(absl::StrCat(field, ".certificate"), certificate_path, "is not valid yet");
  }
  if (X509_cmp_current_time(X509_get0_notAfter(chain[0].get())) < 0) {
    return Wrong(absl::StrCat(field, ".certificate"), certificate_path, "has expired");
  }
  return chain;
}

std::vector<std::string> UrisOf(X509* certificate) {
  std::vector<std::string> uris;
  auto* const names =
      static_cast<GENERAL_NAMES*>(X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr));
  for (int i = 0; names != nullptr && i < sk_GENERAL_NAME_num(names); ++i) {
    const GENERAL_NAME* const name = sk_GENERAL_NAME_value(names, i);
    if (name->type != GEN_URI) continue;
    uris.emplace_back(reinterpret_cast<const char*>(ASN1_STRING_get0_data(name->d.uniformResourceIdentifier)),
                      static_cast<size_t>(ASN1_STRING_length(name->d.uniformResourceIdentifier)));
  }
  GENERAL_NAMES_free(names);
  return uris;
}

absl::Status CheckSigned(const v1::TlsSection& tls, const std::vector<X509Ptr>& chain,
                         const std::vector<X509Ptr>& roots) {
  const StorePtr store(X509_STORE_new());
  for (const X509Ptr& root : roots) X509_STORE_add_cert(store.get(), root.get());
  STACK_OF(X509)* const between = sk_X509_new_null();
  for (size_t i = 1; i < chain.size(); ++i) sk_X509_push(between, chain[i].get());
  const StoreContextPtr context(X509_STORE_CTX_new());
  X509_STORE_CTX_init(context.get(), store.get(), chain[0].get(), between);
  const bool good = X509_verify_cert(context.get()) == 1;
  const int error = X509_STORE_CTX_get_error(context.get());
  sk_X509_free(between);
  ERR_clear_error();
  if (good) return absl::OkStatus();
  return Wrong("security.tls.certificate", tls.certificate(),
               absl::StrCat("is not signed by ", tls.ca(), ": ", X509_verify_cert_error_string(error)));
}

std::optional<PeerRole> ProvenRole(const grpc::AuthContext& caller, absl::string_view trust_domain) {
  const auto ids = caller.FindPropertyValues(GRPC_PEER_SPIFFE_ID_PROPERTY_NAME);
  if (ids.size() != 1) return std::nullopt;
  return RoleOfSpiffeId({ids[0].data(), ids[0].size()}, trust_domain);
}

// Lets a call through or ends it with PERMISSION_DENIED, before its handler is looked up.
class TableProcessor final : public grpc::AuthMetadataProcessor {
 public:
  explicit TableProcessor(std::string trust_domain) : trust_domain_(std::move(trust_domain)) {}
  bool IsBlocking() const override { return false; }  // on gRPC's thread: it compares strings

  grpc::Status Process(const InputMetadata& metadata, grpc::AuthContext* caller, OutputMetadata*,
                       OutputMetadata*) override {
    const auto path = metadata.find(":path");
    const std::optional<PeerRole> role = ProvenRole(*caller, trust_domain_);
    if (path != metadata.end() && role && MayCall(*role, {path->second.data(), path->second.size()})) {
      return grpc::Status::OK;
    }
    return grpc::Status(
        grpc::StatusCode::PERMISSION_DENIED,
        absl::StrCat(role ? PeerRoleWord(*role) : "a certificate of no role", " may not call this method"));
  }

 private:
  const std::string trust_domain_;
};

// Accepts a server whose certificate names the role we dialled for. The chain has been verified before.
class RoleVerifier final : public grpc::experimental::ExternalCertificateVerifier {
 public:
  explicit RoleVerifier(std::string id) : id_(std::move(id)) {}

  bool Verify(grpc::experimental::TlsCustomVerificationCheckRequest* request, std::function<void(grpc::Status)>,
              grpc::Status* status) override {
    const auto uris = request->uri_names();
    if (uris.size() == 1 && absl::string_view(uris[0].data(), uris[0].size()) == id_) return true;
    std::vector<std::string> found;
    for (const auto& uri : uris) found.emplace_back(uri.data(), uri.size());
    *status = grpc::Status(grpc::StatusCode::UNAUTHENTICATED,
                           absl::StrCat("the server's certificate is for ", absl::StrJoin(found, ", "), ", not ", id_));
    return true;
  }
  void Cancel(grpc::experimental::TlsCustomVerificationCheckRequest*) override {}

 private:
  const std::string id_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const PeerSecurity>> PeerSecurity::Create(v1::TlsSection tls, PeerRole own) {
  for (std::string* path : {tls.mutable_certificate(), tls.mutable_key(), tls.mutable_ca()}) {
    *path = absl::StrReplaceAll(*path, {{"{role}", PeerRoleWord(own)}});
  }
  ASSIGN_OR_RETURN(const std::vector<X509Ptr> chain, ReadPair("security.tls", tls.certificate(), tls.key()));
  ASSIGN_OR_RETURN(const std::vector<X509Ptr> roots, ReadCertificates("security.tls.ca", tls.ca()));
  RETURN_IF_ERROR(CheckSigned(tls, chain, roots));
  const std::vector<std::string> uris = UrisOf(chain[0].get());
  const std::string id = SpiffeId(tls.trust_domain(), own);
  if (uris.size() != 1 || uris[0] != id) {
    return Wrong("security.tls.certificate", tls.certificate(),
                 absl::StrCat("names ", uris.empty() ? "no URI" : absl::StrJoin(uris, ", "), ", allowed ", id));
  }
  std::shared_ptr<PeerSecurity> security(new PeerSecurity);
  security->trust_domain_ = tls.trust_domain();
  security->files_ = std::make_shared<FileWatcherCertificateProvider>(tls.key(), tls.certificate(), tls.ca(),
                                                                      tls.reload_interval_ms() / 1000);
  return security;
}

std::shared_ptr<grpc::ServerCredentials> PeerSecurity::MakeServerCredentials() const {
  grpc::experimental::TlsServerCredentialsOptions options(files_);
  options.watch_root_certs();
  options.watch_identity_key_cert_pairs();
  options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.set_certificate_verifier(
      std::make_shared<grpc::experimental::NoOpCertificateVerifier>());  // the table decides
  options.set_check_call_host(false);
  auto credentials = grpc::experimental::TlsServerCredentials(options);
  credentials->SetAuthMetadataProcessor(std::make_shared<TableProcessor>(trust_domain_));
  return credentials;
}

std::shared_ptr<grpc::ChannelCredentials> PeerSecurity::MakeChannelCredentials(PeerRole server) const {
  grpc::experimental::TlsChannelCredentialsOptions options;
  options.set_certificate_provider(files_);
  options.watch_root_certs();
  options.watch_identity_key_cert_pairs();
  options.set_certificate_verifier(
      grpc::experimental::ExternalCertificateVerifier::Create<RoleVerifier>(SpiffeId(trust_domain_, server)));
  options.set_check_call_host(false);
  return grpc::experimental::TlsCredentials(options);
}

std::optional<PeerRole> PeerSecurity::RoleOf(const grpc::AuthContext& caller) const {
  return ProvenRole(caller, trust_domain_);
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakePublicServerCredentials(const v1::PublicTlsSection& tls) {
  RETURN_IF_ERROR(CheckKeyPair("security.public_tls", tls.certificate(), tls.key()));
  grpc::experimental::TlsServerCredentialsOptions options(
      std::make_shared<FileWatcherCertificateProvider>(tls.key(), tls.certificate(), 1));
  options.watch_identity_key_cert_pairs();
  options.set_cert_request_type(GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  return grpc::experimental::TlsServerCredentials(options);
}

absl::Status CheckKeyPair(absl::string_view field, const std::string& certificate_path, const std::string& key_path) {
  return ReadPair(field, certificate_path, key_path).status();
}

}  // namespace millrace
