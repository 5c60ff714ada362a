// SPDX-License-Identifier: Apache-2.0
// See cuda_limits.h.
#include "engine/model/cuda_limits.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/ops/cuda_moe.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

std::string Mebibytes(int64_t bytes) {
  return absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / static_cast<double>(1 << 20));
}

}  // namespace

absl::Status CheckNumerics(Numerics numerics) {
  if (numerics == Numerics::kRelease) return absl::OkStatus();
  return absl::FailedPreconditionError("numerics: cuda computes in `release` only; `exact` runs on the cpu");
}

absl::Status CheckShapes(const ModelConfig& c) {
  const auto at_most = [](const char* name, int64_t found, int64_t most) {
    return found <= most ? absl::OkStatus()
                         : absl::FailedPreconditionError(
                               absl::StrCat("device: cuda takes ", name, " up to ", most, ", the model has ", found));
  };
  RETURN_IF_ERROR(at_most("hidden_size", c.hidden_size, 8192));
  RETURN_IF_ERROR(at_most("moe_intermediate_size", c.moe_intermediate_size, 8192));
  RETURN_IF_ERROR(at_most("vocab_size", c.vocab_size, 1 << 21));
  RETURN_IF_ERROR(at_most("index_n_heads", c.index_n_heads, 256));
  RETURN_IF_ERROR(at_most("n_routed_experts", c.n_routed_experts, kMaxExperts));
  RETURN_IF_ERROR(at_most("num_experts_per_tok", c.num_experts_per_tok, kMaxTopK));
  return absl::OkStatus();
}

absl::StatusOr<std::string> MemoryBudget(const DeviceInfo& device,
                                         const std::vector<std::pair<std::string, int64_t>>& parts) {
  int64_t total = kHeadroom;
  std::string line = absl::StrCat(device.name, ": ");
  for (const auto& [what, bytes] : parts) {
    total += bytes;
    absl::StrAppend(&line, what, " ", Mebibytes(bytes), ", ");
  }
  absl::StrAppend(&line, "headroom ", Mebibytes(kHeadroom), "; ", Mebibytes(total), " of ",
                  Mebibytes(device.free_bytes), " free");
  if (total > device.free_bytes) return absl::ResourceExhaustedError(absl::StrCat("device memory: ", line));
  return line;
}

}  // namespace millrace::cuda
