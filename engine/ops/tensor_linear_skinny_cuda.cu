// SPDX-License-Identifier: Apache-2.0
// Dense products of few rows: the weight is read once, at the memory's rate.
//
// The operands change places: 64 weight rows are what a warpgroup product calls A, the rows of x are its columns, 8 to
// 64 of them. FP8 weights are widened to BF16 on their way from shared memory to the registers that A may come from, in
// the order in which a matrix load hands out their bytes: that is FragmentPlace (cuda_quantise.h), in which x lies too.
// Where the outputs alone cannot occupy the card, the CTAs of a cluster share the blocks of K. Each block's
// scaled sums then go, as they are made, to the CTA that closes those outputs, which adds them in ascending order at
// the end: the same additions in the same order as one CTA alone, so neither the cut nor the number of rows changes a
// bit.
#include <bit>

#include "engine/device/cuda_device.h"
#include "engine/device/tensor_map.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/sm90.cuh"
#include "engine/ops/tensor_linear_kernels.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

using sm90::Barrier;

constexpr int kConsumerThreads = 128;  // one warpgroup
constexpr int kThreads = kConsumerThreads + 32;

struct SkinnyArgs {
  int64_t rows = 0, n = 0;
  int blocks = 0, per_cta = 0, stages = 0;
  int64_t x_group = 0;  // elements of x from one group's first column to the next
  const uint8_t* w_scales = nullptr;
  LinearOut out{static_cast<float*>(nullptr), 0};
};

// Output `i` of thread `t`: which of the CTA's 64 outputs and which of its rows (sm90.cuh).
__device__ inline int OutputOf(int t, int i) { return 16 * (t / 32) + t % 32 / 4 + ((i & 2) != 0 ? 8 : 0); }
__device__ inline int RowOf(int t, int i) { return 8 * (i / 4) + 2 * (t % 4) + (i & 1); }

__device__ inline void Store(const SkinnyArgs& a, int64_t row, int64_t n, float value) {
  if (row >= a.rows || n >= a.n) return;
  const int64_t at = row * a.out.ld + static_cast<int64_t>(blockIdx.z) * a.n + n;
  if (a.out.bf16 != nullptr) {
    a.out.bf16[at] = ToBf16(value);
  } else {
    a.out.f32[at] = value;
  }
}

// A warp's part of one block of FP8 weights as eight fragments of A.
__device__ inline void WidenWeights(const uint8_t* tile, uint32_t (&a)[32]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    // Rows of 128 bytes, their eight chunks exchanged by the copy's swizzle.
    const int chunk = (2 * pair + lane / 16) ^ (row & 7);
    uint32_t codes[4];  // rows and eight further, of two steps of 16
    sm90::LoadMatrices(codes, tile + row * kBoxBytes + chunk * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * (2 * pair + i / 2) + i % 2;
      a[at] = WidenE4m3ToBf16(codes[i], 0);
      a[at + 2] = WidenE4m3ToBf16(codes[i], 1);
    }
  }
}

