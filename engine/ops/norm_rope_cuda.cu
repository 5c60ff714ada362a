// SPDX-License-Identifier: Apache-2.0
// Embedding, norms and rotations. All of it is bound by the bytes of its rows.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_entry.cuh"
#include "engine/ops/cuda_norm_rope.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void EmbedKernel(const Bf16* table, const int32_t* ids, int copies, int64_t dim, Bf16* out) {
  const int64_t row = blockIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(table + ids[row] * dim);
  for (int64_t i = threadIdx.x; i < dim / 8; i += blockDim.x) {
    const uint4 values = from[i];
    for (int j = 0; j < copies; ++j) reinterpret_cast<uint4*>(out + (row * copies + j) * dim)[i] = values;
  }
}

__global__ void __launch_bounds__(kThreads)
    RmsNormKernel(const Bf16* x, const float* weight, int64_t dim, float eps, Bf16* out) {
  __shared__ float scratch[kThreads / 32];
  const Bf16* from = x + blockIdx.x * dim;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) squares = fmaf(ToFloat(from[i]), ToFloat(from[i]), squares);
  const float scale = 1.0f / sqrtf(BlockSum<kThreads>(squares, scratch) / static_cast<float>(dim) + eps);
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    out[blockIdx.x * dim + i] = ToBf16(ToFloat(from[i]) * scale * weight[i]);
  }
}

__global__ void PrepareRopeKernel(RopeTable table, const int32_t* positions, int64_t rows, float* cos_out,
                                  float* sin_out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * 32) return;
  // The reference multiplies in FP32 and rotates by that rounded angle; only its sine and cosine are accurate.
  const float angle = static_cast<float>(positions[i / 32]) * table.f[i % 32];
  double s, c;
  sincos(static_cast<double>(angle), &s, &c);
  cos_out[i] = static_cast<float>(c);
  sin_out[i] = static_cast<float>(s);
}

__global__ void QueryNormRopeKernel(Bf16Rows q, int heads, RopeView rope, int64_t rows, float eps, Bf16* out) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (warp >= rows * heads) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = warp / heads;
  LaneEntry e;
  LoadBf16Row(q.data + row * q.ld + warp % heads * kHeadDim, lane, e);
  NormEntry(e, nullptr, lane, eps);
  RotateEntry(e, lane, rope.cos + row * 32, rope.sin + row * 32, 1);
  StoreBf16Row(e, lane, out + warp * kHeadDim);
}

__global__ void AddToStreamsKernel(const Bf16* e, const Bf16* h, int copies, int64_t dim, Bf16* out) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < copies * dim; i += blockDim.x) {
    const int64_t at = row * copies * dim + i;
    out[at] = ToBf16(ToFloat(h[at]) + ToFloat(e[row * dim + i % dim]));
  }
}

}  // namespace

void Embed(const Bf16* table, const int32_t* ids, int64_t rows, int copies, int64_t dim, Bf16* out,
           cudaStream_t stream) {
  if (rows == 0) return;
  EmbedKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(table, ids, copies, dim, out);
  CUDA_CHECK(cudaGetLastError());
}

void RmsNorm(const Bf16* x, const float* weight, int64_t rows, int64_t dim, float eps, Bf16* out, cudaStream_t stream) {
  if (rows == 0) return;
  RmsNormKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(x, weight, dim, eps, out);
  CUDA_CHECK(cudaGetLastError());
}

void PrepareRope(const RopeTable& table, const int32_t* positions, int64_t rows, float* cos, float* sin,
                 cudaStream_t stream) {
  if (rows == 0) return;
  PrepareRopeKernel<<<static_cast<unsigned>((rows * 32 + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      table, positions, rows, cos, sin);
  CUDA_CHECK(cudaGetLastError());
}

void QueryNormRope(Bf16Rows q, int heads, RopeView rope, int64_t rows, float eps, Bf16* out, cudaStream_t stream) {
  if (rows == 0) return;
  QueryNormRopeKernel<<<static_cast<unsigned>((rows * heads + 7) / 8), kThreads, 0, stream>>>(q, heads, rope, rows, eps,
                                                                                              out);
  CUDA_CHECK(cudaGetLastError());
}

void AddToStreams(const Bf16* e, const Bf16* h, int64_t rows, int copies, int64_t dim, Bf16* out, cudaStream_t stream) {
  if (rows == 0) return;
  AddToStreamsKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(e, h, copies, dim, out);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
