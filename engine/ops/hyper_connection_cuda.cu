// SPDX-License-Identifier: Apache-2.0
// mHC: the 24-row product is a linear (linear_cuda.cu); here are its scaling, Sinkhorn, the mix with its norm, and the
// fold back. Bound by the bytes of the streams; Sinkhorn is a chain of 40 dependent divisions on 16 lanes.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_hyper_connection.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 256;     // fold back
constexpr int kMixThreads = 512;  // mix: a row is one block

__device__ inline float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Lane 4 j + k holds c[j][k]. Sums are taken in ascending order, whatever lane asks.
__device__ inline float RowSum(float c, int lane) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kStreams; ++k) sum += __shfl_sync(0xffffu, c, lane / kStreams * kStreams + k);
  return sum;
}
__device__ inline float ColumnSum(float c, int lane) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kStreams; ++j) sum += __shfl_sync(0xffffu, c, j * kStreams + lane % kStreams);
  return sum;
}

__device__ inline float Sinkhorn(float c, int lane, int iterations, float eps) {
  float max = __shfl_sync(0xffffu, c, lane / kStreams * kStreams);
#pragma unroll
  for (int k = 1; k < kStreams; ++k) max = fmaxf(max, __shfl_sync(0xffffu, c, lane / kStreams * kStreams + k));
  c = expf(c - max);
  c = c / RowSum(c, lane) + eps;
  c /= ColumnSum(c, lane) + eps;
  for (int i = 1; i < iterations; ++i) {
    c /= RowSum(c, lane) + eps;
    c /= ColumnSum(c, lane) + eps;
  }
  return c;
}

// One row a block: scale of the flattened streams, coefficients by the first warp, mix, norm. `kHead` has neither post
// nor comb.
template <bool kHead>
__global__ void __launch_bounds__(kMixThreads)
    MixKernel(const Bf16* streams, const float* mixes, const float* base, const float* scale, const float* norm,
              HyperParams params, int64_t dim, Bf16* u, float* post, float* comb) {
  __shared__ float scratch[2][kMixThreads / 32];
  __shared__ float pre[kStreams];
  extern __shared__ float mixed[];  // [dim]
  const int64_t row = blockIdx.x;
  const Bf16* x = streams + row * kStreams * dim;
  float squares = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x * 8; i < kStreams * dim; i += kMixThreads * 8) {
    const uint4 raw = *reinterpret_cast<const uint4*>(x + i);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      squares = fmaf(LowBf16(pairs[n]), LowBf16(pairs[n]), squares);
      squares = fmaf(HighBf16(pairs[n]), HighBf16(pairs[n]), squares);
    }
  }
  const float mean = BlockSum<kMixThreads>(squares, scratch[0]) / static_cast<float>(kStreams * dim);
  const float r = 1.0f / sqrtf(mean + params.norm_eps);

  if (threadIdx.x < 16) {
    const int lane = threadIdx.x;
    const float* mix = mixes + row * (kHead ? kStreams : (2 + kStreams) * kStreams);
    if (lane < kStreams) {
      pre[lane] = Sigmoid(mix[lane] * r * scale[0] + base[lane]) + params.hc_eps;
      if constexpr (!kHead) {
        post[row * kStreams + lane] = 2 * Sigmoid(mix[kStreams + lane] * r * scale[1] + base[kStreams + lane]);
      }
    }
    if constexpr (!kHead) {
      __syncwarp(0xffffu);
      const float c = mix[2 * kStreams + lane] * r * scale[2] + base[2 * kStreams + lane];
      comb[row * kStreams * kStreams + lane] = Sinkhorn(c, lane, params.sinkhorn_iters, params.hc_eps);
    }
  }
  __syncthreads();

  float mixed_squares = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x * 2; i < dim; i += kMixThreads * 2) {
    uint32_t pair[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) pair[j] = *reinterpret_cast<const uint32_t*>(x + j * dim + i);
    float low = __fmul_rn(LowBf16(pair[0]), pre[0]), high = __fmul_rn(HighBf16(pair[0]), pre[0]);
#pragma unroll
    for (int j = 1; j < kStreams; ++j) {
      low = fmaf(LowBf16(pair[j]), pre[j], low);
      high = fmaf(HighBf16(pair[j]), pre[j], high);
    }
    low = RoundToBf16(low);
    high = RoundToBf16(high);
    mixed[i] = low;
    mixed[i + 1] = high;
    mixed_squares = fmaf(high, high, fmaf(low, low, mixed_squares));
  }
  const float mixed_mean = BlockSum<kMixThreads>(mixed_squares, scratch[1]) / static_cast<float>(dim);
  const float norm_scale = 1.0f / sqrtf(mixed_mean + params.norm_eps);
