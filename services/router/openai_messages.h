// SPDX-License-Identifier: Apache-2.0
// The checks of a chat request's messages, tools and response format. They only judge: the encoder (engine/text) reads
// the same JSON afterwards and may rely on what passed.
//
// Thread: any; pure functions.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/router/http_limits.h"
#include "services/router/json_fields.h"
#include "services/router/openai_request.h"

namespace millrace::router {

// Errors name `messages[i].field`.
absl::Status CheckMessages(JsonFields& fields, const ApiLimits& limits);

// Tools and tool_choice; the model is shown the tools unless that is none. Adds to `ignored` what has no effect.
absl::StatusOr<ToolMarkup> CheckTools(JsonFields& fields, const ApiLimits& limits, std::vector<std::string>& ignored);

absl::Status CheckResponseFormat(JsonFields& fields);

}  // namespace millrace::router
