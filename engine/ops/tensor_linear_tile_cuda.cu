// SPDX-License-Identifier: Apache-2.0
// Dense products of many rows: 128 x 128 tiles of the output, BF16, bound by the tensor cores.
//
// One CTA a multiprocessor walks over tiles. A producer thread copies 128 rows of x and 128 of the weight, half a block
// of K each, into a ring of stages; two consumer warpgroups of 64 rows multiply. Two CTAs of a cluster take two tiles
// that share the weight rows: each copies half of them to both, since one multiprocessor's share of the L2 cache's
// bandwidth would not feed the tensor cores. Each warpgroup has two sets of accumulators: while the tensor cores sum
// block b into one, it promotes block b - 1 from the other (FP32 addition), so promotion costs no tensor time. FP8
// weights are widened into the caller's scratch before, in the order of fragments: their products then have the skinny
// kernel's bits.
#include "engine/device/cuda_device.h"
#include "engine/device/tensor_map.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/sm90.cuh"
#include "engine/ops/tensor_linear_kernels.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

using sm90::Barrier;

constexpr int kStages = 6;
constexpr int kOperandBytes = kLargeRows * kBoxBytes;  // of one operand in a stage
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (kConsumers + 1) * 128;
// 232 for two accumulator sets, the totals and addresses; what is left of 64 Ki registers goes to the producer.
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
static_assert(128 * (kConsumers * kConsumerRegisters + kProducerRegisters) <= 65536, "a multiprocessor's registers");
static_assert(kStages * kStageBytes + 2048 <= kCtaSmemBytes, "the ring, its alignment and its barriers");

// Tiles are walked in bands of this many tiles of outputs, rows inside: what is in flight shares both operands in L2.
constexpr int kBand = 8;

struct TileArgs {
  int64_t rows = 0, n = 0;
  int blocks = 0, groups = 1;
  int row_steps = 0;  // clusters of tiles along the rows
  int output_tiles = 0;
  int64_t x_group = 0;  // elements of x from one group's first column to the next
  LinearOut out{static_cast<float*>(nullptr), 0};
  bool wide_stores = false;
};

struct TilePlace {
  int group, row_step, output_tile;
};

__device__ inline TilePlace PlaceOf(const TileArgs& a, int tile) {
  const int per_group = a.row_steps * a.output_tiles;
  TilePlace p;
  p.group = tile / per_group;
  const int inside = tile % per_group, band = inside / (a.row_steps * kBand), first = band * kBand;
  const int width = min(kBand, a.output_tiles - first), at = inside - band * a.row_steps * kBand;
  p.row_step = at / width;
  p.output_tile = first + at % width;
  return p;
}

// Half a block: the first begins a sum, the second adds to it.
template <int kHalf>
__device__ inline void MultiplyHalf(float* sums, const uint8_t* x_tile, const uint8_t* w_tile) {
  const uint64_t x = sm90::TileDescriptor(x_tile), w = sm90::TileDescriptor(w_tile);
  sm90::ProductFence();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sm90::Product<kLargeOutputs>::Bf16(sums, x + 2 * i, w + 2 * i, kHalf > 0 || i > 0);
  }
  sm90::ProductCommit();
}

__device__ inline void Promote(const float* sums, float* total) {
#pragma unroll
  for (int i = 0; i < kLargeOutputs / 2; ++i) total[i] += sums[i];
}

// Four words of a lane, for column pairs 2 * (lane % 4) of four groups of eight columns, become the eight columns of
// one group: a transposition over the four lanes of a row.
__device__ inline uint4 GatherEight(uint4 w, int lane) {
  const bool odd = (lane & 1) != 0, upper = (lane & 2) != 0;
  uint32_t got = __shfl_xor_sync(kFullWarp, odd ? w.x : w.y, 1);
  (odd ? w.x : w.y) = got;
  got = __shfl_xor_sync(kFullWarp, odd ? w.z : w.w, 1);
  (odd ? w.z : w.w) = got;
  got = __shfl_xor_sync(kFullWarp, upper ? w.x : w.z, 2);
  (upper ? w.x : w.z) = got;
  got = __shfl_xor_sync(kFullWarp, upper ? w.y : w.w, 2);
  (upper ? w.y : w.w) = got;
  return w;
}