#pragma unroll 4
  for (int64_t i = threadIdx.x * 2; i < dim; i += kMixThreads * 2) {
    *reinterpret_cast<__nv_bfloat162*>(u + row * dim + i) = {ToBf16(mixed[i] * norm_scale * norm[i]),
                                                             ToBf16(mixed[i + 1] * norm_scale * norm[i + 1])};
  }
}

// Two dims a thread: one row fills dim / 512 blocks.
__global__ void __launch_bounds__(kThreads)
    PostKernel(const Bf16* out, const float* post, const float* comb, int64_t dim, Bf16* streams) {
  const int64_t row = blockIdx.y, i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 2;
  if (i >= dim) return;
  Bf16* x = streams + row * kStreams * dim + i;
  uint32_t old[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) old[j] = *reinterpret_cast<const uint32_t*>(x + j * dim);
  const uint32_t o = *reinterpret_cast<const uint32_t*>(out + row * dim + i);
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    const float p = post[row * kStreams + k];
    float low = __fmul_rn(p, LowBf16(o)), high = __fmul_rn(p, HighBf16(o));
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      const float c = comb[(row * kStreams + j) * kStreams + k];
      low = fmaf(c, LowBf16(old[j]), low);
      high = fmaf(c, HighBf16(old[j]), high);
    }
    *reinterpret_cast<__nv_bfloat162*>(x + k * dim) = {ToBf16(low), ToBf16(high)};
  }
}

}  // namespace

void HyperConnectionPre(const Bf16* streams, const HyperWeights& w, const float* norm, const HyperParams& params,
                        int64_t rows, int64_t dim, float* mixes, Bf16* u, float* post, float* comb,
                        cudaStream_t stream) {
  if (rows == 0) return;
  LinearBf16(w.fn, {streams, kStreams * dim}, rows, {mixes, w.fn.n}, stream);
  MixKernel<false><<<static_cast<unsigned>(rows), kMixThreads, dim * sizeof(float), stream>>>(
      streams, mixes, w.base, w.scale, norm, params, dim, u, post, comb);
  CUDA_CHECK(cudaGetLastError());
}

void HyperConnectionPost(const Bf16* out, const float* post, const float* comb, int64_t rows, int64_t dim,
                         Bf16* streams, cudaStream_t stream) {
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>((dim / 2 + kThreads - 1) / kThreads), static_cast<unsigned>(rows));
  PostKernel<<<grid, kThreads, 0, stream>>>(out, post, comb, dim, streams);
  CUDA_CHECK(cudaGetLastError());
}

void HyperHead(const Bf16* streams, const HyperWeights& w, const float* norm, const HyperParams& params, int64_t rows,
               int64_t dim, float* mixes, Bf16* z, cudaStream_t stream) {
  if (rows == 0) return;
  LinearBf16(w.fn, {streams, kStreams * dim}, rows, {mixes, w.fn.n}, stream);
  MixKernel<true><<<static_cast<unsigned>(rows), kMixThreads, dim * sizeof(float), stream>>>(
      streams, mixes, w.base, w.scale, norm, params, dim, z, nullptr, nullptr);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
