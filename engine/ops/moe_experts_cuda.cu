// SPDX-License-Identifier: Apache-2.0
// Routed experts: pairs (token, expert) sorted by expert on the device, then three FP4 products and a SwiGLU over the
// sorted pairs. Each expert's rows are cut into tiles; a launch has as many blocks as there could be tiles, and those
// beyond the last leave at once. The products are the plain ones of cuda_product.cuh.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_moe.h"
#include "engine/ops/cuda_product.cuh"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kSortThreads = 1024, kSortWarps = kSortThreads / 32;

// Pairs `begin .. begin + count` of the sorted order, all of one expert.
struct ExpertTile {
  int32_t expert = 0, begin = 0, count = 0;
};

// The workspace of one call.
struct Workspace {
  int32_t* order;      // [P] pair at each place of the sorted order
  ExpertTile* tiles;   // [max_tiles]
  int32_t* num_tiles;  // [1]
  Bf16 *gate, *up;     // [P, I] in sorted order
  uint8_t* codes;      // [P, I]
  float* scales;       // [P, I / 128]
};

// Rows of a tile: few where pairs are few, so that blocks waste no lanes.
int TileRows(int64_t pairs) { return pairs <= 1024 ? kSkinnyRows : kTileRows; }

int64_t MaxTiles(int num_experts, int64_t pairs) {
  return std::min<int64_t>(pairs, num_experts + pairs / TileRows(pairs));
}

Workspace LayOut(Bump& bump, int num_experts, int64_t width, int64_t pairs) {
  Workspace w;
  w.order = bump.Take<int32_t>(pairs);
  w.tiles = bump.Take<ExpertTile>(std::min<int64_t>(pairs, num_experts + pairs / kSkinnyRows));
  w.num_tiles = bump.Take<int32_t>(1);
  w.gate = bump.Take<Bf16>(pairs * width);
  w.up = bump.Take<Bf16>(pairs * width);
  w.codes = bump.Take<uint8_t>(pairs * width);
  w.scales = bump.Take<float>(pairs * ((width + 127) / 128));
  return w;
}

// One block: counts, offsets, a stable scatter (one warp an expert at a time, in pair order) and the tiles.
__global__ void __launch_bounds__(kSortThreads)
    SortPairsKernel(const int32_t* experts, int64_t pairs, int num_experts, int tile_rows, Workspace w) {
  __shared__ int count[kMaxExperts], offset[kMaxExperts], tile_offset[kMaxExperts];
  for (int e = threadIdx.x; e < num_experts; e += kSortThreads) count[e] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < pairs; i += kSortThreads) atomicAdd(&count[experts[i]], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0, tiles = 0;
    for (int e = 0; e < num_experts; ++e) {
      offset[e] = total;
      tile_offset[e] = tiles;
      total += count[e];
      tiles += (count[e] + tile_rows - 1) / tile_rows;
    }
    *w.num_tiles = tiles;
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int e = warp; e < num_experts; e += kSortWarps) {
    if (count[e] == 0) continue;
    int at = offset[e];
    for (int64_t i0 = 0; i0 < pairs; i0 += 32) {
      const bool mine = i0 + lane < pairs && experts[i0 + lane] == e;
      const unsigned mask = __ballot_sync(kFullWarp, mine);
      if (mine) w.order[at + __popc(mask & ((1u << lane) - 1))] = static_cast<int32_t>(i0 + lane);
      at += __popc(mask);
    }
    for (int t = lane; t * tile_rows < count[e]; t += 32) {
      w.tiles[tile_offset[e] + t] = {e, offset[e] + t * tile_rows, min(tile_rows, count[e] - t * tile_rows)};
    }
  }
}

struct ExpertProduct {
  const uint8_t* data;  // first expert's
  const uint8_t* scales;
  int64_t n, k;
  ActivationView x;
  const int32_t* order;
  int top_k;  // x is by token: row order[i] / top_k. 0: x is by place in the sorted order
  Bf16* out;
  bool scatter;  // out row order[i], else i
};

__device__ inline Weight WeightOf(const ExpertProduct& p, int expert) {
  return {WeightKind::kFp4, p.n, p.k, p.data + expert * p.n * (p.k / 2), p.scales + expert * p.n * (p.k / 32)};
}
__device__ inline int64_t SourceRow(const ExpertProduct& p, int64_t place) {
  return p.top_k == 0 ? place : p.order[place] / p.top_k;
}
__device__ inline void StoreValue(const ExpertProduct& p, int64_t place, int64_t n, float value) {
  p.out[(p.scatter ? p.order[place] : place) * p.n + n] = ToBf16(value);
}

