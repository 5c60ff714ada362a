// SPDX-License-Identifier: Apache-2.0
// Looks at a tensor's values for what would poison every later computation.
//
// NaN and Inf in floats, the NaN codes of E4M3 and E8M0 (E8M0 0xFF), expert ids that no expert has. FP4 has no code
// that is not a number. Reads memory once, at about its bandwidth. Thread: pure functions.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "engine/model/checkpoint.h"

namespace millrace {

// InvalidArgument "`file`: tensor `name`: found N values that are NaN or infinite, the first at index I, expected
// none".
absl::Status CheckFinite(const std::string& file, const std::string& name, const HostTensor& tensor);

// For ffn.gate.tid2eid, I64 [vocab, k]: every id in [0, num_experts), no expert twice for one token.
absl::Status CheckExpertIds(const std::string& file, const std::string& name, const HostTensor& tensor,
                            int64_t num_experts);

}  // namespace millrace
