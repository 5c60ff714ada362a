// SPDX-License-Identifier: Apache-2.0
// Grouped products of routed experts: FP4 weights that stay packed until they are in registers, activations rounded
// through FP8, both multiplied as the BF16 values that they are.
//
// For few tokens the packed weights' bytes bound it, for many the tensor cores. Weights are the left operand, 64 rows a
// warpgroup product, and come from registers: records (packed_experts_plan.h) are copied whole to shared memory, each
// thread reads its 64 codes of a block and widens them by byte permutations to BF16 in the order that the instruction
// wants, so widened weights are never stored. An expert's tokens are the columns. A CTA takes an item: 256 packed rows
// of one expert and one tile of its tokens; a producer warp keeps a ring of stages full across items. Gate and up rows
// alternate in a tile, so SwiGLU happens in registers; the item's 128 activations of a token are one quantisation
// group.
//
// The number of columns is chosen per tile of tokens, from the tokens there are. As everywhere, neither it nor the
// number of warpgroups changes a bit of a row.
#include "engine/device/cuda_device.h"
#include "engine/device/tensor_map.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_quantise.h"
#include "engine/ops/packed_experts_block.cuh"
#include "engine/ops/packed_experts_kernels.h"
#include "engine/ops/sm90.cuh"
#include "engine/ops/tensor_linear_plan.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

using sm90::Barrier;

enum class Half { kGateUp, kDown };

struct GemmArgs {
  const uint8_t* weights = nullptr;  // packed, first expert
  int64_t expert_bytes = 0;
  int items = 0, blocks = 0;  // of one expert's rows; of K
  const PackedExpertTile* tiles = nullptr;
  const int32_t* num_tiles = nullptr;
  const int32_t* order = nullptr;
  int top_k = 1;
  int64_t rows_out = 0;  // I or D
  // Gate and up.
  const float* pair_weights = nullptr;
  float limit = 0;
  Bf16* activations = nullptr;
  // Down.
  Bf16* out = nullptr;
};

template <Half kHalf, ExpertPath kPath>
struct Config {
  static constexpr int kGroups = kPath == ExpertPath::kFew ? 4 : 2;  // consumer warpgroups
  static constexpr int kPasses = kExpertItemTiles / kGroups;
  static constexpr int kTokens = ExpertTileTokens(kPath);
  static constexpr int kConsumerThreads = kGroups * 128;
  static constexpr int kThreads = kConsumerThreads + 128;
  // Registers of a thread. A raise is granted from what a CTA was started with and others have given back; more than
  // that waits for ever.
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kConsumerRegisters = kPath == ExpertPath::kFew ? 112 : 232;
  static constexpr int kProducerRegisters = kPath == ExpertPath::kFew ? 32 : 40;
  static_assert(kConsumerThreads * kConsumerRegisters + 128 * kProducerRegisters <= kThreads * kStartRegisters);
  static constexpr int kStages = kPath == ExpertPath::kFew ? 9 : 4;
  // A stage: activations in two boxes of 64 of K, one record a warpgroup.
  static constexpr int kXBoxBytes = kTokens * 128, kXBytes = 2 * kXBoxBytes;
  static constexpr int kStageBytes = (kXBytes + kGroups * kExpertRecordBytes + 1023) / 1024 * 1024;
  // Results of a pass by token, BF16; the pad of 16 bytes spreads eight tokens over all banks.
  static constexpr int kResultBytes = (kHalf == Half::kGateUp ? 128 : kGroups * kExpertTileRows) * 2 + 16;
  static constexpr int kResultAt = kStages * kStageBytes;
  static constexpr int kTokenAt = kResultAt + kTokens * kResultBytes;  // a token's weight, or its pair
  static constexpr int kTableAt = (kTokenAt + kTokens * 4 + 15) / 16 * 16;
  static constexpr int kBarrierAt = kTableAt + 256;
  static constexpr int kSmemBytes = kBarrierAt + 2 * kStages * 8 + 1024;
  static_assert(kSmemBytes <= kCtaSmemBytes, "the ring, a pass's results and the barriers");
};

struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  template <int kStages>
  __device__ inline void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <Half kHalf, ExpertPath kPath>
struct Consumer {
  using C = Config<kHalf, kPath>;
  static constexpr int kConsumerBarrier = 1;

  const GemmArgs& a;
  uint8_t* smem;
  Barrier *full, *empty;
  RingPlace ring;

  __device__ inline void Meet() { sm90::NamedBarrier(kConsumerBarrier, C::kConsumerThreads); }

  __device__ inline void Release(int stage) { sm90::BarrierArriveIf(threadIdx.x % 32 == 0, empty + stage); }

  template <int kN>
  __device__ inline void Item(const PackedExpertTile& tile, int item) {
    const int group = threadIdx.x / 128, t = threadIdx.x % 128;
    const uint4* table = reinterpret_cast<const uint4*>(smem + C::kTableAt);
    // What the epilogue needs of this thread's token is asked for early.
    int32_t pair = 0;
    float pair_weight = 0;
    if (threadIdx.x < tile.count) {
      pair = a.order[tile.begin + threadIdx.x];
      if constexpr (kHalf == Half::kGateUp) pair_weight = a.pair_weights[pair];
    }

    const auto widen = [&](RingPlace at, WidenedBlock& w) {
      sm90::BarrierWait(full + at.stage, at.parity);
      Widen(smem + at.stage * C::kStageBytes + C::kXBytes + group * kExpertRecordBytes, table, t, w);
    };
    const auto issue = [&](RingPlace at, const WidenedBlock& w, float* sums) {
      sm90::ProductFence();
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        // Sixteen of K are 32 bytes of a box.
        const uint64_t x = sm90::TileDescriptor(smem + at.stage * C::kStageBytes + k / 4 * C::kXBoxBytes) + k % 4 * 2;
        sm90::Product<kN>::Bf16(sums, w.a + 4 * k, x, k > 0);
      }
      sm90::ProductCommit();
    };
    const auto finish = [&](RingPlace at, const WidenedBlock& w, const float* sums, float* total) {
      sm90::ProductWait<0>();
      Promote<kN>(sums, w, total);
      Release(at.stage);
    };