// Grid: cluster rank and tile of outputs, tile of rows, group. kShared: the blocks of K are shared by a cluster.
template <WeightKind kKind, int kRows, bool kShared>
__global__ void __launch_bounds__(kThreads)
    SkinnyKernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                 const __grid_constant__ SkinnyArgs a, int cluster_log2) {
  extern __shared__ uint8_t smem_raw[];
  const int cluster = kShared ? 1 << cluster_log2 : 1;
  uint8_t* smem = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(smem_raw) + 1023) & ~uintptr_t{1023});
  constexpr int kValueBytes = kKind == WeightKind::kFp8 ? 1 : 2;
  constexpr int kWeightBytes = SkinnyWeightBytes(kValueBytes), kStageBytes = SkinnyStageBytes(kRows, kValueBytes);
  constexpr int kXBoxBytes = kRows * kBoxBytes;
  constexpr int kSums = kRows / 2;  // a thread's
  constexpr int kOutputsLog2 = std::countr_zero(static_cast<unsigned>(kSkinnyOutputs * kRows));
  // Sums handed over, of every block of K: [blocks][the outputs this CTA closes].
  float* sums = reinterpret_cast<float*>(smem + a.stages * kStageBytes);
  const int closed_log2 = kOutputsLog2 - cluster_log2, closed = 1 << closed_log2;
  Barrier* full = reinterpret_cast<Barrier*>(smem + a.stages * kStageBytes +
                                             (kShared ? SkinnySumBytes(kRows, cluster, a.blocks) : 0));
  Barrier* empty = full + a.stages;

  const int rank = static_cast<int>(blockIdx.x) & (cluster - 1);
  const int first_output = (static_cast<int>(blockIdx.x) >> cluster_log2) * kSkinnyOutputs;
  const int first_row = static_cast<int>(blockIdx.y) * kRows;
  const int first_block = rank * a.per_cta, count = min(a.per_cta, a.blocks - first_block);

  if (threadIdx.x == 0) {
    for (int s = 0; s < a.stages; ++s) {
      sm90::BarrierInit(full + s, 1);
      sm90::BarrierInit(empty + s, kConsumerThreads / 32);
    }
    sm90::BarrierInitFence();
  }
  __syncthreads();
  // The CTAs of a cluster must all have started before anything is handed to one.
  if constexpr (kShared) {
    sm90::ClusterArriveRelaxed();
    sm90::ClusterWait();
  }

  if (threadIdx.x == kConsumerThreads) {
    const int weight_row = static_cast<int>(blockIdx.z * a.n) + first_output;
    const int x_column = static_cast<int>(blockIdx.z * a.x_group);
    const auto copy_weight = [&](int i, int stage) {
      sm90::BarrierExpect(full + stage, kStageBytes);
#pragma unroll
      for (int box = 0; box < kValueBytes; ++box) {
        sm90::TensorCopy(smem + stage * kStageBytes + box * kSkinnyOutputs * kBoxBytes, &w_map,
                         (first_block + i) * kBlockK + box * kHalfK, weight_row, full + stage, sm90::kEvictFirst);
      }
    };
    const auto copy_x = [&](int i, int stage) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        sm90::TensorCopy(smem + stage * kStageBytes + kWeightBytes + box * kXBoxBytes, &x_map,
                         x_column + (first_block + i) * kBlockK + box * kHalfK, first_row, full + stage,
                         sm90::kEvictLast);
      }
    };
    // Weights do not depend on the kernel before this one; the rows do.
    const int ahead = min(a.stages, count);
    for (int i = 0; i < ahead; ++i) copy_weight(i, i);
    sm90::WaitForPreviousKernel();
    for (int i = 0; i < ahead; ++i) copy_x(i, i);
    uint32_t parity = 0;
    for (int i = ahead, stage = 0; i < count; ++i) {
      sm90::BarrierWait(empty + stage, parity);
      copy_weight(i, stage);
      copy_x(i, stage);
      if (++stage == a.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }

  float total[kSums] = {};
  // Where this thread's sum `v` of block b goes: the CTA that closes the output.
  const auto place_of = [&](int v, int b) {
    const int at = v * kConsumerThreads + threadIdx.x;
    return sm90::RemoteAddress(sums + b * closed + (at & (closed - 1)), at >> closed_log2);
  };
  // Uniform over a warp, and known to the compiler to be.
  const bool is_consumer = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kConsumerThreads, 0) == 0;
  if (is_consumer && count > 0) {
    sm90::WaitForPreviousKernel();
    const uint8_t* w_scales = a.w_scales + static_cast<int64_t>(first_output / 128) * a.blocks;
    int stage = 0, done = 0;  // next to read, next to release
    uint32_t parity = 0;

    const auto issue = [&](float* sum, uint32_t(&widened)[32]) {
      sm90::BarrierWait(full + stage, parity);
      const uint8_t* weights = smem + stage * kStageBytes;
      if constexpr (kKind == WeightKind::kFp8) WidenWeights(weights, widened);
      sm90::ProductFence();
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        // Sixteen of K are 32 bytes of a box.
        const uint64_t x = sm90::TileDescriptor(weights + kWeightBytes + k / 4 * kXBoxBytes) + k % 4 * 2;
        if constexpr (kKind == WeightKind::kFp8) {
          sm90::Product<kRows>::Bf16(sum, widened + 4 * k, x, k > 0);
        } else {
          const uint64_t w = sm90::TileDescriptor(weights + k / 4 * kSkinnyOutputs * kBoxBytes) + k % 4 * 2;
          sm90::Product<kRows>::Bf16(sum, w, x, k > 0);
        }
      }
      sm90::ProductCommit();
      if (++stage == a.stages) {
        stage = 0;
        parity ^= 1;
      }
    };
    const auto finish = [&](int i, const float* sum) {
      if (threadIdx.x % 32 == 0) sm90::BarrierArrive(empty + done);
      if (++done == a.stages) done = 0;
      float scale = 1;
      if constexpr (kKind == WeightKind::kFp8) scale = DecodeE8m0(__ldg(w_scales + first_block + i));
        // A power of two: the multiplication is exact, so a fused multiply-add and the two steps apart agree.
#pragma unroll
      for (int v = 0; v < kSums; ++v) {
        if constexpr (kShared) {
          sm90::StoreRemote(place_of(v, first_block + i), sum[v] * scale);
        } else {
          total[v] = fmaf(sum[v], scale, total[v]);
        }
      }
    };

    // While the tensor cores sum one block, the one before is finished.
    float sum[2][kSums] = {};
    uint32_t widened[2][32];
    issue(sum[0], widened[0]);
    int i = 1;
    for (; i + 1 < count; i += 2) {
      issue(sum[1], widened[1]);
      sm90::ProductWait<1>();
      finish(i - 1, sum[0]);
      issue(sum[0], widened[0]);
      sm90::ProductWait<1>();
      finish(i, sum[1]);
    }
    if (i < count) {
      issue(sum[1], widened[1]);
      sm90::ProductWait<1>();
      finish(i - 1, sum[0]);
      sm90::ProductWait<0>();
      finish(i, sum[1]);
    } else {
      sm90::ProductWait<0>();
      finish(i - 1, sum[0]);
    }
  }

  if constexpr (kShared) {
    __syncwarp();
    sm90::ClusterArrive();
    sm90::ClusterWait();
    for (int o = threadIdx.x; o < closed; o += kThreads) {
      float y = 0;
#pragma unroll 8
      for (int b = 0; b < a.blocks; ++b) y += sums[b * closed + o];
      const int at = rank * closed + o, t = at % kConsumerThreads, v = at / kConsumerThreads;
      Store(a, first_row + RowOf(t, v), first_output + OutputOf(t, v), y);
    }
  } else if (threadIdx.x < kConsumerThreads) {
#pragma unroll
    for (int v = 0; v < kSums; ++v) {
      Store(a, first_row + RowOf(threadIdx.x, v), first_output + OutputOf(threadIdx.x, v), total[v]);
    }
  }
}

