// SPDX-License-Identifier: Apache-2.0
// The plain product of a few rows or a tile of rows with a weight, in the CPU's order of summation.
//
// A block of K (128 for FP8 weights, 32 for the others) is summed by one thread in ascending k with fused
// multiply-adds, multiplied by its scales (powers of two: exact) and added to the total in ascending order. So both
// shapes below give one row the same bits, which are also the CPU's. Two shapes: Skinny spreads the blocks of one
// output over lanes and adds their sums up afterwards, for up to kSkinnyRows rows; Tile gives each thread a few
// outputs, for more. They are right, coalesced and not fast: tensor cores are elsewhere. Included by linear_cuda.cu and
// moe_experts_cuda.cu.
#pragma once

#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_linear.h"

namespace millrace::cuda {

template <WeightKind kKind>
struct Block {
  static constexpr int kK = kKind == WeightKind::kFp8 ? 128 : 32;
};

// Elements of one 16-byte load.
template <WeightKind kKind>
constexpr int kPerLoad = kKind == WeightKind::kF32    ? 4
                         : kKind == WeightKind::kBf16 ? 8
                         : kKind == WeightKind::kFp8  ? 16
                                                      : 32;

template <WeightKind kKind>
__device__ inline void WidenLoad(uint4 raw, float* out) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kKind == WeightKind::kF32) {
      out[i] = __uint_as_float(words[i]);
    } else if constexpr (kKind == WeightKind::kBf16) {
      out[2 * i] = LowBf16(words[i]);
      out[2 * i + 1] = HighBf16(words[i]);
    } else if constexpr (kKind == WeightKind::kFp8) {
      WidenE4m3(words[i], out + 4 * i);
    } else {
      WidenE2m1(words[i], out + 8 * i);
    }
  }
}

// Byte offset of element `k` of row `row`.
template <WeightKind kKind>
__device__ inline int64_t ElementBytes(int64_t row, int64_t row_length, int64_t k) {
  const int64_t at = row * row_length + k;
  return kKind == WeightKind::kF32    ? at * 4
         : kKind == WeightKind::kBf16 ? at * 2
         : kKind == WeightKind::kFp8  ? at
                                      : at / 2;
}

// What the sum of block `b` of output `n` is multiplied by on the weight's side.
template <WeightKind kKind>
__device__ inline float WeightScale(const uint8_t* scales, int64_t k, int64_t n, int64_t b) {
  if constexpr (kKind == WeightKind::kFp8) return DecodeE8m0(scales[n / 128 * ((k + 127) / 128) + b]);
  if constexpr (kKind == WeightKind::kFp4) return DecodeE8m0(scales[n * (k / 32) + b]) * kE2m1Widened;
  return 1.0f;
}

// The activations a product reads: BF16 rows, or E4M3 codes with a scale per 128.
struct ActivationView {
  const Bf16* bf16 = nullptr;
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  int64_t ld = 0, scales_ld = 0;
};

__device__ inline float ActivationScale(const ActivationView& x, int64_t row, int64_t k) {
  return x.scales == nullptr ? 1.0f : x.scales[row * x.scales_ld + k / 128];
}

