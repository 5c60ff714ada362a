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

// --operator HOST:PORT, or --config FILE, whose router.operator_listen it is.
struct OperatorFlags {
  std::string address = "127.0.0.1:8081";
  std::string config;

  void Declare(Flags& flags);
  // What to dial. As LoadClusterConfig; InvalidArgument: the configuration has it "off".
  absl::StatusOr<std::string> Resolve() const;
};

// Unavailable: nobody answers there, or not a router. NotFound and others carry the router's own words.
absl::StatusOr<OperatorJson> AskOperator(const std::string& address, const std::string& path);
absl::StatusOr<OperatorJson> TellOperator(const std::string& address, const std::string& path);  // POST {}

// The whole cluster: AskOperator("/"), with "cluster" in it.
absl::StatusOr<OperatorJson> ClusterStatus(const std::string& address);

// Fit for a path segment, whatever it holds.
std::string PercentEncode(absl::string_view text);

}  // namespace millrace::cli
