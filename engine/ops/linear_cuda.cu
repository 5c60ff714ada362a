// SPDX-License-Identifier: Apache-2.0
// Linears of the dense part: cuda_linear.h over the plain products of cuda_product.cuh, and activation quantisation.
//
// Bound: for few rows the weight's bytes over memory bandwidth, for many the FP32 pipe; tensor cores are not used here.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_product.cuh"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

// One warp per group of 128: four values a lane.
__global__ void QuantiseKernel(const Bf16* x, int64_t ld, int64_t k, int groups, int64_t total_groups, uint8_t* codes,
                               float* scales) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (warp >= total_groups) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = warp / groups, group = warp % groups, at = group * 128 + lane * 4;
  const bool inside = at < k;
  float v[4] = {};
  if (inside) {
    const uint2 raw = *reinterpret_cast<const uint2*>(x + row * ld + at);
    v[0] = LowBf16(raw.x);
    v[1] = HighBf16(raw.x);
    v[2] = LowBf16(raw.y);
    v[3] = HighBf16(raw.y);
  }
  // Of the bits, not the values: a NaN must win so that the scale shows it.
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) amax = max(amax, __float_as_uint(v[i]) & 0x7fffffffu);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) amax = max(amax, __shfl_xor_sync(kFullWarp, amax, offset));
  const int exponent = ActQuantScale(__uint_as_float(amax));
  const float inverse = PowerOfTwo(-exponent);
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed |= static_cast<uint32_t>(EncodeE4m3(v[i] * inverse)) << (8 * i);
  if (inside) *reinterpret_cast<uint32_t*>(codes + row * k + at) = packed;
  if (lane == 0) scales[row * groups + group] = PowerOfTwo(exponent);
}

// `groups` products lie side by side in x and out, one below the other in the weight.
struct GroupStride {
  int64_t x = 0, w = 0, out = 0;
};

__device__ inline void StoreTo(const LinearOut& out, int64_t row, int64_t n, float value) {
  if (out.bf16 != nullptr) {
    out.bf16[row * out.ld + n] = ToBf16(value);
  } else {
    out.f32[row * out.ld + n] = value;
  }
}

template <WeightKind kKind>
__device__ inline void SelectGroup(const GroupStride& stride, Weight& w, ActivationView& x, LinearOut& out) {
  const int64_t group = blockIdx.z;
  w.data = static_cast<const uint8_t*>(w.data) + ElementBytes<kKind>(group, stride.w, 0);
  x.bf16 += group * stride.x;
  if (out.bf16 != nullptr) out.bf16 += group * stride.out;
  if (out.f32 != nullptr) out.f32 += group * stride.out;
}

template <WeightKind kKind, int kRows>
__global__ void __launch_bounds__(kSkinnyThreads)
    SkinnyKernel(Weight w, ActivationView x, int64_t rows, LinearOut out, SkinnyShape shape, GroupStride stride) {
  extern __shared__ __align__(16) uint8_t smem[];
  if constexpr (kKind == WeightKind::kBf16) SelectGroup<kKind>(stride, w, x, out);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRows;
  Skinny<kKind, kRows>(
      w, x, shape, static_cast<int>(min(static_cast<int64_t>(kRows), rows - first)),
      static_cast<int64_t>(blockIdx.x) * shape.outputs, smem, [first](int r) { return first + r; },
      [&](int r, int64_t n, float value) { StoreTo(out, first + r, n, value); });
}

template <WeightKind kKind>
__global__ void __launch_bounds__(kTileThreads)
    TileKernel(Weight w, ActivationView x, int64_t rows, LinearOut out, GroupStride stride) {
  __shared__ TileSmem smem;
  if constexpr (kKind == WeightKind::kBf16) SelectGroup<kKind>(stride, w, x, out);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTileRows;
  Tile<kKind>(
      w, x, static_cast<int>(min(static_cast<int64_t>(kTileRows), rows - first)),
      static_cast<int64_t>(blockIdx.x) * kTileOutputs, smem, [first](int r) { return first + r; },
      [&](int r, int64_t n, float value) { StoreTo(out, first + r, n, value); });
}

