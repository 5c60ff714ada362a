// SPDX-License-Identifier: Apache-2.0
// The products of cuda_linear.h: checks, and the choice between the two kernels. Host calls only.
#include "engine/device/cuda_device.h"
#include "engine/ops/tensor_linear_kernels.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

int Multiprocessors() {
  static const int count = CurrentMultiprocessors();
  return count;
}

LinearPlan PlanOf(const Weight& w, int groups, int64_t rows) {
  return PlanLinear(rows, w.n, w.k, w.kind == WeightKind::kFp8 ? 1 : 2, groups, Multiprocessors());
}

}  // namespace

int64_t LinearScratchBytes(int64_t n, int64_t k, int64_t rows) { return rows <= kAlwaysSkinnyRows ? 0 : n * k * 2; }

void LinearFp8(const Weight& w, RoundedRows x, int64_t rows, LinearOut out, void* scratch, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(w.kind == WeightKind::kFp8, "LinearFp8 takes FP8 weights");
  CHECK(w.k % 16 == 0, "a row of the weight does not end on 16 bytes; a load checks this");
  DenseProduct p{w, 1, {x.data, x.ld}, rows, out};
  const LinearPlan plan = PlanOf(w, 1, rows);
  if (plan.skinny) return LinearSkinny(p, plan, stream);
  CHECK(scratch != nullptr, "more rows than the caller took scratch for");
  WidenWeight(w, static_cast<Bf16*>(scratch), stream);
  p.w = {WeightKind::kBf16, w.n, w.k, scratch, nullptr};
  LinearTile(p, plan, Multiprocessors(), stream);
}

void LinearBf16(const Weight& w, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream) {
  LinearGrouped(w, 1, x, rows, out, stream);
}

void LinearGrouped(const Weight& w, int groups, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(w.kind == WeightKind::kBf16, "LinearBf16 and LinearGrouped take BF16 weights");
  CHECK(w.k % 8 == 0, "a row of the weight does not end on 16 bytes; a load checks this");
  CHECK(groups == 1 || w.k % kBlockK == 0, "groups side by side need whole blocks of K");
  const DenseProduct p{w, groups, x, rows, out};
  const LinearPlan plan = PlanOf(w, groups, rows);
  if (plan.skinny) return LinearSkinny(p, plan, stream);
  LinearTile(p, plan, Multiprocessors(), stream);
}

}  // namespace millrace::cuda