    float sums[kN / 2] = {};
    WidenedBlock even, odd;
#pragma unroll 1
    for (int pass = 0; pass < C::kPasses; ++pass) {
      float total[kN / 2] = {};
      RingPlace at = ring, next = ring;
      widen(at, even);
      int b = 0;
      // While the tensor cores sum one block, the next is widened.
#pragma unroll 1
      for (; b + 2 < a.blocks; b += 2) {
        next.Next<C::kStages>();
        issue(at, even, sums);
        widen(next, odd);
        finish(at, even, sums, total);
        at = next;
        next.Next<C::kStages>();
        issue(at, odd, sums);
        widen(next, even);
        finish(at, odd, sums, total);
        at = next;
      }
      if (b + 1 < a.blocks) {
        next.Next<C::kStages>();
        issue(at, even, sums);
        widen(next, odd);
        finish(at, even, sums, total);
        at = next;
        issue(at, odd, sums);
        finish(at, odd, sums, total);
      } else {
        issue(at, even, sums);
        finish(at, even, sums, total);
      }
      at.Next<C::kStages>();
      ring = at;
      if constexpr (kHalf == Half::kGateUp) {
        KeepActivations<kN>(pass, group, t, pair_weight, total);
      } else {
        StoreRows<kN>(tile, item, pass, group, t, pair, total);
      }
    }
    if constexpr (kHalf == Half::kGateUp) Round(tile, item);
  }

  // SwiGLU of a pass into the results by token. The first barrier of an item also says that the last item's results
  // have been read.
  template <int kN>
  __device__ inline void KeepActivations(int pass, int group, int t, float pair_weight, const float* total) {
    float* token_weights = reinterpret_cast<float*>(smem + C::kTokenAt);
    if (pass == 0) {
      Meet();
      if (threadIdx.x < C::kTokens) token_weights[threadIdx.x] = pair_weight;
      Meet();
    }
    const int lane = t % 32;
    uint32_t matrices[kN / 8];
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float2 w = *reinterpret_cast<const float2*>(token_weights + 8 * j + 2 * (lane % 4));
      matrices[j] = PackBf16(Activate(total[4 * j], total[4 * j + 2], w.x, a.limit),
                             Activate(total[4 * j + 1], total[4 * j + 3], w.y, a.limit));
    }
    // Eight activations a warp, 32 a packed tile.
    const int column = (pass * C::kGroups + group) * 32 + t / 32 * 8;
    StoreColumns<kN>(matrices, smem + C::kResultAt + column * 2, C::kResultBytes, lane);
  }

  // The item's 128 activations of each token are a quantisation group: one warp a token.
  __device__ inline void Round(const PackedExpertTile& tile, int item) {
    Meet();
    const int lane = threadIdx.x % 32;
    const int64_t column = static_cast<int64_t>(item) * 128 + lane * 4;
    for (int token = threadIdx.x / 32; token < tile.count; token += C::kConsumerThreads / 32) {
      const uint2 raw = *reinterpret_cast<const uint2*>(smem + C::kResultAt + token * C::kResultBytes + lane * 8);
      const float v[4] = {LowBf16(raw.x), HighBf16(raw.x), LowBf16(raw.y), HighBf16(raw.y)};
      float scale;
      const uint32_t codes = QuantiseGroup(v, scale);
      if (column >= a.rows_out) continue;
      StoreRoundedFour(codes, scale, a.activations + (tile.begin + token) * a.rows_out + FragmentPlace(column));
    }
  }

  // A pass's rows of the output, through shared memory so that a token's row is written in whole sectors.
  template <int kN>
  __device__ inline void StoreRows(const PackedExpertTile& tile, int item, int pass, int group, int t, int32_t pair,
                                   const float* total) {
    int32_t* token_pairs = reinterpret_cast<int32_t*>(smem + C::kTokenAt);
    const int lane = t % 32;
    Meet();  // the last results have been read
    if (threadIdx.x < C::kTokens) token_pairs[threadIdx.x] = pair;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t matrices[kN / 8];
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) matrices[j] = PackBf16(total[4 * j + 2 * half], total[4 * j + 2 * half + 1]);
      const int row = group * kExpertTileRows + t / 32 * 16 + half * 8;
      StoreColumns<kN>(matrices, smem + C::kResultAt + row * 2, C::kResultBytes, lane);
    }
    Meet();
    constexpr int kChunks = C::kGroups * kExpertTileRows / 8;  // of 16 bytes, a token
    const int64_t first = (static_cast<int64_t>(item) * C::kPasses + pass) * C::kGroups * kExpertTileRows;
    for (int i = threadIdx.x; i < tile.count * kChunks; i += C::kConsumerThreads) {
      const int token = i / kChunks, chunk = i % kChunks;
      const int64_t n = first + chunk * 8;
      if (n >= a.rows_out) continue;
      *reinterpret_cast<uint4*>(a.out + token_pairs[token] * a.rows_out + n) =
          *reinterpret_cast<const uint4*>(smem + C::kResultAt + token * C::kResultBytes + chunk * 16);
    }
  }
};