// Eight activations of a row as BF16 pairs, both sources exact.
__device__ inline uint4 LoadEight(const ActivationView& x, int64_t row, int64_t k) {
  if (x.codes == nullptr) return *reinterpret_cast<const uint4*>(x.bf16 + row * x.ld + k);
  const uint2 raw = *reinterpret_cast<const uint2*>(x.codes + row * x.ld + k);
  float v[8];
  WidenE4m3(raw.x, v);
  WidenE4m3(raw.y, v + 4);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = __float_as_uint(v[2 * i]) >> 16 | (__float_as_uint(v[2 * i + 1]) & 0xffff0000u);
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

constexpr int kSkinnyRows = 4;
constexpr int kSkinnyThreads = 256;

// How one CTA of Skinny cuts an output: lanes that share it, and so outputs per CTA.
struct SkinnyShape {
  int lanes = 32;   // threads per output, a power of two up to kSkinnyThreads
  int outputs = 8;  // kSkinnyThreads / lanes
  int blocks = 0;   // blocks of K
  int64_t smem_bytes = 0;
};

// One thread per block of K as far as that goes: more lanes per output where there are few outputs, as in mHC's 24.
inline __host__ __device__ SkinnyShape ChooseSkinny(int block_k, int64_t n, int64_t k, int rows) {
  SkinnyShape s;
  s.blocks = static_cast<int>((k + block_k - 1) / block_k);
  const int most = n <= 64 ? kSkinnyThreads : 32;
  s.lanes = 1;
  while (s.lanes < s.blocks && s.lanes < most) s.lanes *= 2;
  s.outputs = kSkinnyThreads / s.lanes;
  s.smem_bytes =
      static_cast<int64_t>(rows) * s.blocks * (block_k + 8) * 2 + static_cast<int64_t>(rows) * s.outputs * s.blocks * 4;
  return s;
}

// What one CTA may ask of shared memory on this generation.
constexpr int64_t kMaxSmemBytes = 227 << 10;

// Which shape a product of `rows` rows takes. Both give the same bits; this is about time and shared memory only: Tile
// reads the weight once for 64 rows but has one block for 64 outputs, too few to fill the card while rows are few, and
// always where outputs are (mHC).
constexpr int64_t kMostSkinnyRows = 32, kFewOutputs = 64;
enum class ProductShape { kSkinny1, kSkinny4, kTile };
inline ProductShape ChooseProduct(int block_k, int64_t n, int64_t k, int64_t rows) {
  if (rows == 1 && ChooseSkinny(block_k, n, k, 1).smem_bytes <= kMaxSmemBytes) return ProductShape::kSkinny1;
  if ((rows <= kMostSkinnyRows || n <= kFewOutputs) &&
      ChooseSkinny(block_k, n, k, kSkinnyRows).smem_bytes <= kMaxSmemBytes) {
    return ProductShape::kSkinny4;
  }
  return ProductShape::kTile;
}

// Outputs [n_begin, n_begin + shape.outputs) of `row_count` <= kRows rows. `row_of(r)` names the row of x, `store(r, n,
// value)` takes each output once. All threads of the CTA call it.
template <WeightKind kKind, int kRows, typename RowOf, typename Store>
__device__ inline void Skinny(const Weight& w, const ActivationView& x, const SkinnyShape& shape, int row_count,
                              int64_t n_begin, uint8_t* smem, RowOf row_of, Store store) {
  constexpr int kBlockK = Block<kKind>::kK;
  // A pad of 16 bytes a block: lanes read neighbouring blocks, which would otherwise start in one bank.
  constexpr int kStride = kBlockK + 8;
  Bf16* xs = reinterpret_cast<Bf16*>(smem);  // [kRows][blocks][kStride]
  float* sums = reinterpret_cast<float*>(smem + static_cast<int64_t>(kRows) * shape.blocks * kStride * 2);
  const int64_t row_elements = static_cast<int64_t>(shape.blocks) * kStride;
  for (int r = 0; r < row_count; ++r) {
    const int64_t row = row_of(r);
    for (int64_t k = threadIdx.x * 8; k < w.k; k += kSkinnyThreads * 8) {
      *reinterpret_cast<uint4*>(xs + r * row_elements + k / kBlockK * kStride + k % kBlockK) = LoadEight(x, row, k);
    }
  }
  __syncthreads();

  const int lane = threadIdx.x % shape.lanes, output = threadIdx.x / shape.lanes;
  const int64_t n = n_begin + output;
  if (n < w.n) {
    for (int b = lane; b < shape.blocks; b += shape.lanes) {
      const int64_t k0 = static_cast<int64_t>(b) * kBlockK;
      const int len = static_cast<int>(min(static_cast<int64_t>(kBlockK), w.k - k0));
      const uint4* data =
          reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(w.data) + ElementBytes<kKind>(n, w.k, k0));
      float sum[kRows] = {};
#pragma unroll
      for (int i = 0; i < kBlockK / kPerLoad<kKind>; ++i) {
        if (i * kPerLoad<kKind> >= len) break;
        float weight[kPerLoad<kKind>];
        WidenLoad<kKind>(__ldg(data + i), weight);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint32_t* pairs = reinterpret_cast<const uint32_t*>(
              xs + r * row_elements + static_cast<int64_t>(b) * kStride + i * kPerLoad<kKind>);
#pragma unroll
          for (int j = 0; j < kPerLoad<kKind> / 2; ++j) {
            sum[r] = fmaf(LowBf16(pairs[j]), weight[2 * j], sum[r]);
            sum[r] = fmaf(HighBf16(pairs[j]), weight[2 * j + 1], sum[r]);
          }
        }
      }
      const float weight_scale = WeightScale<kKind>(w.scales, w.k, n, b);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float scale = r < row_count ? ActivationScale(x, row_of(r), k0) * weight_scale : 0.0f;
        sums[(r * shape.outputs + output) * shape.blocks + b] = sum[r] * scale;
      }
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < row_count * shape.outputs; i += kSkinnyThreads) {
    const int r = i / shape.outputs, o = i % shape.outputs;
    if (n_begin + o >= w.n) continue;
    float total = 0;
    for (int b = 0; b < shape.blocks; ++b) total += sums[i * shape.blocks + b];
    store(r, n_begin + o, total);
  }
}

