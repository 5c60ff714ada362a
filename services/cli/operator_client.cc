// SPDX-License-Identifier: Apache-2.0
// See operator_client.h.
#include "services/cli/operator_client.h"

#include <chrono>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/cli/http_client.h"
#include "services/common/config.h"

namespace millrace::cli {
namespace {

absl::StatusCode CodeOf(int http_status) {
  switch (http_status) {
    case 401:
    case 403:
      return absl::StatusCode::kPermissionDenied;
    case 404:
      return absl::StatusCode::kNotFound;
    default:
      return absl::StatusCode::kUnavailable;
  }
}

absl::StatusOr<OperatorJson> Exchange(const Operator& router, HttpCall call) {
  call.address = router.address;
  call.door.api_key = router.api_key;
  call.connect_timeout = std::chrono::milliseconds(2000);
  call.read_timeout = std::chrono::milliseconds(5000);
  ASSIGN_OR_RETURN(const HttpReply reply, Send(call));
  OperatorJson json = OperatorJson::parse(reply.body, nullptr, /*allow_exceptions=*/false);
  if (reply.status / 100 == 2) {
    if (json.is_object() || json.is_array()) return json;
    return absl::UnavailableError(absl::StrCat("what answers at ", call.address, " is not a router's operator port"));
  }
  std::string words = absl::StrCat(call.address, " answers ", reply.status);
  if (json.is_object() && json.contains("error") && json["error"].is_object()) {
    words = json["error"].value("message", words);
  }
  if (reply.status == 401) {
    absl::StrAppend(&words,
                    " An operator's key (may_operate) opens it: --api-key-file FILE, or MILLRACE_OPERATOR_KEY.");
  }
  return absl::Status(CodeOf(reply.status), words);
}

}  // namespace

void OperatorFlags::Declare(Flags& flags) {
  flags.String("operator", &address, "HOST:PORT", "The router's operator port.");
  flags.String("config", &config, "FILE", "Take that address from a cluster's configuration instead.");
  flags.String("api-key-file", &api_key_file, "FILE",
               "Its first line is the operator's key to send. Default: $MILLRACE_OPERATOR_KEY, if that is set.");
}

absl::StatusOr<Operator> OperatorFlags::Resolve() const {
  Operator router{.address = address};
  ASSIGN_OR_RETURN(router.api_key, ReadApiKey(api_key_file, "MILLRACE_OPERATOR_KEY"));
  if (config.empty()) return router;
  ASSIGN_OR_RETURN(const v1::ClusterConfig cluster, LoadClusterConfig(config));
  std::string listen = cluster.router().operator_listen();
  if (listen == "off") return absl::InvalidArgumentError("router.operator_listen: is \"off\", there is nobody to ask");
  if (absl::StartsWith(listen, "0.0.0.0:")) listen.replace(0, 7, "127.0.0.1");
  if (absl::StartsWith(listen, "[::]:")) listen.replace(0, 4, "[::1]");
  router.address = listen;
  return router;
}

absl::StatusOr<OperatorJson> AskOperator(const Operator& router, const std::string& path) {
  return Exchange(router, {.path = path});
}

absl::StatusOr<OperatorJson> TellOperator(const Operator& router, const std::string& path) {
  return Exchange(router, {.method = "POST", .path = path, .body = "{}"});
}

absl::StatusOr<OperatorJson> ClusterStatus(const Operator& router) {
  ASSIGN_OR_RETURN(OperatorJson json, AskOperator(router, "/"));
  if (!json.is_object() || !json.contains("cluster") || !json["cluster"].contains("workers")) {
    return absl::UnavailableError(absl::StrCat("what answers at ", router.address, " is not a router's operator port"));
  }
  return json;
}

std::string PercentEncode(absl::string_view text) {
  std::string encoded;
  for (const char c : text) {
    if (absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '.' || c == '_' || c == '~') {
      encoded += c;
    } else {
      absl::StrAppend(&encoded, "%", absl::Hex(static_cast<unsigned char>(c), absl::kZeroPad2));
    }
  }
  return encoded;
}

}  // namespace millrace::cli
