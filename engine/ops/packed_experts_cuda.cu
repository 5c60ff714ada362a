// SPDX-License-Identifier: Apache-2.0
// Routed experts: pairs (token, expert) grouped by expert on the device, then the two grouped products of
// packed_experts_gemm_cuda.cu over tiles of each expert's tokens.
//
// Where a pair comes to stand among its expert's is left to atomics: no result depends on it, each row's bits are its
// own.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/packed_experts_kernels.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kSortThreads = 1024, kGatherThreads = 256;
static_assert(kMaxExperts <= kSortThreads, "one thread an expert");

// Exclusive sums of two counts over the threads of a block, in `scratch` of 64 ints.
struct TwoSums {
  int first, second, first_total, second_total;
};
__device__ inline TwoSums BlockSums(int first, int second, int* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int x = first, y = second;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int left_x = __shfl_up_sync(kFullWarp, x, offset), left_y = __shfl_up_sync(kFullWarp, y, offset);
    if (lane >= offset) {
      x += left_x;
      y += left_y;
    }
  }
  if (lane == 31) {
    scratch[warp] = x;
    scratch[32 + warp] = y;
  }
  __syncthreads();
  TwoSums s{x - first, y - second, 0, 0};
  for (int w = 0; w < kSortThreads / 32; ++w) {
    if (w == warp) {
      s.first += s.first_total;
      s.second += s.second_total;
    }
    s.first_total += scratch[w];
    s.second_total += scratch[32 + w];
  }
  return s;
}

// One block: counts, offsets, tiles, places. An expert's tokens are spread evenly over its tiles, in eights.
__global__ void __launch_bounds__(kSortThreads)
    GroupPairsKernel(const int32_t* experts, int64_t pairs, int num_experts, int tile_tokens, ExpertWorkspace w) {
  __shared__ int count[kMaxExperts], next[kMaxExperts], scratch[64];
  const int t = threadIdx.x;
  if (t < num_experts) count[t] = 0;
  __syncthreads();
  for (int64_t i = t; i < pairs; i += kSortThreads) atomicAdd(&count[experts[i]], 1);
  __syncthreads();
  const int mine = t < num_experts ? count[t] : 0, tiles = (mine + tile_tokens - 1) / tile_tokens;
  const TwoSums sums = BlockSums(mine, tiles, scratch);
  if (t < num_experts) next[t] = sums.first;
  if (tiles > 0) {
    const int each = ((mine + tiles - 1) / tiles + 7) / 8 * 8;
    for (int i = 0; i < tiles; ++i) {
      w.tiles[sums.second + i] = {t, sums.first + min(i * each, mine), max(0, min(each, mine - i * each))};
    }
  }
  if (t == 0) *w.num_tiles = sums.second_total;
  __syncthreads();
  for (int64_t i = t; i < pairs; i += kSortThreads) {
    w.order[atomicAdd(&next[experts[i]], 1)] = static_cast<int32_t>(i);
  }
}

// Rows of x in the order of places, a warp a row, so that tiles of many tokens are copied as boxes.
__global__ void __launch_bounds__(kGatherThreads)
    GatherRowsKernel(RoundedRows x, const int32_t* order, int top_k, int64_t pairs, int64_t hidden, Bf16* gathered) {
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x) / 32;
  if (place >= pairs) return;
  const uint4* from = reinterpret_cast<const uint4*>(x.data + order[place] / top_k * x.ld);
  uint4* to = reinterpret_cast<uint4*>(gathered + place * hidden);
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < hidden / 8; i += 32) to[i] = from[i];
}

ExpertWorkspace LayOut(Bump& bump, int num_experts, int64_t hidden, int64_t width, int64_t pairs) {
  ExpertWorkspace w;
  w.order = bump.Take<int32_t>(pairs);
  w.tiles = bump.Take<PackedExpertTile>(MaxExpertTiles(pairs, num_experts, ExpertTileTokens(ExpertPath::kFew)));
  w.num_tiles = bump.Take<int32_t>(1);
  if (ChooseExpertPath(pairs, num_experts) == ExpertPath::kMany) {
    w.gathered = bump.Take<Bf16>(pairs * hidden);
  }
  w.activations = bump.Take<Bf16>(pairs * width);
  return w;
}

}  // namespace

int64_t ExpertWorkspaceBytes(int num_experts, int64_t hidden, int64_t width, int k, int64_t rows) {
  Bump bump;
  LayOut(bump, num_experts, hidden, width, rows * k);
  return bump.used();
}

ExpertWorkspace ExpertWorkspaceAt(const ExpertWeights& w, int64_t pairs, void* workspace) {
  Bump bump(static_cast<uint8_t*>(workspace));
  return LayOut(bump, w.num_experts, w.hidden, w.width, pairs);
}

ExpertActivations ExpertActivationsOf(const ExpertWeights& w, int64_t rows, int k, void* workspace) {
  const ExpertWorkspace s = ExpertWorkspaceAt(w, rows * k, workspace);
  return {s.order, s.activations};
}

void RoutedExperts(const ExpertWeights& w, RoundedRows x, const int32_t* experts, const float* weights, int64_t rows,
                   int k, float limit, void* workspace, Bf16* expert_rows, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(w.num_experts <= kMaxExperts, "an engine checks this when it is made");
  CHECK(w.hidden % 32 == 0 && w.width % 32 == 0, "groups of 32 of K; a load checks this");
  const int64_t pairs = rows * k;
  const ExpertWorkspace s = ExpertWorkspaceAt(w, pairs, workspace);
  static const int multiprocessors = CurrentMultiprocessors();
  const ExpertPath path = ChooseExpertPath(pairs, w.num_experts);
  GroupPairsKernel<<<1, kSortThreads, 0, stream>>>(experts, pairs, w.num_experts, ExpertTileTokens(path), s);
  CUDA_CHECK(cudaGetLastError());
  if (path == ExpertPath::kMany) {
    GatherRowsKernel<<<static_cast<unsigned>((pairs * 32 + kGatherThreads - 1) / kGatherThreads), kGatherThreads, 0,
                       stream>>>(x, s.order, k, pairs, w.hidden, s.gathered);
    CUDA_CHECK(cudaGetLastError());
  }
  ExpertGateUp(path, w, x, rows, weights, k, limit, s, multiprocessors, stream);
  ExpertDown(path, w, pairs, s, expert_rows, multiprocessors, stream);
}

}  // namespace millrace::cuda
