// SPDX-License-Identifier: Apache-2.0
// The products of cuda_linear.h: checks, and the choice between the two kernels. Host calls only.
#include "engine/device/cuda_device.h"
#include "engine/ops/tensor_linear_kernels.h"
#include "engine/status.h"

namespace millrace::cuda {

void TensorLinear(const DenseProduct& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  CHECK(p.kind == WeightKind::kFp8 || p.kind == WeightKind::kBf16, "the tensor cores take FP8 and BF16 weights");
  const int64_t row_bytes = p.kind == WeightKind::kFp8 ? p.w.k : 2 * p.w.k;
  CHECK(row_bytes % 16 == 0, "a row of the weight does not end on 16 bytes; a load checks this");
  CHECK(p.groups == 1 || row_bytes % kBlockBytes == 0, "groups side by side need whole blocks of K");
  static const int multiprocessors = CurrentMultiprocessors();
  const LinearPlan plan = PlanLinear(p.rows, p.w.n, row_bytes, p.groups, multiprocessors);
  if (plan.skinny) return LinearSkinny(p, plan, stream);
  LinearTile(p, plan, multiprocessors, stream);
}

void LinearFp8(const Weight& w, Fp8Rows x, int64_t rows, LinearOut out, cudaStream_t stream) {
  CHECK(w.kind == WeightKind::kFp8, "LinearFp8 takes FP8 weights");
  TensorLinear({WeightKind::kFp8, w, 1, x.codes, x.ld, x.scales, x.scales_ld, rows, out}, stream);
}

void LinearBf16(const Weight& w, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream) {
  LinearGrouped(w, 1, x, rows, out, stream);
}

void LinearGrouped(const Weight& w, int groups, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream) {
  CHECK(w.kind == WeightKind::kBf16, "LinearBf16 and LinearGrouped take BF16 weights");
  TensorLinear({WeightKind::kBf16, w, groups, x.data, x.ld, nullptr, 0, rows, out}, stream);
}

}  // namespace millrace::cuda