template <Half kHalf, ExpertPath kPath>
__device__ inline void Produce(const CUtensorMap& x_map, const GemmArgs& a, uint8_t* smem, Barrier* full,
                               Barrier* empty) {
  using C = Config<kHalf, kPath>;
  // Few tokens of an expert lie anywhere in x and are copied one by one; many have been gathered.
  constexpr bool kScattered = kHalf == Half::kGateUp && kPath == ExpertPath::kFew;
  const int lane = threadIdx.x % 32, total = *a.num_tiles * a.items;
  constexpr uint64_t kPolicy = kPath == ExpertPath::kFew ? sm90::kEvictFirst : sm90::kEvictNormal;
  RingPlace ring;
  for (int index = blockIdx.x; index < total; index += gridDim.x) {
    const PackedExpertTile tile = a.tiles[index / a.items];
    const int item = index % a.items;
    // The rows of x of this lane's tokens.
    constexpr int kPerLane = (C::kTokens + 31) / 32;
    int row[kPerLane];
    if constexpr (kScattered) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) row[i] = a.order[tile.begin + min(lane + 32 * i, tile.count - 1)] / a.top_k;
    }
    const int boxes = (tile.count + 7) / 8;
    const uint32_t bytes = C::kGroups * kExpertRecordBytes + (kScattered ? tile.count : boxes * 8) * kExpertBlockK * 2;
    for (int pass = 0; pass < C::kPasses; ++pass) {
      const uint8_t* record =
          a.weights + tile.expert * a.expert_bytes +
          (static_cast<int64_t>(item) * kExpertItemTiles + pass * C::kGroups) * a.blocks * kExpertRecordBytes;
      for (int b = 0; b < a.blocks; ++b, ring.template Next<C::kStages>()) {
        uint8_t* stage = smem + ring.stage * C::kStageBytes;
        Barrier* barrier = full + ring.stage;
        sm90::BarrierWait(empty + ring.stage, ring.parity ^ 1);
        if (lane == 0) sm90::BarrierExpect(barrier, bytes);
        __syncwarp();
        if (lane < C::kGroups) {
          sm90::BulkCopy(stage + C::kXBytes + lane * kExpertRecordBytes,
                         record + (static_cast<int64_t>(lane) * a.blocks + b) * kExpertRecordBytes, kExpertRecordBytes,
                         barrier, kPolicy);
        }
#pragma unroll
        for (int box = 0; box < 2; ++box) {
          uint8_t* x = stage + box * C::kXBoxBytes;
          const int k = b * kExpertBlockK + box * 64;
          if constexpr (kScattered) {
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) {
              const int token = lane + 32 * i;
              if (token < tile.count) {
                sm90::TensorCopy(x + token * 128, &x_map, k, row[i], barrier, sm90::kEvictLast);
              }
            }
          } else if (lane < boxes) {
            sm90::TensorCopy(x + lane * 8 * 128, &x_map, k, tile.begin + 8 * lane, barrier, sm90::kEvictLast);
          }
        }
      }
    }
  }
}

template <Half kHalf, ExpertPath kPath>
__global__ void __launch_bounds__(Config<kHalf, kPath>::kThreads, 1)
    ExpertKernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ GemmArgs a) {
  using C = Config<kHalf, kPath>;
  extern __shared__ uint8_t smem_raw[];
  uint8_t* smem = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(smem_raw) + 1023) & ~uintptr_t{1023});
  Barrier* full = reinterpret_cast<Barrier*>(smem + C::kBarrierAt);
  Barrier* empty = full + C::kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      sm90::BarrierInit(full + s, 1);
      sm90::BarrierInit(empty + s, C::kConsumerThreads / 32);
    }
    sm90::BarrierInitFence();
    sm90::PrefetchMap(&x_map);
  }
  if (threadIdx.x <= kMaxExponentDistance) {
    reinterpret_cast<uint4*>(smem + C::kTableAt)[threadIdx.x] = MagnitudeTable(threadIdx.x);
  }
  __syncthreads();
  sm90::WaitForPreviousKernel();

  // Uniform over a warp, and known to the compiler to be.
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= C::kConsumerThreads / 32) {
    sm90::LowerRegisters<C::kProducerRegisters>();
    if (warp == C::kConsumerThreads / 32) Produce<kHalf, kPath>(x_map, a, smem, full, empty);
    return;
  }
  sm90::RaiseRegisters<C::kConsumerRegisters>();
  Consumer<kHalf, kPath> consumer{a, smem, full, empty, {}};
  const int total = __shfl_sync(kFullWarp, *a.num_tiles * a.items, 0);
  for (int index = blockIdx.x; index < total; index += gridDim.x) {
    const PackedExpertTile tile = a.tiles[index / a.items];
    const int item = index % a.items;
    const int columns = __shfl_sync(kFullWarp, (tile.count + 7) / 8, 0);
    if constexpr (kPath == ExpertPath::kFew) {
      if (columns <= 1) {
        consumer.template Item<8>(tile, item);
      } else {
        consumer.template Item<16>(tile, item);
      }
    } else {
      if (columns <= 2) {
        consumer.template Item<16>(tile, item);
      } else if (columns <= 4) {
        consumer.template Item<32>(tile, item);
      } else if (columns <= 6) {
        consumer.template Item<48>(tile, item);
      } else if (columns <= 8) {
        consumer.template Item<64>(tile, item);
      } else if (columns <= 10) {
        consumer.template Item<80>(tile, item);
      } else if (columns <= 12) {
        consumer.template Item<96>(tile, item);
      } else if (columns <= 14) {
        consumer.template Item<112>(tile, item);
      } else {
        consumer.template Item<128>(tile, item);
      }
    }
  }
}