constexpr int kTileRows = 64, kTileOutputs = 64, kTileThreads = 256, kTileK = 32;
// A stride of 65 words: eight consecutive k of a thread fall in other banks than its neighbours'.
constexpr int kTileStride = 65;

struct TileSmem {
  float x[kTileK][kTileStride];
  float w[kTileK][kTileStride];
};

// Outputs [n_begin, n_begin + 64) of `row_count` <= 64 rows; as Skinny otherwise.
template <WeightKind kKind, typename RowOf, typename Store>
__device__ inline void Tile(const Weight& w, const ActivationView& x, int row_count, int64_t n_begin, TileSmem& smem,
                            RowOf row_of, Store store) {
  constexpr int kChunks = Block<kKind>::kK / kTileK;       // per block
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;  // outputs tx + 16 j, rows ty + 16 i
  const int load_row = threadIdx.x / 4, load_k = threadIdx.x % 4 * 8;
  const int64_t load_x_row = load_row < row_count ? row_of(load_row) : 0;
  float total[4][4] = {}, sum[4][4] = {};
  for (int64_t k0 = 0; k0 < w.k; k0 += kTileK) {
    uint4 x_raw = {}, w_raw[2] = {};
    const int64_t k = k0 + load_k;
    if (k < w.k) {
      if (load_row < row_count) x_raw = LoadEight(x, load_x_row, k);
      if (n_begin + load_row < w.n) {
        const uint8_t* at = static_cast<const uint8_t*>(w.data) + ElementBytes<kKind>(n_begin + load_row, w.k, k);
        if constexpr (kKind == WeightKind::kF32) {
          w_raw[0] = __ldg(reinterpret_cast<const uint4*>(at));
          w_raw[1] = __ldg(reinterpret_cast<const uint4*>(at) + 1);
        } else if constexpr (kKind == WeightKind::kBf16) {
          w_raw[0] = __ldg(reinterpret_cast<const uint4*>(at));
        } else if constexpr (kKind == WeightKind::kFp8) {
          const uint2 half = __ldg(reinterpret_cast<const uint2*>(at));
          w_raw[0] = {half.x, half.y, 0, 0};
        } else {
          w_raw[0] = {__ldg(reinterpret_cast<const uint32_t*>(at)), 0, 0, 0};
        }
      }
    }
    __syncthreads();  // the last chunk has been read
    float wide[kKind == WeightKind::kFp4 ? 32 : kKind == WeightKind::kFp8 ? 16 : 8];
    WidenLoad<kKind>(w_raw[0], wide);
    if constexpr (kKind == WeightKind::kF32) WidenLoad<kKind>(w_raw[1], wide + 4);
    const uint32_t pairs[4] = {x_raw.x, x_raw.y, x_raw.z, x_raw.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      smem.w[load_k + i][load_row] = wide[i];
      smem.x[load_k + i][load_row] = i % 2 == 0 ? LowBf16(pairs[i / 2]) : HighBf16(pairs[i / 2]);
    }
    __syncthreads();
#pragma unroll 8
    for (int kk = 0; kk < kTileK; ++kk) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = smem.x[kk][ty + 16 * i];
        b[i] = smem.w[kk][tx + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
      }
    }
    // Zeros beyond the end of K change nothing, so a short last block closes like any other.
    if ((k0 / kTileK + 1) % kChunks != 0 && k0 + kTileK < w.k) continue;
    const int64_t block = k0 / Block<kKind>::kK;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = ty + 16 * i;
      const float activation_scale = r < row_count ? ActivationScale(x, row_of(r), k0) : 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t n = n_begin + tx + 16 * j;
        const float scale = n < w.n ? activation_scale * WeightScale<kKind>(w.scales, w.k, n, block) : 0.0f;
        total[i][j] += sum[i][j] * scale;
        sum[i][j] = 0;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = ty + 16 * i;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = n_begin + tx + 16 * j;
      if (r < row_count && n < w.n) store(r, n, total[i][j]);
    }
  }
}

}  // namespace millrace::cuda
