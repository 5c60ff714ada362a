// SPDX-License-Identifier: Apache-2.0
// Mutual TLS between our processes: who we are, whom we believe, and what a caller may call.
//
// A certificate's one URI, spiffe://TRUST_DOMAIN/millrace/ROLE, is the identity; host names are not looked at, since
// workers are dialled at addresses that come and go. A server lets a call through if its caller's role is in the
// method's row of method_access; a client goes on only if the server has the role it dialled for. Files are watched: a
// new certificate serves new connections, and what runs goes on over the old one.
//
// Thread: any; immutable but for the watch, which is gRPC's own thread.
#pragma once

#include <grpcpp/security/auth_context.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "millrace/v1/config.pb.h"
#include "services/common/method_access.h"

namespace millrace {

class PeerSecurity {
 public:
  // `tls` is complete (config.h). InvalidArgument names the field, the file and what is wrong with it: not there, not
  // PEM, a key of another certificate, a certificate that is not for `own`, expired or not signed by `ca`.
  static absl::StatusOr<std::shared_ptr<const PeerSecurity>> Create(v1::TlsSection tls, PeerRole own);

  // Of a server: asks every client for a certificate, and the table for every call.
  std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials() const;
  // Of a channel to a process of that role.
  std::shared_ptr<grpc::ChannelCredentials> MakeChannelCredentials(PeerRole server) const;

  // The role a caller has proven; nothing if its certificate names none of this trust domain.
  std::optional<PeerRole> RoleOf(const grpc::AuthContext& caller) const;

 private:
  PeerSecurity() = default;

  std::string trust_domain_;
  std::shared_ptr<grpc::experimental::FileWatcherCertificateProvider> files_;
};

// One-way TLS for a port of strangers; null without the section. Errors as Create.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakePublicServerCredentials(const v1::PublicTlsSection& tls);

// Whether certificate and key are readable PEM, belong together and are valid now; for whoever loads them itself.
// `field` leads the message.
absl::Status CheckKeyPair(absl::string_view field, const std::string& certificate_path, const std::string& key_path);

}  // namespace millrace