__global__ void __launch_bounds__(kSkinnyThreads)
    ExpertSkinnyKernel(ExpertProduct p, SkinnyShape shape, const ExpertTile* tiles, const int32_t* num_tiles) {
  extern __shared__ __align__(16) uint8_t smem[];
  if (static_cast<int>(blockIdx.y) >= *num_tiles) return;
  const ExpertTile tile = tiles[blockIdx.y];
  Skinny<WeightKind::kFp4, kSkinnyRows>(
      WeightOf(p, tile.expert), p.x, shape, tile.count, static_cast<int64_t>(blockIdx.x) * shape.outputs, smem,
      [&](int r) { return SourceRow(p, tile.begin + r); },
      [&](int r, int64_t n, float value) { StoreValue(p, tile.begin + r, n, value); });
}

__global__ void __launch_bounds__(kTileThreads)
    ExpertTileKernel(ExpertProduct p, const ExpertTile* tiles, const int32_t* num_tiles) {
  __shared__ TileSmem smem;
  if (static_cast<int>(blockIdx.y) >= *num_tiles) return;
  const ExpertTile tile = tiles[blockIdx.y];
  Tile<WeightKind::kFp4>(
      WeightOf(p, tile.expert), p.x, tile.count, static_cast<int64_t>(blockIdx.x) * kTileOutputs, smem,
      [&](int r) { return SourceRow(p, tile.begin + r); },
      [&](int r, int64_t n, float value) { StoreValue(p, tile.begin + r, n, value); });
}

void Launch(const ExpertProduct& p, const Workspace& w, int num_experts, int64_t pairs, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(MaxTiles(num_experts, pairs));
  if (TileRows(pairs) == kSkinnyRows) {
    const SkinnyShape shape = ChooseSkinny(Block<WeightKind::kFp4>::kK, p.n, p.k, kSkinnyRows);
    static const cudaError_t allowed =
        cudaFuncSetAttribute(ExpertSkinnyKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSmemBytes);
    CUDA_CHECK(allowed);
    CHECK(shape.smem_bytes <= kMaxSmemBytes, "an expert of this K was not checked at load");
    const dim3 grid(static_cast<unsigned>((p.n + shape.outputs - 1) / shape.outputs), tiles);
    ExpertSkinnyKernel<<<grid, kSkinnyThreads, shape.smem_bytes, stream>>>(p, shape, w.tiles, w.num_tiles);
  } else {
    const dim3 grid(static_cast<unsigned>((p.n + kTileOutputs - 1) / kTileOutputs), tiles);
    ExpertTileKernel<<<grid, kTileThreads, 0, stream>>>(p, w.tiles, w.num_tiles);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

int64_t ExpertWorkspaceBytes(int num_experts, int64_t hidden, int64_t width, int k, int64_t rows) {
  static_cast<void>(hidden);
  Bump bump;
  LayOut(bump, num_experts, width, rows * k);
  return bump.used();
}

void RoutedExperts(const ExpertWeights& w, Fp8Rows x, const int32_t* experts, const float* weights, int64_t rows, int k,
                   float limit, void* workspace, Bf16* expert_rows, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(w.num_experts <= kMaxExperts, "an engine checks this when it is made");
  const int64_t pairs = rows * k;
  Bump bump(static_cast<uint8_t*>(workspace));
  const Workspace s = LayOut(bump, w.num_experts, w.width, pairs);
  SortPairsKernel<<<1, kSortThreads, 0, stream>>>(experts, pairs, w.num_experts, TileRows(pairs), s);
  CUDA_CHECK(cudaGetLastError());

  const ActivationView by_token{.codes = x.codes, .scales = x.scales, .ld = x.ld, .scales_ld = x.scales_ld};
  Launch({w.w1, w.w1_scales, w.width, w.hidden, by_token, s.order, k, s.gate, false}, s, w.num_experts, pairs, stream);
  Launch({w.w3, w.w3_scales, w.width, w.hidden, by_token, s.order, k, s.up, false}, s, w.num_experts, pairs, stream);
  SwiGlu(s.gate, s.up, weights, s.order, pairs, w.width, limit, s.gate, stream);
  QuantiseRows({s.gate, w.width}, pairs, w.width, s.codes, s.scales, stream);
  const ActivationView by_pair{.codes = s.codes, .scales = s.scales, .ld = w.width, .scales_ld = (w.width + 127) / 128};
  Launch({w.w2, w.w2_scales, w.hidden, w.width, by_pair, s.order, 0, expert_rows, true}, s, w.num_experts, pairs,
         stream);
}

}  // namespace millrace::cuda