template <WeightKind kKind, int kRows>
void LaunchSkinny(const Weight& w, const ActivationView& x, int64_t rows, const LinearOut& out, int groups,
                  GroupStride stride, cudaStream_t stream) {
  const SkinnyShape shape = ChooseSkinny(Block<kKind>::kK, w.n, w.k, kRows);
  // Once per instance of the template: more than 48 KiB must be asked for.
  static const cudaError_t allowed =
      cudaFuncSetAttribute(SkinnyKernel<kKind, kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSmemBytes);
  CUDA_CHECK(allowed);
  CHECK(shape.smem_bytes <= kMaxSmemBytes, "a product of this K and so many rows was not checked at load");
  const dim3 grid(static_cast<unsigned>((w.n + shape.outputs - 1) / shape.outputs),
                  static_cast<unsigned>((rows + kRows - 1) / kRows), static_cast<unsigned>(groups));
  SkinnyKernel<kKind, kRows><<<grid, kSkinnyThreads, shape.smem_bytes, stream>>>(w, x, rows, out, shape, stride);
  CUDA_CHECK(cudaGetLastError());
}

template <WeightKind kKind>
void Launch(const Weight& w, const ActivationView& x, int64_t rows, const LinearOut& out, int groups,
            GroupStride stride, cudaStream_t stream) {
  if (rows == 0) return;
  switch (ChooseProduct(Block<kKind>::kK, w.n, w.k, rows)) {
    case ProductShape::kSkinny1:
      return LaunchSkinny<kKind, 1>(w, x, rows, out, groups, stride, stream);
    case ProductShape::kSkinny4:
      return LaunchSkinny<kKind, kSkinnyRows>(w, x, rows, out, groups, stride, stream);
    case ProductShape::kTile:
      break;
  }
  const dim3 grid(static_cast<unsigned>((w.n + kTileOutputs - 1) / kTileOutputs),
                  static_cast<unsigned>((rows + kTileRows - 1) / kTileRows), static_cast<unsigned>(groups));
  TileKernel<kKind><<<grid, kTileThreads, 0, stream>>>(w, x, rows, out, stride);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void QuantiseRows(Bf16Rows x, int64_t rows, int64_t k, uint8_t* codes, float* scales, cudaStream_t stream) {
  if (rows == 0) return;
  const int groups = static_cast<int>((k + 127) / 128);
  const int64_t warps = rows * groups;
  QuantiseKernel<<<static_cast<unsigned>((warps + 7) / 8), 256, 0, stream>>>(x.data, x.ld, k, groups, warps, codes,
                                                                             scales);
  CUDA_CHECK(cudaGetLastError());
}

void LinearFp8(const Weight& w, Fp8Rows x, int64_t rows, LinearOut out, cudaStream_t stream) {
  CHECK(w.kind == WeightKind::kFp8, "LinearFp8 takes FP8 weights");
  const ActivationView view{.codes = x.codes, .scales = x.scales, .ld = x.ld, .scales_ld = x.scales_ld};
  Launch<WeightKind::kFp8>(w, view, rows, out, 1, {}, stream);
}

void LinearBf16(const Weight& w, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream) {
  const ActivationView view{.bf16 = x.data, .ld = x.ld};
  if (w.kind == WeightKind::kF32) return Launch<WeightKind::kF32>(w, view, rows, out, 1, {}, stream);
  CHECK(w.kind == WeightKind::kBf16, "LinearBf16 takes BF16 and F32 weights");
  Launch<WeightKind::kBf16>(w, view, rows, out, 1, {}, stream);
}

void LinearGrouped(const Weight& w, int groups, Bf16Rows x, int64_t rows, LinearOut out, cudaStream_t stream) {
  CHECK(w.kind == WeightKind::kBf16, "LinearGrouped takes BF16 weights");
  const ActivationView view{.bf16 = x.data, .ld = x.ld};
  Launch<WeightKind::kBf16>(w, view, rows, out, groups, {w.k, w.n * w.k, w.n}, stream);
}

}  // namespace millrace::cuda
