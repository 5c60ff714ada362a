// SPDX-License-Identifier: Apache-2.0
// See matmul_amx.h. For several rows, a block of a panel's weights is widened once into tiles of 32 inputs by 16
// outputs (pairs of inputs side by side, as the instruction wants them); 16 rows at a time run over them, and each
// block's sums are scaled and added to the totals as everywhere else. One row alone does the same sums on vectors,
// where filling tiles would not pay.
#include "engine/ops/matmul_amx.h"

#include <bit>

#include "engine/status.h"

#ifdef MILLRACE_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace millrace {
namespace {

using amx::CompilerBarrier;
using amx::ReleaseTiles;
using amx::Tile;
using amx::kTileK;
using amx::kTileN;
using amx::kTileRows;

constexpr int kTiles = PackedLinear::kPanel / kTileN;

constexpr int BlockK(WeightKind kind) { return kind == WeightKind::kFp8 ? 128 : 32; }

// F32 values of two inputs' weights, each exact in BF16, as pairs.
MILLRACE_AMX inline __m512i Pair(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_or_si512(low,
                         _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The code's exponent field becomes F32's own, 2^120 too small; the multiplication also makes its subnormals normal.
MILLRACE_AMX inline __m512 WidenFp8(const uint8_t* codes) {
  const __m512i raw = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(raw, 20), _mm512_set1_epi32(static_cast<int>(0x87f00000u)));
  return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
}

// `codes` holds the nibbles of outputs `lane` and up; the table's index takes no more than its low four bits.
MILLRACE_AMX inline __m512 WidenFp4(const uint8_t* codes, bool high) {
  const __m512 table = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  __m512i raw = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  if (high) raw = _mm512_srli_epi32(raw, 4);
  return _mm512_permutexvar_ps(raw, table);
}

// Weights of inputs k0 .. k0 + 31, outputs lane .. lane + 15 of a panel.
MILLRACE_AMX void FillTile(WeightKind kind, const uint8_t* panel, int width, int64_t k0, int lane, Tile& tile) {
  for (int p = 0; p < kTileK / 2; ++p) {
    const int64_t k = k0 + 2 * p;
    __m512i pairs;
    if (kind == WeightKind::kFp8) {
      const uint8_t* at = panel + k * width + lane;
      pairs = Pair(WidenFp8(at), WidenFp8(at + width));
    } else if (kind == WeightKind::kFp4) {
      const uint8_t* at = panel + k * 32 + lane % 32;
      pairs = Pair(WidenFp4(at, lane >= 32), WidenFp4(at + 32, lane >= 32));
    } else {
      const uint16_t* at = reinterpret_cast<const uint16_t*>(panel) + k * width + lane;
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + width)));
      pairs = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    _mm512_store_si512(tile.words[p], pairs);
  }
}

MILLRACE_AMX void ConfigureTiles(int rows) {
  const auto r = static_cast<uint8_t>(rows);
  amx::ConfigureTiles(amx::TileConfig({r, r, r, r, r, 16, 16, 16}));  // sums, inputs, weights
}

// sums [rows][64] of one block: `steps` times 32 inputs. x points at the block's first input of the first row.
MILLRACE_AMX void BlockSums(const uint16_t* x, int64_t k, const Tile (*tiles)[kTiles], int steps, float* sums) {
  const int64_t row_bytes = k * 2;
  CompilerBarrier();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int s = 0; s < steps; ++s) {
    _tile_loadd(4, x + s * kTileK, row_bytes);
    _tile_loadd(5, &tiles[s][0], 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, &tiles[s][1], 64);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(5, &tiles[s][2], 64);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(5, &tiles[s][3], 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  constexpr int kStride = PackedLinear::kPanel * 4;
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kTileN, kStride);
  _tile_stored(2, sums + 2 * kTileN, kStride);
  _tile_stored(3, sums + 3 * kTileN, kStride);
}

// totals [rows][64] += sums * the block's scales.
MILLRACE_AMX void AddBlock(const PackedLinear& w, const float* panel_scales, int64_t k0, const Bf16Rows& x, int64_t row,
                           int rows, const float* sums, float* totals) {
  const int64_t block = k0 / BlockK(w.kind());
  for (int r = 0; r < rows; ++r) {
    float scale = x.scales == nullptr ? 1.0f : x.scales[(row + r) * x.scales_ld + k0 / 128];
    if (w.kind() == WeightKind::kFp8) scale *= panel_scales[block];
    for (int lane = 0; lane < PackedLinear::kPanel; lane += kTileN) {
      __m512 factor = _mm512_set1_ps(scale);
      if (w.kind() == WeightKind::kFp4) {
        factor = _mm512_mul_ps(factor, _mm512_loadu_ps(panel_scales + block * PackedLinear::kPanel + lane));
      }
      float* at = totals + r * PackedLinear::kPanel + lane;
      const __m512 sum = _mm512_loadu_ps(sums + r * PackedLinear::kPanel + lane);
      _mm512_storeu_ps(at, _mm512_fmadd_ps(sum, factor, _mm512_loadu_ps(at)));
    }
  }
}

