// SPDX-License-Identifier: Apache-2.0
// See matmul_amx.h. For several rows a panel's weights are widened once into tiles of 32 inputs by 16 outputs (pairs of
// inputs side by side, as the instruction wants them), scales included; 32 rows at a time then run over them, and a sum
// stays in its tile from the first input to the last. One row alone does the same sums on vectors, where filling tiles
// would not pay.
#include "engine/ops/matmul_amx.h"

#include <bit>
#include <cmath>

#include "engine/ops/rounding.h"
#include "engine/ops/weight_tiles_amx.h"
#include "engine/status.h"

#ifdef MILLRACE_HAVE_AMX
#include <algorithm>
#include <cstring>
#include <vector>

namespace millrace {
namespace {

using amx::CompilerBarrier;
using amx::kTileK;
using amx::kTileN;
using amx::kTileRows;
using amx::kTiles;
using amx::ReleaseTiles;
using amx::Step;

// Inputs widened at a time: what stays in the second-level cache beside the rows.
constexpr int kChunkSteps = 32;

// Up to so many rows, widening for each of them is cheaper than filling tiles.
constexpr int64_t kRowsOneByOne = 2;

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

// `configured`: how many rows of the last 32 tiles are configured for, 0 for none.
MILLRACE_AMX void ProductOfRows(const uint16_t* x, int64_t k, int64_t m, const Step* steps, int num_steps, bool first,
                                SumRows sums, int& configured) {
  for (int64_t row = 0; row < m; row += 2 * kTileRows) {
    const int rows = static_cast<int>(std::min<int64_t>(2 * kTileRows, m - row));
    const auto upper = static_cast<uint8_t>(std::min(rows, kTileRows)), lower = static_cast<uint8_t>(rows - upper);
    const uint16_t* inputs = x + row * k;
    const SumRows at{sums.at + row * sums.ld, sums.ld};
    if (rows != configured) {
      amx::ConfigureTiles(lower == 0 ? amx::TileConfig({upper, upper, upper, upper, upper, 16, 16, 16})
                                     : amx::TileConfig({16, 16, lower, lower, 16, lower, 16, 16}));
      configured = rows;
    }
    if (lower == 0) {
      ProductOfSixteen(inputs, k, steps, num_steps, first, at);
      continue;
    }
    ProductOfThirtyTwo(inputs, k, steps, num_steps, 0, first, at);
    ProductOfThirtyTwo(inputs, k, steps, num_steps, 2, first, at);
  }
}

// Weights of input `k`, outputs `lane` and up, as F32; of FP8 weights what HalveFp8 made of them.
template <WeightKind kKind>
MILLRACE_AMX inline __m512 Widen(const uint8_t* panel, int width, int64_t k, int lane) {
  if constexpr (kKind == WeightKind::kFp4) return amx::WidenFp4(panel + k * 32 + lane % 32, lane >= 32);
  const uint16_t* at = reinterpret_cast<const uint16_t*>(panel) + k * width + lane;
  if constexpr (kKind == WeightKind::kFp8) return amx::WidenHalf(at);
  const __m512i raw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
}

// What the tile instruction does, for one row and without a tile to fill: of 32 inputs the even ones and the odd ones
// are summed apart, in order, by fused multiply-adds; then both are added, and that to the sum so far. A scale, being a
// power of two, may as well be multiplied in here. Tiny values count as zero there, so they must here.
template <WeightKind kKind>
MILLRACE_AMX void OneRow(const PackedLinear& w, int64_t panel, const uint16_t* x, float* lanes) {
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040);  // flush results, take operands as zero
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
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + s + i)));
        _mm512_store_ps(inputs + i, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
      }
      const uint8_t* weights = step;
      if constexpr (kKind == WeightKind::kFp8) {
        amx::HalveFp8(step, step_bytes, half);
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

void OneRowAny(const PackedLinear& w, int64_t panel, const uint16_t* x, float* out) {
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
  const int64_t first = panel * PackedLinear::kPanel;
  std::copy_n(lanes, std::min<int64_t>(PackedLinear::kPanel, w.n() - first), out + first);
}

MILLRACE_AMX void ManyRows(const PackedLinear& w, int64_t panel, const uint16_t* x, int64_t m, float* out,
                           int64_t out_ld, int& configured) {
  static thread_local std::vector<Step> steps(kChunkSteps);
  static thread_local std::vector<float> narrow_sums;
  const int64_t first = panel * PackedLinear::kPanel;
  const int64_t used = std::min<int64_t>(PackedLinear::kPanel, w.n() - first);
  SumRows sums{out + first, out_ld};
  if (used < PackedLinear::kPanel) {  // outputs that do not exist must not be written
    narrow_sums.resize(std::max<size_t>(narrow_sums.size(), m * PackedLinear::kPanel));
    sums = {narrow_sums.data(), PackedLinear::kPanel};
  }
  for (int64_t k0 = 0; k0 < w.k(); k0 += kChunkSteps * kTileK) {
    const int num_steps = static_cast<int>(std::min<int64_t>(w.k() - k0, kChunkSteps * kTileK) / kTileK);
    for (int s = 0; s < num_steps; ++s) {
      amx::FillStep(w.kind(), w.panel_data(panel), w.panel_scales(panel), w.panel_width(panel), k0 + s * kTileK,
                    steps[s]);
    }
    ProductOfRows(x + k0, w.k(), m, steps.data(), num_steps, k0 == 0, sums, configured);
  }
  if (used == PackedLinear::kPanel) return;
  for (int64_t r = 0; r < m; ++r) std::copy_n(sums.at + r * sums.ld, used, out + r * out_ld + first);
}

}  // namespace

