// SPDX-License-Identifier: Apache-2.0
// mHC: fold the last sublayer's result into the streams, multiply them with the 24 rows of fn, mix, norm, quantise: one
// kernel, in which a row's streams are read and written once.
//
// A cluster of up to 16 CTAs takes 16 or 32 rows at a time; a CTA owns a range of dims of all four streams and that
// part of fn, so sums over a row meet in the cluster twice: the 24 products (with the sum of squares), and the squares
// of the mix. The products run on the tensor cores: streams are BF16, fn is cut into three BF16 parts that hold all of
// its 24 bits, sums are FP32. A warp keeps its fragments of fn in registers for all rows. All sums are taken in one
// order that depends on D alone. Bound: the bytes of the streams, for one row two meetings of the cluster.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_hyper_connection.h"
#include "engine/ops/hyper_connection_mixer.cuh"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

template <bool kHead, int kRows>
__global__ void __launch_bounds__(kThreads, 1) MixKernel(const __grid_constant__ MixArgs a) {
  using M = Mixer<kHead, kRows>;
  extern __shared__ __align__(16) uint8_t smem[];
  const int slice = SliceDims(a.dim), ctas = ClusterSize(a.dim), rank = static_cast<int>(sm90::ClusterRank());
  const typename M::Smem s(smem, slice);
  M mixer{a, s, slice, ctas, rank, static_cast<int64_t>(rank) * slice};
  // Weights do not depend on the kernel before.
  mixer.PrefetchFn();
  mixer.LoadNorm();
  mixer.HoldFn(0);
  sm90::WaitForPreviousKernel();
  const int64_t step = static_cast<int64_t>(gridDim.x / ctas) * kRows;
  int parity = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x / ctas) * kRows; first < a.rows; first += step, parity ^= 1) {
    mixer.PrefetchStreams(first + step);
    mixer.Load(parity, first);
    __syncthreads();
    mixer.Multiply(parity);
    sm90::ClusterArrive();
    sm90::ClusterWait();
    mixer.Total(parity);
    __syncthreads();
    mixer.Pre();
    __syncthreads();
    mixer.Mix(parity);
    sm90::ClusterArrive();
    if constexpr (!kHead) mixer.Coefficients(first);
    sm90::ClusterWait();
    mixer.Store(parity, first);
    // Sums of the other parity may be written from here on: their readers met again since. x, mixed and totals are this
    // CTA's own, and its threads meet before anyone reads another's.
    __syncthreads();
  }
  // Nobody leaves while others read its sums.
  sm90::ClusterArrive();
  sm90::ClusterWait();
}

// Eight dims a thread.
__global__ void __launch_bounds__(kThreads) PostKernel(HyperUpdate update, int64_t dim, Bf16* streams) {
  const int64_t row = blockIdx.y, d = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (d >= dim) return;
  Bf16* at = streams + row * kStreams * dim + d;
  Eight x[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) x[j] = LoadEight(at + j * dim);
  const Eight y = LoadResult(update, row, dim, d);
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    StoreEight(Fold(y, x, k, update.post + row * kStreams, update.comb + row * kStreams * kStreams), at + k * dim);
  }
}

__global__ void PrefetchKernel(const float* fn, int64_t count) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 32;  // a line of 128 bytes a thread
  if (i < count) sm90::PrefetchL2(fn + i);
}

// How many clusters of this size the card holds at once.
template <bool kHead, int kRows>
int MostClusters(cudaLaunchConfig_t config, int ctas) {
  static int most[kMaxCluster + 1] = {};  // engine thread only
  if (most[ctas] == 0) {
    constexpr int kMostBytes = MixSmem<kRows, Mixer<kHead, kRows>::kN>::Bytes(SliceDims(8192));
    static_assert(kMostBytes <= 227 << 10);
    CUDA_CHECK(cudaFuncSetAttribute(MixKernel<kHead, kRows>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    CUDA_CHECK(cudaFuncSetAttribute(MixKernel<kHead, kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes));
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&most[ctas], MixKernel<kHead, kRows>, &config));
    CHECK(most[ctas] > 0, "a cluster of this size fits no card of this generation");
  }
  return most[ctas];
}

template <bool kHead, int kRows>
void LaunchTiles(const MixArgs& a, cudaStream_t stream) {
  const int ctas = ClusterSize(a.dim);
  cudaLaunchAttribute attributes[1];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = MixSmem<kRows, Mixer<kHead, kRows>::kN>::Bytes(SliceDims(a.dim));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  const int64_t clusters = std::min<int64_t>((a.rows + kRows - 1) / kRows, MostClusters<kHead, kRows>(config, ctas));
  config.gridDim = dim3(static_cast<unsigned>(clusters * ctas));
  CUDA_CHECK(cudaLaunchKernelEx(&config, MixKernel<kHead, kRows>, a));
}

// Larger tiles share the meetings of the cluster among more rows.
template <bool kHead>
void LaunchMix(const MixArgs& a, cudaStream_t stream) {
  if (a.rows <= 128) return LaunchTiles<kHead, 16>(a, stream);
  LaunchTiles<kHead, 32>(a, stream);
}

}  // namespace

void HyperConnectionPre(Bf16* streams, const HyperUpdate& update, const HyperWeights& w, const float* norm,
                        const HyperParams& params, int64_t rows, int64_t dim, const HyperInput& input, float* post,
                        float* comb, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(dim % 32 == 0 && dim <= 8192, "an engine checks this when it is made");
  LaunchMix<false>({streams, update, w, norm, params, rows, dim, input, post, comb}, stream);
}

void HyperPrefetch(const HyperWeights& w, int64_t dim, cudaStream_t stream) {
  const int64_t count = kMixes * kStreams * dim;
  PrefetchKernel<<<static_cast<unsigned>((count + 32 * kThreads - 1) / (32 * kThreads)), kThreads, 0, stream>>>(w.fn,
                                                                                                                count);
  CUDA_CHECK(cudaGetLastError());
}

void HyperConnectionPost(const HyperUpdate& update, int64_t rows, int64_t dim, Bf16* streams, cudaStream_t stream) {
  if (rows == 0 || update.out == nullptr) return;
  const dim3 grid(static_cast<unsigned>((dim / 8 + kThreads - 1) / kThreads), static_cast<unsigned>(rows));
  PostKernel<<<grid, kThreads, 0, stream>>>(update, dim, streams);
  CUDA_CHECK(cudaGetLastError());
}

void HyperHead(const Bf16* streams, const HyperWeights& w, const float* norm, const HyperParams& params, int64_t rows,
               int64_t dim, Bf16* z, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(dim % 32 == 0 && dim <= 8192, "an engine checks this when it is made");
  // Without an update the streams are only read.
  LaunchMix<true>({const_cast<Bf16*>(streams), {}, w, norm, params, rows, dim, {.u = z}, nullptr, nullptr}, stream);
}

}  // namespace millrace::cuda