__device__ inline void StoreTile(const TileArgs& a, const TilePlace& place, int64_t first_row, const float* total) {
  const int lane = threadIdx.x % 32;
  const int64_t n0 = static_cast<int64_t>(place.output_tile) * kLargeOutputs;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + lane / 4 + half * 8;
    const int64_t base = row * a.out.ld + place.group * a.n;
    if (a.out.bf16 != nullptr && a.wide_stores) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t w[4];
#pragma unroll
        for (int q = 0; q < 4; ++q)
          w[q] = PackBf16(total[4 * (4 * j + q) + 2 * half], total[4 * (4 * j + q) + 2 * half + 1]);
        const uint4 eight = GatherEight({w[0], w[1], w[2], w[3]}, lane);
        const int64_t n = n0 + 8 * (4 * j + lane % 4);
        if (row < a.rows && n < a.n) *reinterpret_cast<uint4*>(a.out.bf16 + base + n) = eight;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kLargeOutputs / 8; ++j) {
        const int64_t n = n0 + 8 * j + 2 * (lane % 4);
        const float first = total[4 * j + 2 * half], second = total[4 * j + 2 * half + 1];
        if (row >= a.rows || n >= a.n) continue;
        if (a.out.bf16 != nullptr) {
          a.out.bf16[base + n] = ToBf16(first);
          if (n + 1 < a.n) a.out.bf16[base + n + 1] = ToBf16(second);
        } else if (a.wide_stores) {
          *reinterpret_cast<float2*>(a.out.f32 + base + n) = {first, second};
        } else {
          a.out.f32[base + n] = first;
          if (n + 1 < a.n) a.out.f32[base + n + 1] = second;
        }
      }
    }
  }
}

// A place in the ring and the parity of its current round.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  __device__ inline void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    TileKernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
               const __grid_constant__ TileArgs a) {
  extern __shared__ uint8_t smem_raw[];
  uint8_t* smem = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(smem_raw) + 1023) & ~uintptr_t{1023});
  Barrier* full = reinterpret_cast<Barrier*>(smem + kStages * kStageBytes);
  Barrier* empty = full + kStages;

  const int warpgroup = threadIdx.x / 128;
  const uint32_t rank = kCluster == 1 ? 0 : sm90::ClusterRank();
  const int num_tiles = a.row_steps * a.output_tiles * a.groups;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      sm90::BarrierInit(full + s, 1);
      sm90::BarrierInit(empty + s, kCluster * kConsumers * 4);  // every consumer warp of the cluster
    }
    sm90::BarrierInitFence();
    sm90::PrefetchMap(&x_map);
    sm90::PrefetchMap(&w_map);
  }
  if constexpr (kCluster > 1) {
    sm90::ClusterArriveRelaxed();
    sm90::ClusterWait();
  } else {
    __syncthreads();
  }

  if (warpgroup == kConsumers) {
    sm90::LowerRegisters<kProducerRegisters>();
    if (threadIdx.x == kConsumers * 128) {
      sm90::WaitForPreviousKernel();
      RingPlace ring;
      for (int tile = blockIdx.x / kCluster; tile < num_tiles; tile += gridDim.x / kCluster) {
        const TilePlace place = PlaceOf(a, tile);
        const int row = (place.row_step * kCluster + rank) * kLargeRows;
        const int weight_row = place.group * static_cast<int>(a.n) + place.output_tile * kLargeOutputs;
        const int x_column = place.group * static_cast<int>(a.x_group);
        for (int half = 0; half < 2 * a.blocks; ++half, ring.Next()) {
          uint8_t* stage = smem + ring.stage * kStageBytes;
          sm90::BarrierWait(empty + ring.stage, ring.parity ^ 1);
          sm90::BarrierExpect(full + ring.stage, kStageBytes);
          sm90::TensorCopy(stage, &x_map, x_column + half * kHalfK, row, full + ring.stage, sm90::kEvictNormal);
          uint8_t* weight = stage + kOperandBytes + rank * (kOperandBytes / kCluster);
          const int share = weight_row + static_cast<int>(rank) * (kLargeOutputs / kCluster);
          if constexpr (kCluster > 1) {
            sm90::TensorCopyMulticast(weight, &w_map, half * kHalfK, share, full + ring.stage, (1 << kCluster) - 1,
                                      sm90::kEvictNormal);
          } else {
            sm90::TensorCopy(weight, &w_map, half * kHalfK, share, full + ring.stage, sm90::kEvictNormal);
          }
        }
      }
    }
  } else {
    sm90::RaiseRegisters<kConsumerRegisters>();
    sm90::WaitForPreviousKernel();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    RingPlace ring, done;  // next to read; oldest not released
    float sums[2][kLargeOutputs / 2] = {}, total[kLargeOutputs / 2];

    const auto stage_of = [&] {
      sm90::BarrierWait(full + ring.stage, ring.parity);
      const uint8_t* stage = smem + ring.stage * kStageBytes;
      ring.Next();
      return stage;
    };
    const auto first_half = [&](float* into) {
      const uint8_t* stage = stage_of();
      MultiplyHalf<0>(into, stage + warpgroup * (kOperandBytes / kConsumers), stage + kOperandBytes);
    };
    const auto second_half = [&](float* into) {
      const uint8_t* stage = stage_of();
      MultiplyHalf<1>(into, stage + warpgroup * (kOperandBytes / kConsumers), stage + kOperandBytes);
    };
    const auto release_block = [&] {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lane < kCluster) {
          if constexpr (kCluster > 1) {
            sm90::BarrierArriveRemote(empty + done.stage, lane);
          } else {
            sm90::BarrierArrive(empty + done.stage);
          }
        }
        done.Next();
      }
    };
    // Begins a block in `next` and ends the one in `last`.
    const auto turn = [&](float* next, const float* last, float* total) {
      first_half(next);
      sm90::ProductWait<1>();
      release_block();
      second_half(next);
      Promote(last, total);
    };

    for (int tile = blockIdx.x / kCluster; tile < num_tiles; tile += gridDim.x / kCluster) {
      const TilePlace place = PlaceOf(a, tile);
      const int64_t first_row = (static_cast<int64_t>(place.row_step) * kCluster + rank) * kLargeRows + warp * 16;
#pragma unroll
      for (float& t : total) t = 0;

      first_half(sums[0]);
      second_half(sums[0]);
      int b = 1;
      for (; b + 1 < a.blocks; b += 2) {
        turn(sums[1], sums[0], total);
        turn(sums[0], sums[1], total);
      }
      // The accumulators must be named, or they would be memory.
      if (b < a.blocks) {
        turn(sums[1], sums[0], total);
        sm90::ProductWait<0>();
        release_block();
        Promote(sums[1], total);
      } else {
        sm90::ProductWait<0>();
        release_block();
        Promote(sums[0], total);
      }
      StoreTile(a, place, first_row, total);
    }
  }
  // A CTA may not leave while its twin still copies to it or arrives at its barriers.
  if constexpr (kCluster > 1) {
    __syncwarp();
    sm90::ClusterArriveRelaxed();
    sm90::ClusterWait();
  }
}

