// SPDX-License-Identifier: Apache-2.0
// Packs an expert's weights at load: the same codes and scales in the order of packed_experts_plan.h's records. Not on
// any step's path.
//
// A thread of a warpgroup needs of each 32 of K four registers of four codes (sm90.cuh's left operand): rows g and g +
// 8, k 4c .. 4c + 3 and 16 further. A packed word holds the eight codes of one row: magnitudes of the first four in
// nibbles 0 to 3, of the four 16 further in nibbles 4 to 7, three bits each, which is what a byte permutation takes as
// selectors; the nibbles' top bits are the signs, of the first four at bits 7, 15, 23, 31, where they belong in a word
// of E4M3, of the others four bits lower.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_packed_experts.h"
#include "engine/ops/packed_experts_plan.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 128;

// Where the rows of packed tiles come from.
struct Source {
  const uint8_t *even = nullptr, *odd = nullptr;  // rows 0-7 and 8-15 of each 16: gate and up, or the same matrix
  const uint8_t *even_scales = nullptr, *odd_scales = nullptr;
  bool interleaved = false;
  int64_t rows = 0, k = 0;
};

struct SourceRow {
  const uint8_t *codes, *scales;  // null: padding
};

__device__ inline SourceRow RowAt(const Source& s, int64_t tile, int row) {
  const bool odd = (row & 8) != 0;
  // Interleaved: a tile has 32 rows of each matrix, eight a warp.
  const int64_t at = s.interleaved ? tile * 32 + row / 16 * 8 + row % 8 : tile * kExpertTileRows + row;
  if (at >= s.rows) return {nullptr, nullptr};
  return {(odd ? s.odd : s.even) + at * (s.k / 2), (odd ? s.odd_scales : s.even_scales) + at * (s.k / 32)};
}

// Four codes from an even k, lowest nibble first.
__device__ inline uint32_t FourCodes(const SourceRow& r, int64_t k, int64_t row_k) {
  if (r.codes == nullptr || k >= row_k) return 0;
  return *reinterpret_cast<const uint16_t*>(r.codes + k / 2);
}

__device__ inline uint32_t PackEight(uint32_t first, uint32_t second) {
  uint32_t word = (first & 0x7777u) | (second & 0x7777u) << 16;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    word |= (first >> (4 * j + 3) & 1u) << (8 * j + 7);
    word |= (second >> (4 * j + 3) & 1u) << (8 * j + 3);
  }
  return word;
}

// One record a CTA: block of K, tile.
__global__ void __launch_bounds__(kThreads) PackKernel(Source s, uint8_t* out, int32_t* out_of_range) {
  const int64_t block = blockIdx.x, tile = blockIdx.y, k0 = block * kExpertBlockK;
  uint8_t* record = out + (tile * gridDim.x + block) * kExpertRecordBytes;
  const int t = threadIdx.x, g = t / 32 * 16 + t % 32 / 4, c = t % 4;
  const SourceRow rows[2] = {RowAt(s, tile, g), RowAt(s, tile, g + 8)};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t k = k0 + 32 * step + 4 * c;
      const uint32_t word = PackEight(FourCodes(rows[h], k, s.k), FourCodes(rows[h], k + 16, s.k));
      // Two chunks of 16 bytes a thread, so that a warp reads 512 bytes at once.
      *reinterpret_cast<uint32_t*>(record + step / 2 * 2048 + t * 16 + (step % 2 * 2 + h) * 4) = word;
    }
  }
  if (t >= kExpertTileRows) return;
  const SourceRow row = RowAt(s, tile, t);
  int exponent[4], largest = -1;
  for (int group = 0; group < 4; ++group) {
    exponent[group] = -1;  // all zeros: any scale will do
    const int64_t k = k0 + 32 * group;
    if (row.codes == nullptr || k >= s.k) continue;
    uint32_t any = 0;
    for (int i = 0; i < 16; i += 2) any |= *reinterpret_cast<const uint16_t*>(row.codes + k / 2 + i);
    if ((any & 0x7777u) == 0) continue;
    exponent[group] = row.scales[k / 32];
    largest = max(largest, exponent[group]);
  }
  uint32_t word = static_cast<uint32_t>(max(largest, 0)) << 24;
  for (int group = 0; group < 4; ++group) {
    int distance = exponent[group] < 0 ? 0 : largest - exponent[group];
    if (distance > kMaxExponentDistance) {
      if (out_of_range != nullptr) atomicAdd(out_of_range, 1);
      distance = kMaxExponentDistance;
    }
    word |= static_cast<uint32_t>(distance) << (4 * group);
  }
  *reinterpret_cast<uint32_t*>(record + kExpertCodeBytes + t * 4) = word;
}

void Pack(const Source& s, int64_t items, uint8_t* out, int32_t* out_of_range, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ExpertBlocks(s.k)), static_cast<unsigned>(items * kExpertItemTiles));
  PackKernel<<<grid, kThreads, 0, stream>>>(s, out, out_of_range);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void PackExpert(const RawExpert& raw, int64_t hidden, int64_t width, uint8_t* gate_up, uint8_t* down,
                int32_t* out_of_range, cudaStream_t stream) {
  Pack({raw.w1, raw.w3, raw.w1_scales, raw.w3_scales, true, width, hidden}, GateUpItems(width), gate_up, out_of_range,
       stream);
  Pack({raw.w2, raw.w2, raw.w2_scales, raw.w2_scales, false, hidden, width}, DownItems(hidden), down, out_of_range,
       stream);
}

}  // namespace millrace::cuda
