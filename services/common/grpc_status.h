// SPDX-License-Identifier: Apache-2.0
// The one table between absl::Status and gRPC.
//
// The codes are the same numbers in both; what differs is what may be said. Between our own processes a message names
// leases, extents and workers; it is cut at kMaxGrpcMessageBytes and made valid UTF-8 because it travels in a header.
// The code word of an ApiError travels too (a google.rpc.ErrorInfo): it tells apart what one status code cannot.
// How a caller reacts: Unavailable: try another worker; ResourceExhausted: back off; all others are final.
//
// Thread: values, no state.
#pragma once

#include <grpcpp/support/status.h>

#include <cstddef>

#include "absl/status/status.h"

namespace millrace {

inline constexpr size_t kMaxGrpcMessageBytes = 1024;

grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status FromGrpcStatus(const grpc::Status& status);

// What a caller of the public port is told: the message leads with the error's code word, and google.rpc details
// (proto/google/rpc/error_details.proto) say the same to machines. Words that were written for our log stay there.
grpc::Status ToPublicGrpcStatus(const absl::Status& status);

}  // namespace millrace