// Sixteen codes a thread, scaled, to BF16 in the order of fragments. Exact: factors are powers of two.
__global__ void WidenKernel(Weight w, int64_t pieces, Bf16* out) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  const int64_t row = piece * 16 / w.k, k = piece * 16 % w.k;
  const float factor = DecodeE8m0(w.scales[row / 128 * ((w.k + 127) / 128) + k / 128]);
  const __nv_bfloat162 scale = __float2bfloat162_rn(factor);
  const uint4 raw = reinterpret_cast<const uint4*>(w.data)[piece];
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  uint32_t pairs[2][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t wide = WidenE4m3ToBf16(words[i], half);
      const __nv_bfloat162 scaled = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&wide), scale);
      pairs[half][i] = *reinterpret_cast<const uint32_t*>(&scaled);
    }
    reinterpret_cast<uint4*>(out)[piece * 2 + half] = {pairs[half][0], pairs[half][1], pairs[half][2], pairs[half][3]};
  }
}

bool Aligned(const void* p, int64_t stride_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride_bytes % bytes == 0;
}

template <int kCluster>
void Launch(const DenseProduct& p, const LinearPlan& plan, int multiprocessors, cudaStream_t stream) {
  const CUtensorMap x_map = MakeTensorMap(TensorElement::kBf16, p.x.data, p.rows, p.groups * p.w.k, p.x.ld, kLargeRows);
  const CUtensorMap w_map =
      MakeTensorMap(TensorElement::kBf16, p.w.data, p.groups * p.w.n, p.w.k, p.w.k, kLargeOutputs / kCluster);
  TileArgs a;
  a.rows = p.rows;
  a.n = p.w.n;
  a.blocks = plan.blocks;
  a.groups = p.groups;
  a.row_steps = static_cast<int>((p.rows + kLargeRows * kCluster - 1) / (kLargeRows * kCluster));
  a.output_tiles = static_cast<int>((p.w.n + kLargeOutputs - 1) / kLargeOutputs);
  a.x_group = p.w.k;
  a.out = p.out;
  a.wide_stores = p.out.bf16 != nullptr ? p.w.n % 8 == 0 && Aligned(p.out.bf16, p.out.ld * 2, 16)
                                        : p.w.n % 2 == 0 && Aligned(p.out.f32, p.out.ld * 4, 8);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(TileKernel<kCluster>, cudaFuncAttributeMaxDynamicSharedMemorySize, kCtaSmemBytes);
  CUDA_CHECK(allowed);

  const int tiles = a.row_steps * a.output_tiles * a.groups;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min(multiprocessors / kCluster, tiles) * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.smem_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, TileKernel<kCluster>, x_map, w_map, a));
}

}  // namespace

void WidenWeight(const Weight& w, Bf16* out, cudaStream_t stream) {
  const int64_t pieces = w.n * w.k / 16;
  WidenKernel<<<static_cast<unsigned>((pieces + 255) / 256), 256, 0, stream>>>(w, pieces, out);
  CUDA_CHECK(cudaGetLastError());
}

void LinearTile(const DenseProduct& p, const LinearPlan& plan, int multiprocessors, cudaStream_t stream) {
  CHECK(p.w.kind == WeightKind::kBf16, "FP8 weights are widened first");
  if (plan.cluster == 2) return Launch<2>(p, plan, multiprocessors, stream);
  Launch<1>(p, plan, multiprocessors, stream);
}

}  // namespace millrace::cuda
