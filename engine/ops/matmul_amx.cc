// SPDX-License-Identifier: Apache-2.0
// See matmul_amx.h. For several rows a panel's weights are widened once into tiles of 32 inputs by 16 outputs (pairs of
// inputs side by side, as the instruction wants them), scales included; 32 rows at a time then run over them, and a sum
// stays in its tile from the first input to the last. One row alone does the same sums on vectors, where filling tiles
// would not pay.
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
// Inputs widened at a time: what stays in the second-level cache beside the rows.
constexpr int kChunkSteps = 32;

// One step: 32 inputs of a panel.
struct Step {
  Tile tiles[kTiles];
};

int64_t RowBytes(const PackedLinear& w, int width) {
  switch (w.kind()) {
    case WeightKind::kBf16:
      return width * 2;
    case WeightKind::kFp8:
      return width;
    default:
      return width / 2;
  }
}

// F32 values of two inputs' weights, each exact in BF16, as pairs.
MILLRACE_AMX inline __m512i Pair(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_or_si512(low,
                         _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The code's exponent field becomes F32's own, 2^120 too small; the multiplication by `back`, which puts that right and
// may hold a scale, also makes its subnormals normal.
MILLRACE_AMX inline __m512 WidenFp8(const uint8_t* codes, __m512 back) {
  const __m512i raw = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(raw, 20), _mm512_set1_epi32(static_cast<int>(0x87f00000u)));
  return _mm512_mul_ps(_mm512_castsi512_ps(bits), back);
}

// `codes` holds the nibbles of outputs `lane` and up; the table's index takes no more than its low four bits.
MILLRACE_AMX inline __m512 WidenFp4(const uint8_t* codes, bool high) {
  const __m512 table = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  __m512i raw = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  if (high) raw = _mm512_srli_epi32(raw, 4);
  return _mm512_permutexvar_ps(raw, table);
}

// Weights of inputs k0 .. k0 + 31, outputs lane .. lane + 15 of a panel, times their scales.
MILLRACE_AMX void FillTile(WeightKind kind, const uint8_t* panel, const float* scales, int width, int64_t k0, int lane,
                           Tile& tile) {
  if (kind == WeightKind::kFp8) {
    const float scale = scales[k0 / 128];
    // 2^120 times a scale of 2^7 is what F32 holds; greater ones are put in afterwards.
    const __m512 back = _mm512_set1_ps(0x1p120f * std::min(scale, 128.0f));
    const __m512 rest = _mm512_set1_ps(scale > 128 ? scale * 0x1p-7f : 1.0f);
    for (int p = 0; p < kTileK / 2; ++p) {
      const uint8_t* at = panel + (k0 + 2 * p) * width + lane;
      __m512 even = WidenFp8(at, back), odd = WidenFp8(at + width, back);
      if (scale > 128) even = _mm512_mul_ps(even, rest), odd = _mm512_mul_ps(odd, rest);
      _mm512_store_si512(tile.words[p], Pair(even, odd));
    }
  } else if (kind == WeightKind::kFp4) {
    const __m512 scale = _mm512_loadu_ps(scales + k0 / 32 * PackedLinear::kPanel + lane);
    for (int p = 0; p < kTileK / 2; ++p) {
      const uint8_t* at = panel + (k0 + 2 * p) * 32 + lane % 32;
      const __m512 even = _mm512_mul_ps(WidenFp4(at, lane >= 32), scale);
      const __m512 odd = _mm512_mul_ps(WidenFp4(at + 32, lane >= 32), scale);
      _mm512_store_si512(tile.words[p], Pair(even, odd));
    }
  } else {
    for (int p = 0; p < kTileK / 2; ++p) {
      const uint16_t* at = reinterpret_cast<const uint16_t*>(panel) + (k0 + 2 * p) * width + lane;
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + width)));
      _mm512_store_si512(tile.words[p], _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

// Sums of some rows with a panel's outputs: where they are kept between chunks of inputs, and how far apart rows are.
struct SumRows {
  float* at;
  int64_t ld;
};

// Up to 16 rows, as configured, with all 64 outputs. Weights take turns in three tiles: a load need not wait for the
// product before.
MILLRACE_AMX void ProductOfSixteen(const uint16_t* x, int64_t k, const Step* steps, int num_steps, bool first,
                                   SumRows sums) {
  const int64_t row_bytes = k * 2, sum_bytes = sums.ld * 4;
  CompilerBarrier();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums.at, sum_bytes);
    _tile_loadd(1, sums.at + kTileN, sum_bytes);
    _tile_loadd(2, sums.at + 2 * kTileN, sum_bytes);
    _tile_loadd(3, sums.at + 3 * kTileN, sum_bytes);
  }
  for (int s = 0; s < num_steps; ++s) {
    _tile_loadd(4, x + s * kTileK, row_bytes);
    _tile_loadd(5, &steps[s].tiles[0], 64);
    _tile_loadd(6, &steps[s].tiles[1], 64);
    _tile_loadd(7, &steps[s].tiles[2], 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, &steps[s].tiles[3], 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, sums.at, sum_bytes);
  _tile_stored(1, sums.at + kTileN, sum_bytes);
  _tile_stored(2, sums.at + 2 * kTileN, sum_bytes);
  _tile_stored(3, sums.at + 3 * kTileN, sum_bytes);
  CompilerBarrier();
}

// 16 rows and up to 16 more, as configured, with 32 outputs from tile `half` of each step.
MILLRACE_AMX void ProductOfThirtyTwo(const uint16_t* x, int64_t k, const Step* steps, int num_steps, int half,
                                     bool first, SumRows sums) {
  const int64_t row_bytes = k * 2, sum_bytes = sums.ld * 4;
  float *upper = sums.at + half * kTileN, *lower = upper + kTileRows * sums.ld;
  CompilerBarrier();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, upper, sum_bytes);
    _tile_loadd(1, upper + kTileN, sum_bytes);
    _tile_loadd(2, lower, sum_bytes);
    _tile_loadd(3, lower + kTileN, sum_bytes);
  }
  for (int s = 0; s < num_steps; ++s) {
    _tile_loadd(6, &steps[s].tiles[half], 64);
    _tile_loadd(4, x + s * kTileK, row_bytes);
    _tile_loadd(7, &steps[s].tiles[half + 1], 64);
    _tile_loadd(5, x + kTileRows * k + s * kTileK, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, upper, sum_bytes);
  _tile_stored(1, upper + kTileN, sum_bytes);
  _tile_stored(2, lower, sum_bytes);
  _tile_stored(3, lower + kTileN, sum_bytes);
  CompilerBarrier();
}