// Weights of input `k`, outputs `lane` and up, as F32.
template <WeightKind kKind>
MILLRACE_AMX inline __m512 Widen(const uint8_t* panel, int width, int64_t k, int lane) {
  if constexpr (kKind == WeightKind::kFp8) return WidenFp8(panel + k * width + lane);
  if constexpr (kKind == WeightKind::kFp4) return WidenFp4(panel + k * 32 + lane % 32, lane >= 32);
  const uint16_t* at = reinterpret_cast<const uint16_t*>(panel) + k * width + lane;
  const __m512i raw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
}

MILLRACE_AMX inline __m512 WidenInput(uint16_t bits) {
  return _mm512_set1_ps(std::bit_cast<float>(static_cast<uint32_t>(bits) << 16));
}

// What the tile instruction does, for one row and without a tile to fill: of 32 inputs the even ones and the odd ones
// are summed apart, in order, by fused multiply-adds; then both are added, and that to the block's sum. Tiny values
// count as zero there, so they must here.
template <WeightKind kKind>
MILLRACE_AMX void OneRow(const PackedLinear& w, int64_t panel, const Bf16Rows& x, float* lanes) {
  const unsigned saved = _mm_getcsr();
  if constexpr (kKind == WeightKind::kBf16) _mm_setcsr(saved | 0x8040);  // flush results, take operands as zero
  const uint8_t* data = w.panel_data(panel);
  const float* scales = w.panel_scales(panel);
  const int width = w.panel_width(panel);
  const int64_t row_bytes = kKind == WeightKind::kBf16 ? width * 2 : kKind == WeightKind::kFp8 ? width : width / 2;
  constexpr int64_t kAhead = 2048;
  const auto product = [&]<int kVectors>(int lane) MILLRACE_AMX {
    __m512 total[kVectors];
    for (int v = 0; v < kVectors; ++v) total[v] = _mm512_setzero_ps();
    for (int64_t k0 = 0; k0 < w.k(); k0 += BlockK(kKind)) {
      __m512 sum[kVectors];
      for (int v = 0; v < kVectors; ++v) sum[v] = _mm512_setzero_ps();
      const int64_t end = std::min<int64_t>(w.k(), k0 + BlockK(kKind));
      for (int64_t s = k0; s < end; s += kTileK) {
        __m512 even[kVectors], odd[kVectors];
        for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = _mm512_setzero_ps();
        for (int64_t k = s; k < s + kTileK; k += 2) {
          const uint8_t* ahead = data + k * row_bytes + kAhead;
          for (int64_t line = 0; line < 2 * row_bytes; line += 64) __builtin_prefetch(ahead + line);
          const __m512 x0 = WidenInput(x.values[k]), x1 = WidenInput(x.values[k + 1]);
          for (int v = 0; v < kVectors; ++v) {
            even[v] = _mm512_fmadd_ps(x0, Widen<kKind>(data, width, k, lane + v * kTileN), even[v]);
            odd[v] = _mm512_fmadd_ps(x1, Widen<kKind>(data, width, k + 1, lane + v * kTileN), odd[v]);
          }
        }
        for (int v = 0; v < kVectors; ++v) sum[v] = _mm512_add_ps(sum[v], _mm512_add_ps(even[v], odd[v]));
      }
      float scale = x.scales == nullptr ? 1.0f : x.scales[k0 / 128];
      if constexpr (kKind == WeightKind::kFp8) scale *= scales[k0 / 128];
      for (int v = 0; v < kVectors; ++v) {
        __m512 factor = _mm512_set1_ps(scale);
        if constexpr (kKind == WeightKind::kFp4) {
          const float* at = scales + k0 / 32 * PackedLinear::kPanel + lane + v * kTileN;
          factor = _mm512_mul_ps(factor, _mm512_loadu_ps(at));
        }
        total[v] = _mm512_fmadd_ps(sum[v], factor, total[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(lanes + lane + v * kTileN, total[v]);
  };
  if (width == PackedLinear::kPanel) {
    product.template operator()<kTiles>(0);
  } else {
    for (int lane = 0; lane < width; lane += kTileN) product.template operator()<1>(lane);
  }
  _mm_setcsr(saved);
}

bool AskForAmx() {
  uint32_t a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM; threads made later inherit it
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool AmxAvailable() {
  static const bool available = AskForAmx();
  return available;
}

void AmxPanelProduct(const PackedLinear& w, int64_t panel, const Bf16Rows& x, int64_t m, float* out, int64_t out_ld) {
  const int64_t first = panel * PackedLinear::kPanel;
  const int64_t used = std::min<int64_t>(PackedLinear::kPanel, w.n() - first);
  if (m == 1) {
    alignas(64) float lanes[PackedLinear::kPanel];
    switch (w.kind()) {
      case WeightKind::kBf16:
        OneRow<WeightKind::kBf16>(w, panel, x, lanes);
        break;
      case WeightKind::kFp8:
        OneRow<WeightKind::kFp8>(w, panel, x, lanes);
        break;
      case WeightKind::kFp4:
        OneRow<WeightKind::kFp4>(w, panel, x, lanes);
        break;
      case WeightKind::kF32:
        CHECK(false, "F32 weights do not go into tiles");
    }
    std::copy_n(lanes, used, out + first);
    return;
  }
  constexpr int kMaxSteps = 128 / kTileK;
  alignas(64) Tile tiles[kMaxSteps][kTiles];
  alignas(64) float sums[kTileRows * PackedLinear::kPanel];
  thread_local std::vector<float> totals;
  totals.assign(m * PackedLinear::kPanel, 0.0f);

  const uint8_t* data = w.panel_data(panel);
  const float* scales = w.panel_scales(panel);
  const int width = w.panel_width(panel);
  const int64_t row_bytes = w.kind() == WeightKind::kBf16  ? width * 2
                            : w.kind() == WeightKind::kFp8 ? width
                                                           : width / 2;
  if (width < PackedLinear::kPanel) std::memset(tiles, 0, sizeof(tiles));  // outputs that do not exist
  int configured = 0;
  for (int64_t k0 = 0; k0 < w.k(); k0 += BlockK(w.kind())) {
    const int steps = static_cast<int>(std::min<int64_t>(w.k() - k0, BlockK(w.kind())) / kTileK);
    // The next block, while this one is computed: the hardware's own prefetch stops at every page.
    const int64_t block_bytes = BlockK(w.kind()) * row_bytes;
    const uint8_t* next = data + k0 * row_bytes + block_bytes;
    for (int64_t line = 0; line < block_bytes; line += 64) __builtin_prefetch(next + line);
    for (int s = 0; s < steps; ++s) {
      for (int lane = 0; lane < width; lane += kTileN) {
        FillTile(w.kind(), data, width, k0 + s * kTileK, lane, tiles[s][lane / kTileN]);
      }
    }
    for (int64_t row = 0; row < m; row += kTileRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, m - row));
      if (rows != configured) ConfigureTiles(configured = rows);
      BlockSums(x.values + row * w.k() + k0, w.k(), tiles, steps, sums);
      AddBlock(w, scales, k0, x, row, rows, sums, totals.data() + row * PackedLinear::kPanel);
    }
  }
  ReleaseTiles();
  for (int64_t r = 0; r < m; ++r) std::copy_n(totals.data() + r * PackedLinear::kPanel, used, out + r * out_ld + first);
}

MILLRACE_AMX void NarrowRows(const ActivationRows& x, int64_t m, int64_t k, uint16_t* out) {
  const __m512i infinity = _mm512_set1_epi32(0x7f800000), magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i lost = _mm512_setzero_si512();
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < k; i += 16) {
      const __mmask16 part = static_cast<__mmask16>(k - i >= 16 ? 0xffff : (1 << (k - i)) - 1);
      const __m512i bits = _mm512_maskz_loadu_epi32(part, x.values + r * x.ld + i);
      // A NaN's payload may be lost, not that it is one.
      const __mmask16 nan = _mm512_cmpgt_epi32_mask(_mm512_and_si512(bits, magnitude), infinity);
      lost = _mm512_mask_or_epi32(lost, static_cast<__mmask16>(~nan), lost, bits);
      __m512i high = _mm512_srli_epi32(bits, 16);
      high = _mm512_mask_or_epi32(high, nan, high, _mm512_set1_epi32(0x40));
      high = _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(bits, infinity), high);  // subnormal: zero, as in a tile
      _mm256_mask_storeu_epi16(out + r * k + i, part, _mm512_cvtepi32_epi16(high));
    }
  }
  CHECK((_mm512_reduce_or_epi32(lost) & 0xffff) == 0, "inputs of a BF16 product are BF16 values");
}

}  // namespace millrace

#else

namespace millrace {
bool AmxAvailable() { return false; }
void AmxPanelProduct(const PackedLinear&, int64_t, const Bf16Rows&, int64_t, float*, int64_t) {
  CHECK(false, "AMX on a processor without it");
}
void NarrowRows(const ActivationRows&, int64_t, int64_t, uint16_t*) { CHECK(false, "AMX on a processor without it"); }
}  // namespace millrace

#endif
