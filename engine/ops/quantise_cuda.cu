// SPDX-License-Identifier: Apache-2.0
// Activation quantisation, by itself and behind what makes the activations: a norm, a SwiGLU. A warp takes a group of
// 128, four values a lane. Bound by the bytes of the rows.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_quantise.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kGroup = 128;

struct Four {
  float v[4];
};
__device__ inline Four LoadFour(const Bf16* at) {
  const uint2 raw = *reinterpret_cast<const uint2*>(at);
  return {{LowBf16(raw.x), HighBf16(raw.x), LowBf16(raw.y), HighBf16(raw.y)}};
}

// This lane's values of group `group` of a row of `k`, rounded; lanes beyond k bring zeros and store nothing. Every
// lane calls it.
__device__ inline void StoreRounded(const Four& x, int64_t row, int64_t k, int64_t group, Bf16* rounded) {
  float scale;
  const uint32_t codes = QuantiseGroup(x.v, scale);
  const int64_t at = group * kGroup + threadIdx.x % 32 * 4;
  if (at >= k) return;
  StoreRoundedFour(codes, scale, rounded + row * k + FragmentPlace(at));
}

// One warp a group, wherever its row is.
struct Place {
  int64_t row, group, at;
  bool inside;
};
__device__ inline Place PlaceOf(int64_t warp, int64_t k) {
  const int64_t groups = (k + kGroup - 1) / kGroup, group = warp % groups, at = group * kGroup + threadIdx.x % 32 * 4;
  return {warp / groups, group, at, at < k};
}
__device__ inline int64_t WarpIndex() { return (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32; }

__global__ void __launch_bounds__(kThreads) RoundKernel(Bf16Rows x, int64_t rows, int64_t k, Bf16* rounded) {
  const Place p = PlaceOf(WarpIndex(), k);
  if (p.row >= rows) return;
  Four v = {};
  if (p.inside) v = LoadFour(x.data + p.row * x.ld + p.at);
  StoreRounded(v, p.row, k, p.group, rounded);
}

__global__ void __launch_bounds__(kThreads)
    NormRoundKernel(Bf16Rows x, const float* weight, int64_t dim, float eps, Bf16* rounded) {
  __shared__ float scratch[kWarps];
  const int64_t row = blockIdx.x;
  const Bf16* from = x.data + row * x.ld;
  float squares = 0;
  for (int64_t i = threadIdx.x * 4; i < dim; i += kThreads * 4) {
    const Four v = LoadFour(from + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) squares = fmaf(v.v[j], v.v[j], squares);
  }
  const float norm = 1.0f / sqrtf(BlockSum<kThreads>(squares, scratch) / static_cast<float>(dim) + eps);
  for (int64_t group = threadIdx.x / 32; group * kGroup < dim; group += kWarps) {
    const int64_t at = group * kGroup + threadIdx.x % 32 * 4;
    Four v = {};
    if (at < dim) {
      v = LoadFour(from + at);
      const float4 w = *reinterpret_cast<const float4*>(weight + at);
      v = {{RoundToBf16(v.v[0] * norm * w.x), RoundToBf16(v.v[1] * norm * w.y), RoundToBf16(v.v[2] * norm * w.z),
            RoundToBf16(v.v[3] * norm * w.w)}};
    }
    StoreRounded(v, row, dim, group, rounded);
  }
}

__global__ void __launch_bounds__(kThreads)
    SwiGluRoundKernel(Bf16Rows gate, Bf16Rows up, int64_t rows, int64_t width, float limit, Bf16* rounded) {
  const Place p = PlaceOf(WarpIndex(), width);
  if (p.row >= rows) return;
  Four v = {};
  if (p.inside) {
    const Four g = LoadFour(gate.data + p.row * gate.ld + p.at), u = LoadFour(up.data + p.row * up.ld + p.at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = fminf(g.v[i], limit), y = fminf(fmaxf(u.v[i], -limit), limit);
      v.v[i] = RoundToBf16(__fmul_rn(x / (1.0f + expf(fminf(-x, 87.0f))), y));
    }
  }
  StoreRounded(v, p.row, width, p.group, rounded);
}

// Blocks for one warp a group.
unsigned Blocks(int64_t rows, int64_t k) {
  const int64_t warps = rows * ((k + kGroup - 1) / kGroup);
  return static_cast<unsigned>((warps + kWarps - 1) / kWarps);
}

}  // namespace

void RoundRows(Bf16Rows x, int64_t rows, int64_t k, Bf16* rounded, cudaStream_t stream) {
  if (rows == 0) return;
  RoundKernel<<<Blocks(rows, k), kThreads, 0, stream>>>(x, rows, k, rounded);
  CUDA_CHECK(cudaGetLastError());
}

void NormRound(Bf16Rows x, const float* weight, int64_t rows, int64_t dim, float eps, Bf16* rounded,
               cudaStream_t stream) {
  if (rows == 0) return;
  NormRoundKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(x, weight, dim, eps, rounded);
  CUDA_CHECK(cudaGetLastError());
}

void SwiGluRound(Bf16Rows gate, Bf16Rows up, int64_t rows, int64_t width, float limit, Bf16* rounded,
                 cudaStream_t stream) {
  if (rows == 0) return;
  SwiGluRoundKernel<<<Blocks(rows, width), kThreads, 0, stream>>>(gate, up, rows, width, limit, rounded);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