MILLRACE_AMX void ProductOfRows(const uint16_t* x, int64_t k, int64_t m, const Step* steps, int num_steps, bool first,
                                SumRows sums) {
  int configured = -1;  // rows beyond the first 16
  for (int64_t row = 0; row < m; row += 2 * kTileRows) {
    const int rows = static_cast<int>(std::min<int64_t>(2 * kTileRows, m - row));
    const auto upper = static_cast<uint8_t>(std::min(rows, kTileRows)), lower = static_cast<uint8_t>(rows - upper);
    const uint16_t* inputs = x + row * k;
    const SumRows at{sums.at + row * sums.ld, sums.ld};
    if (lower == 0) {
      amx::ConfigureTiles(amx::TileConfig({upper, upper, upper, upper, upper, 16, 16, 16}));
      configured = -1;
      ProductOfSixteen(inputs, k, steps, num_steps, first, at);
      continue;
    }
    if (lower != configured) {
      amx::ConfigureTiles(amx::TileConfig({16, 16, lower, lower, 16, lower, 16, 16}));
      configured = lower;
    }
    ProductOfThirtyTwo(inputs, k, steps, num_steps, 0, first, at);
    ProductOfThirtyTwo(inputs, k, steps, num_steps, 2, first, at);
  }
}

// Weights of input `k`, outputs `lane` and up, as F32; of FP8 weights what HalveFp8 made of them.
template <WeightKind kKind>
MILLRACE_AMX inline __m512 Widen(const uint8_t* panel, int width, int64_t k, int lane) {
  if constexpr (kKind == WeightKind::kFp4) return WidenFp4(panel + k * 32 + lane % 32, lane >= 32);
  const uint16_t* at = reinterpret_cast<const uint16_t*>(panel) + k * width + lane;
  if constexpr (kKind == WeightKind::kFp8) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  const __m512i raw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
}

// E4M3 codes as half floats 2^8 too small: exponents and mantissas fit, subnormals become subnormals, which the widening
// from half floats takes in its stride (a multiplication of F32 subnormals takes a hundred cycles).
MILLRACE_AMX void HalveFp8(const uint8_t* codes, int64_t n, uint16_t* half) {
  for (int64_t i = 0; i < n; i += 32) {
    const __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    _mm512_storeu_si512(
        half + i, _mm512_and_si512(_mm512_slli_epi16(code, 7), _mm512_set1_epi16(static_cast<short>(0xbf80))));
  }
}