template <WeightKind kKind, int kRows, bool kShared>
void Launch(const DenseProduct& p, const LinearPlan& plan, cudaStream_t stream) {
  constexpr bool kFp8 = kKind == WeightKind::kFp8;
  const CUtensorMap w_map = MakeTensorMap(kFp8 ? TensorElement::kByte : TensorElement::kBf16, p.w.data,
                                          p.groups * p.w.n, p.w.k, p.w.k, kSkinnyOutputs);
  const CUtensorMap x_map = MakeTensorMap(TensorElement::kBf16, p.x.data, p.rows, p.groups * p.w.k, p.x.ld, kRows);
  SkinnyArgs a;
  a.rows = p.rows;
  a.n = p.w.n;
  a.blocks = plan.blocks;
  a.per_cta = plan.per_cta;
  a.stages = plan.stages;
  a.x_group = p.w.k;
  a.w_scales = p.w.scales;
  a.out = p.out;
  static const cudaError_t allowed = cudaFuncSetAttribute(SkinnyKernel<kKind, kRows, kShared>,
                                                          cudaFuncAttributeMaxDynamicSharedMemorySize, kCtaSmemBytes);
  CUDA_CHECK(allowed);

  cudaLaunchAttribute attributes[1];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((p.w.n + kSkinnyOutputs - 1) / kSkinnyOutputs * plan.cluster),
                        static_cast<unsigned>((p.rows + kRows - 1) / kRows), static_cast<unsigned>(p.groups));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, SkinnyKernel<kKind, kRows, kShared>, w_map, x_map, a,
                                std::countr_zero(static_cast<unsigned>(plan.cluster))));
}

template <WeightKind kKind, int kRows>
void LaunchCluster(const DenseProduct& p, const LinearPlan& plan, cudaStream_t stream) {
  if (plan.cluster > 1) return Launch<kKind, kRows, true>(p, plan, stream);
  Launch<kKind, kRows, false>(p, plan, stream);
}

template <WeightKind kKind>
void LaunchRows(const DenseProduct& p, const LinearPlan& plan, cudaStream_t stream) {
  switch (plan.tokens) {
    case 8:
      return LaunchCluster<kKind, 8>(p, plan, stream);
    case 16:
      return LaunchCluster<kKind, 16>(p, plan, stream);
    case 32:
      return LaunchCluster<kKind, 32>(p, plan, stream);
    default:
      return LaunchCluster<kKind, 64>(p, plan, stream);
  }
}

}  // namespace

void LinearSkinny(const DenseProduct& p, const LinearPlan& plan, cudaStream_t stream) {
  if (p.w.kind == WeightKind::kFp8) return LaunchRows<WeightKind::kFp8>(p, plan, stream);
  LaunchRows<WeightKind::kBf16>(p, plan, stream);
}

}  // namespace millrace::cuda