MILLRACE_AMX void AmxProduct(const PackedLinear& w, int64_t begin, int64_t end, const uint16_t* x, int64_t m,
                             float* out, int64_t out_ld) {
  if (m <= kRowsOneByOne) {
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t panel = begin; panel < end; ++panel) OneRowAny(w, panel, x + r * w.k(), out + r * out_ld);
    }
    return;
  }
  int configured = 0;
  for (int64_t panel = begin; panel < end; ++panel) ManyRows(w, panel, x, m, out, out_ld, configured);
  ReleaseTiles();
}

MILLRACE_AMX void NarrowRows(const ActivationRows& x, int64_t m, int64_t k, uint16_t* out) {
  const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  __m512i bits = _mm512_setzero_si512();
  for (int64_t r = 0; r < m; ++r) {
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
      __m512 a = _mm512_loadu_ps(x.values + r * x.ld + i), b = _mm512_loadu_ps(x.values + r * x.ld + i + 16);
      if (x.scales != nullptr) {
        const __m512 scale = _mm512_set1_ps(x.scales[r * x.scales_ld + i / 128]);
        a = _mm512_mul_ps(a, scale);
        b = _mm512_mul_ps(b, scale);
      }
      bits = _mm512_or_si512(bits, _mm512_or_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
      const __m512i high = _mm512_packus_epi32(_mm512_srli_epi32(_mm512_castps_si512(a), 16),
                                               _mm512_srli_epi32(_mm512_castps_si512(b), 16));
      _mm512_storeu_si512(out + r * k + i, _mm512_permutexvar_epi64(in_order, high));
    }
    for (; i < k; ++i) {
      const float scale = x.scales == nullptr ? 1.0f : x.scales[r * x.scales_ld + i / 128];
      const uint32_t value = std::bit_cast<uint32_t>(x.values[r * x.ld + i] * scale);
      bits = _mm512_or_si512(bits, _mm512_set1_epi32(static_cast<int>(value)));
      out[r * k + i] = static_cast<uint16_t>(value >> 16);
    }
  }
  if ((_mm512_reduce_or_epi32(bits) & 0xffff) == 0) return;
  // Something was lost. A NaN's payload may be, not that it is one.
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < k; ++i) {
      const float scale = x.scales == nullptr ? 1.0f : x.scales[r * x.scales_ld + i / 128];
      const float value = x.values[r * x.ld + i] * scale;
      CHECK(std::isnan(value) || (std::bit_cast<uint32_t>(value) & 0xffff) == 0,
            "inputs of a BF16 product are BF16 values");
      out[r * k + i] = EncodeBf16(value);
    }
  }
}

}  // namespace millrace

#else

namespace millrace {
void AmxProduct(const PackedLinear&, int64_t, int64_t, const uint16_t*, int64_t, float*, int64_t) {
  CHECK(false, "AMX on a processor without it");
}
void NarrowRows(const ActivationRows&, int64_t, int64_t, uint16_t*) { CHECK(false, "AMX on a processor without it"); }
}  // namespace millrace

#endif