// What the tile instruction does, for one row and without a tile to fill: of 32 inputs the even ones and the odd ones
// are summed apart, in order, by fused multiply-adds; then both are added, and that to the sum so far. A scale, being a
// power of two, may as well be multiplied in here. Tiny values count as zero there, so they must here.
template <WeightKind kKind>
MILLRACE_AMX void OneRow(const PackedLinear& w, int64_t panel, const uint16_t* x, float* lanes) {
  const unsigned saved = _mm_getcsr();
  if constexpr (kKind == WeightKind::kBf16) _mm_setcsr(saved | 0x8040);  // flush results, take operands as zero
  const float* scales = w.panel_scales(panel);
  const int width = w.panel_width(panel);
  const int64_t step_bytes = RowBytes(w, width) * kTileK;
  constexpr int64_t kAhead = 2048;
  alignas(64) float inputs[kTileK];
  alignas(64) uint16_t half[kKind == WeightKind::kFp8 ? kTileK * PackedLinear::kPanel : 1];
  const auto product = [&]<int kVectors>(int lane) MILLRACE_AMX {
    __m512 sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = _mm512_setzero_ps();
    const uint8_t* step = w.panel_data(panel);
    for (int64_t s = 0; s < w.k(); s += kTileK, step += step_bytes) {
      for (int64_t line = 0; line < step_bytes; line += 64) __builtin_prefetch(step + kAhead + line);
      for (int i = 0; i < kTileK; i += 16) {
        const __m512i bits =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + s + i)));
        _mm512_store_ps(inputs + i, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
      }
      const uint8_t* weights = step;
      if constexpr (kKind == WeightKind::kFp8) {
        HalveFp8(step, step_bytes, half);
        weights = reinterpret_cast<const uint8_t*>(half);
      }
      CompilerBarrier();  // what was stored is to be loaded, not shuffled about in registers
      __m512 even[kVectors], odd[kVectors];
      for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = _mm512_setzero_ps();
      for (int k = 0; k < kTileK; k += 2) {
        const __m512 x0 = _mm512_set1_ps(inputs[k]), x1 = _mm512_set1_ps(inputs[k + 1]);
        for (int v = 0; v < kVectors; ++v) {
          even[v] = _mm512_fmadd_ps(x0, Widen<kKind>(weights, width, k, lane + v * kTileN), even[v]);
          odd[v] = _mm512_fmadd_ps(x1, Widen<kKind>(weights, width, k + 1, lane + v * kTileN), odd[v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        const __m512 both = _mm512_add_ps(even[v], odd[v]);
        if constexpr (kKind == WeightKind::kBf16) {
          sum[v] = _mm512_add_ps(sum[v], both);
        } else if constexpr (kKind == WeightKind::kFp8) {
          sum[v] = _mm512_fmadd_ps(both, _mm512_set1_ps(scales[s / 128] * 0x1p8f), sum[v]);
        } else {
          const float* at = scales + s / 32 * PackedLinear::kPanel + lane + v * kTileN;
          sum[v] = _mm512_fmadd_ps(both, _mm512_loadu_ps(at), sum[v]);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(lanes + lane + v * kTileN, sum[v]);
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
  constexpr uint32_t kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // BF16, tiles, INT8
  if ((d & kNeeded) != kNeeded) return false;
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

void AmxPanelProduct(const PackedLinear& w, int64_t panel, const uint16_t* x, int64_t m, float* out, int64_t out_ld) {
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
  static thread_local std::vector<Step> steps(kChunkSteps);
  static thread_local std::vector<float> narrow_sums;
  SumRows sums{out + first, out_ld};
  if (used < PackedLinear::kPanel) {  // outputs that do not exist must not be written
    narrow_sums.resize(std::max<size_t>(narrow_sums.size(), m * PackedLinear::kPanel));
    sums = {narrow_sums.data(), PackedLinear::kPanel};
  }
  const uint8_t* data = w.panel_data(panel);
  const float* scales = w.panel_scales(panel);
  const int width = w.panel_width(panel);
  for (int64_t k0 = 0; k0 < w.k(); k0 += kChunkSteps * kTileK) {
    const int num_steps = static_cast<int>(std::min<int64_t>(w.k() - k0, kChunkSteps * kTileK) / kTileK);
    for (int s = 0; s < num_steps; ++s) {
      for (int lane = 0; lane < PackedLinear::kPanel; lane += kTileN) {
        Tile& tile = steps[s].tiles[lane / kTileN];
        if (lane < width) {
          FillTile(w.kind(), data, scales, width, k0 + s * kTileK, lane, tile);
        } else {
          std::memset(&tile, 0, sizeof(tile));
        }
      }
    }
    ProductOfRows(x + k0, w.k(), m, steps.data(), num_steps, k0 == 0, sums);
  }
  ReleaseTiles();
  if (used == PackedLinear::kPanel) return;
  for (int64_t r = 0; r < m; ++r) std::copy_n(sums.at + r * sums.ld, used, out + r * out_ld + first);
}

MILLRACE_AMX void NarrowRows(const ActivationRows& x, int64_t m, int64_t k, uint16_t* out) {
  const __m512i infinity = _mm512_set1_epi32(0x7f800000), magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i lost = _mm512_setzero_si512();
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < k; i += 16) {
      const __mmask16 part = static_cast<__mmask16>(k - i >= 16 ? 0xffff : (1 << (k - i)) - 1);
      __m512 value = _mm512_maskz_loadu_ps(part, x.values + r * x.ld + i);
      if (x.scales != nullptr) value = _mm512_mul_ps(value, _mm512_set1_ps(x.scales[r * x.scales_ld + i / 128]));
      const __m512i bits = _mm512_castps_si512(value);
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
void AmxPanelProduct(const PackedLinear&, int64_t, const uint16_t*, int64_t, float*, int64_t) {
  CHECK(false, "AMX on a processor without it");
}
void NarrowRows(const ActivationRows&, int64_t, int64_t, uint16_t*) { CHECK(false, "AMX on a processor without it"); }
}  // namespace millrace

#endif