template <Half kHalf, ExpertPath kPath>
void Launch(const CUtensorMap& x_map, const GemmArgs& a, int64_t most_items, int multiprocessors, cudaStream_t stream) {
  using C = Config<kHalf, kPath>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(ExpertKernel<kHalf, kPath>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes);
  CUDA_CHECK(allowed);
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(most_items, multiprocessors));
  ExpertKernel<kHalf, kPath><<<ctas, C::kThreads, C::kSmemBytes, stream>>>(x_map, a);
  CUDA_CHECK(cudaGetLastError());
}

template <Half kHalf>
void LaunchPath(ExpertPath path, const CUtensorMap& x_map, const GemmArgs& a, int64_t pairs, int num_experts,
                int multiprocessors, cudaStream_t stream) {
  const int64_t most = MaxExpertTiles(pairs, num_experts, ExpertTileTokens(path)) * a.items;
  if (path == ExpertPath::kFew) return Launch<kHalf, ExpertPath::kFew>(x_map, a, most, multiprocessors, stream);
  Launch<kHalf, ExpertPath::kMany>(x_map, a, most, multiprocessors, stream);
}

}  // namespace

void ExpertGateUp(ExpertPath path, const ExpertWeights& w, RoundedRows x, int64_t rows, const float* weights, int top_k,
                  float limit, const ExpertWorkspace& workspace, int multiprocessors, cudaStream_t stream) {
  GemmArgs a;
  a.weights = w.gate_up;
  a.expert_bytes = PackedGateUpBytes(w.hidden, w.width);
  a.items = static_cast<int>(GateUpItems(w.width));
  a.blocks = static_cast<int>(ExpertBlocks(w.hidden));
  a.tiles = workspace.tiles;
  a.num_tiles = workspace.num_tiles;
  a.order = workspace.order;
  a.top_k = top_k;
  a.rows_out = w.width;
  a.pair_weights = weights;
  a.limit = limit;
  a.activations = workspace.activations;
  const CUtensorMap x_map =
      path == ExpertPath::kMany
          ? MakeTensorMap(TensorElement::kBf16, workspace.gathered, rows * top_k, w.hidden, w.hidden, 8)
          : MakeTensorMap(TensorElement::kBf16, x.data, rows, w.hidden, x.ld, 1);
  LaunchPath<Half::kGateUp>(path, x_map, a, rows * top_k, w.num_experts, multiprocessors, stream);
}

void ExpertDown(ExpertPath path, const ExpertWeights& w, int64_t pairs, const ExpertWorkspace& workspace,
                Bf16* expert_rows, int multiprocessors, cudaStream_t stream) {
  GemmArgs a;
  a.weights = w.down;
  a.expert_bytes = PackedDownBytes(w.hidden, w.width);
  a.items = static_cast<int>(DownItems(w.hidden));
  a.blocks = static_cast<int>(ExpertBlocks(w.width));
  a.tiles = workspace.tiles;
  a.num_tiles = workspace.num_tiles;
  a.order = workspace.order;
  a.rows_out = w.hidden;
  a.out = expert_rows;
  const CUtensorMap x_map = MakeTensorMap(TensorElement::kBf16, workspace.activations, pairs, w.width, w.width, 8);
  LaunchPath<Half::kDown>(path, x_map, a, pairs, w.num_experts, multiprocessors, stream);
}

}  // namespace millrace::cuda
