// SPDX-License-Identifier: Apache-2.0
// Requests of inference.proto as the fronts' common ApiRequest.
//
// Each is written as the JSON that HTTP would have received and read by the same parser, so that a limit or an error is
// the same on both. Thread: any; pure functions.
#pragma once

#include "absl/status/statusor.h"
#include "millrace/v1/inference.pb.h"
#include "services/router/openai_request.h"

namespace millrace::router {

// InvalidArgument and NotFound with an ApiError, as openai_request.h.
absl::StatusOr<ApiRequest> FromGenerate(const v1::GenerateRequest& request, const ServedModel& model, ApiLimits limits);
absl::StatusOr<ApiRequest> FromChat(const v1::ChatRequest& request, const ServedModel& model, ApiLimits limits);

}  // namespace millrace::router
