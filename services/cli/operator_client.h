// SPDX-License-Identifier: Apache-2.0
// Asking a router's operator port: what `drain`, `top`, `explain` and `up` have in common.
//
// Answers are the JSON of services/router/cluster_status.h. Every wait is bounded. Thread: any, blocking.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "services/cli/flags.h"

namespace millrace::cli {

using OperatorJson = nlohmann::ordered_json;

// A router's operator port, and the key that opens its verbs where keys are configured.
struct Operator {
  std::string address;  // "host:port"
  std::string api_key;  // empty: none
};

// --operator HOST:PORT, or --config FILE, whose router.operator_listen it is; --api-key-file or MILLRACE_OPERATOR_KEY.
struct OperatorFlags {
  std::string address = "127.0.0.1:8081";
  std::string config, api_key_file;

  void Declare(Flags& flags);
  // Whom to ask. As LoadClusterConfig and ReadApiKey; InvalidArgument: the configuration has it "off".
  absl::StatusOr<Operator> Resolve() const;
};

// Unavailable: nobody answers there, or not a router. PermissionDenied: a key is missing or is not an operator's.
// NotFound and others carry the router's own words.
absl::StatusOr<OperatorJson> AskOperator(const Operator& router, const std::string& path);
absl::StatusOr<OperatorJson> TellOperator(const Operator& router, const std::string& path);  // POST {}

// The whole cluster: AskOperator("/"), with "cluster" in it.
absl::StatusOr<OperatorJson> ClusterStatus(const Operator& router);

// Fit for a path segment, whatever it holds.
std::string PercentEncode(absl::string_view text);

}  // namespace millrace::cli
