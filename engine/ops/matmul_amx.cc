// SPDX-License-Identifier: Apache-2.0
// See matmul_amx.h. For several rows a panel's weights are widened once into tiles of 32 inputs by 16 outputs (pairs of
// inputs side by side, as the instruction wants them), scales included; 32 rows at a time then run over them, and a sum
// stays in its tile from the first input to the last. One row alone does the same sums on vectors, where filling tiles
// would not pay.
#include "engine/ops/matmul_amx.h"

#include <bit>
#include <cmath>

#include "engine/ops/rounding.h"
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
using amx::kTileK;
using amx::kTileN;
using amx::kTileRows;
using amx::ReleaseTiles;
using amx::Tile;

constexpr int kTiles = PackedLinear::kPanel / kTileN;
// Inputs widened at a time: what stays in the second-level cache beside the rows.
constexpr int kChunkSteps = 32;

// Up to so many rows, widening for each of them is cheaper than filling tiles.
constexpr int64_t kRowsOneByOne = 2;

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

// A power of two that BF16's exponent field can take by addition, or subtraction, without leaving it.
bool IsModest(float scale) { return scale >= 0x1p-100f && scale <= 0x1p100f; }

// What one is to add to a BF16 value's bits to multiply it by a power of two.
int ExponentBits(float scale) { return (static_cast<int>(std::bit_cast<uint32_t>(scale) >> 23) - 127) * 128; }

// E4M3 codes as half floats 2^8 too small: exponents and mantissas fit, subnormals become subnormals, which the
// widening from half floats takes in its stride (a multiplication of F32 subnormals takes a hundred cycles). n:
// multiple of 16.
MILLRACE_AMX inline void HalveFp8(const uint8_t* codes, int64_t n, uint16_t* half) {
  for (int64_t i = 0; i < n; i += 16) {
    const __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(code, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i), bits);
  }
}

MILLRACE_AMX inline __m512 WidenHalf(const uint16_t* half) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}

// `codes` holds the nibbles of outputs `lane` and up; the table's index takes no more than its low four bits.
MILLRACE_AMX inline __m512 WidenFp4(const uint8_t* codes, bool high) {
  const __m512 table = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  __m512i raw = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  if (high) raw = _mm512_srli_epi32(raw, 4);
  return _mm512_permutexvar_ps(raw, table);
}

// F32 values of two inputs' weights, each exact in BF16, as pairs.
MILLRACE_AMX inline __m512i Pair(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_or_si512(low,
                         _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Weights of inputs k and k + 1, outputs `lane` and up, times their scales, as pairs: any codes, scales and panel
// width.
MILLRACE_AMX inline __m512i AnyPairs(WeightKind kind, const uint8_t* panel, const float* scales, int width, int64_t k,
                                     int lane) {
  if (kind == WeightKind::kFp8) {
    uint16_t half[2][kTileN];
    HalveFp8(panel + k * width + lane, kTileN, half[0]);
    HalveFp8(panel + (k + 1) * width + lane, kTileN, half[1]);
    const __m512 back = _mm512_set1_ps(0x1p8f), scale = _mm512_set1_ps(scales[k / 128]);
    return Pair(_mm512_mul_ps(_mm512_mul_ps(WidenHalf(half[0]), back), scale),
                _mm512_mul_ps(_mm512_mul_ps(WidenHalf(half[1]), back), scale));
  }
  if (kind == WeightKind::kFp4) {
    const __m512 scale = _mm512_loadu_ps(scales + k / 32 * PackedLinear::kPanel + lane);
    const uint8_t* at = panel + k * 32 + lane % 32;
    return Pair(_mm512_mul_ps(WidenFp4(at, lane >= 32), scale), _mm512_mul_ps(WidenFp4(at + 32, lane >= 32), scale));
  }
  const uint16_t* at = reinterpret_cast<const uint16_t*>(panel) + k * width + lane;
  const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + width)));
  return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

MILLRACE_AMX void FillAnyStep(WeightKind kind, const uint8_t* panel, const float* scales, int width, int64_t k0,
                              Step& step) {
  for (int lane = 0; lane < PackedLinear::kPanel; lane += kTileN) {
    Tile& tile = step.tiles[lane / kTileN];
    for (int p = 0; p < kTileK / 2; ++p) {
      const __m512i pairs =
          lane < width ? AnyPairs(kind, panel, scales, width, k0 + 2 * p, lane) : _mm512_setzero_si512();
      _mm512_store_si512(tile.words[p], pairs);
    }
  }
}

// The order in which groups of four outputs must stand so that two rounds of interleaving inside 128 bits put outputs
// 16t .. 16t + 15 into tile t: a transposed 4 x 4.
MILLRACE_AMX inline __m512i GroupsOfFour() {
  return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// Stores one row of pairs in the four tiles, from bytes of even and odd inputs side by side: low and high bytes of BF16
// values, outputs in groups as above; `first` holds groups 0 and 1 of every 128 bits, `second` 2 and 3. `Finish` gets
// each vector and its tile.
template <typename Finish>
MILLRACE_AMX inline void StoreBytes(__m512i first_low, __m512i first_high, __m512i second_low, __m512i second_high,
                                    int p, Step& step, Finish finish) {
  _mm512_store_si512(step.tiles[0].words[p], finish(_mm512_unpacklo_epi8(first_low, first_high), 0));
  _mm512_store_si512(step.tiles[1].words[p], finish(_mm512_unpackhi_epi8(first_low, first_high), 1));
  _mm512_store_si512(step.tiles[2].words[p], finish(_mm512_unpacklo_epi8(second_low, second_high), 2));
  _mm512_store_si512(step.tiles[3].words[p], finish(_mm512_unpackhi_epi8(second_low, second_high), 3));
}

// FP8 in a full panel. BF16's exponent is E4M3's plus 120: its highest bit, that one's complement four times, and the
// rest, so both bytes are bits of the code, moved. Where a code has exponent 0 (zero or subnormal, rare in weights that
// were scaled to the format) the row of pairs is made the other way.
MILLRACE_AMX void FillFp8Step(const uint8_t* panel, const float* scales, int64_t k0, Step& step) {
  const __m512i high_bits = _mm512_set1_epi64(0x1020404040404080), low_bits = _mm512_set1_epi64(0x01020408);
  const __m512i exponents = _mm512_set1_epi8(0x78), groups = GroupsOfFour();
  const __m512i scale = _mm512_set1_epi16(static_cast<short>(ExponentBits(scales[k0 / 128])));
  for (int p = 0; p < kTileK / 2; ++p) {
    const uint8_t* at = panel + (k0 + 2 * p) * PackedLinear::kPanel;
    const __m512i even = _mm512_loadu_si512(at), odd = _mm512_loadu_si512(at + PackedLinear::kPanel);
    if ((_mm512_testn_epi8_mask(even, exponents) | _mm512_testn_epi8_mask(odd, exponents)) != 0) [[unlikely]] {
      for (int t = 0; t < kTiles; ++t) {
        _mm512_store_si512(step.tiles[t].words[p],
                           AnyPairs(WeightKind::kFp8, panel, scales, PackedLinear::kPanel, k0 + 2 * p, t * kTileN));
      }
      continue;
    }
    const __m512i a = _mm512_permutexvar_epi32(groups, even), b = _mm512_permutexvar_epi32(groups, odd);
    const __m512i first = _mm512_unpacklo_epi8(a, b), second = _mm512_unpackhi_epi8(a, b);
    StoreBytes(_mm512_gf2p8affine_epi64_epi8(first, low_bits, 0), _mm512_gf2p8affine_epi64_epi8(first, high_bits, 0x3c),
               _mm512_gf2p8affine_epi64_epi8(second, low_bits, 0),
               _mm512_gf2p8affine_epi64_epi8(second, high_bits, 0x3c), p, step,
               [&](__m512i words, int) MILLRACE_AMX { return _mm512_add_epi16(words, scale); });
  }
}

// FP4: bytes from tables. Scales are at most 1 here, so that an unsigned subtraction that stops at zero leaves zeros as
// they are (both of them are +0, which no sum can tell).
MILLRACE_AMX void FillFp4Step(const uint8_t* panel, const float* scales, int64_t k0, Step& step) {
  const __m512i low_bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
  const __m512i high_bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 63, 63, 63, 64, 64, 64, 64, 0, -65, -65, -65, -64, -64, -64, -64));
  const __m512i groups = GroupsOfFour(), nibble = _mm512_set1_epi8(15);
  __m512i less[kTiles];  // what to subtract from both values of a pair
  for (int t = 0; t < kTiles; ++t) {
    const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(scales + k0 / 32 * PackedLinear::kPanel + t * kTileN));
    const __m512i down = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), _mm512_srli_epi32(bits, 23)), 7);
    less[t] = _mm512_or_si512(down, _mm512_slli_epi32(down, 16));
  }
  const auto codes = [&](const uint8_t* pairs) MILLRACE_AMX {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1);
    return _mm512_permutexvar_epi32(groups, _mm512_and_si512(both, nibble));
  };
  for (int p = 0; p < kTileK / 2; ++p) {
    const uint8_t* at = panel + (k0 + 2 * p) * 32;
    const __m512i a = codes(at), b = codes(at + 32);
    const __m512i first = _mm512_unpacklo_epi8(a, b), second = _mm512_unpackhi_epi8(a, b);
    StoreBytes(_mm512_shuffle_epi8(low_bytes, first), _mm512_shuffle_epi8(high_bytes, first),
               _mm512_shuffle_epi8(low_bytes, second), _mm512_shuffle_epi8(high_bytes, second), p, step,
               [&](__m512i words, int t) MILLRACE_AMX { return _mm512_subs_epu16(words, less[t]); });
  }
}

// BF16 in a full panel, 32 outputs at a time: groups of four interleave into two tiles.
MILLRACE_AMX void FillBf16Step(const uint8_t* panel, int64_t k0, Step& step) {
  const __m512i groups = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int p = 0; p < kTileK / 2; ++p) {
    const uint8_t* at = panel + (k0 + 2 * p) * PackedLinear::kPanel * 2;
    for (int half = 0; half < 2; ++half) {
      const __m512i a = _mm512_permutexvar_epi64(groups, _mm512_loadu_si512(at + half * 64));
      const __m512i b = _mm512_permutexvar_epi64(groups, _mm512_loadu_si512(at + half * 64 + PackedLinear::kPanel * 2));
      _mm512_store_si512(step.tiles[2 * half].words[p], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(step.tiles[2 * half + 1].words[p], _mm512_unpackhi_epi16(a, b));
    }
  }
}

// Weights of inputs k0 .. k0 + 31 of a panel, times their scales.
MILLRACE_AMX void FillStep(WeightKind kind, const uint8_t* panel, const float* scales, int width, int64_t k0,
                           Step& step) {
  const bool full = width == PackedLinear::kPanel;
  if (full && kind == WeightKind::kBf16) return FillBf16Step(panel, k0, step);
  if (full && kind == WeightKind::kFp8 && IsModest(scales[k0 / 128])) return FillFp8Step(panel, scales, k0, step);
  if (kind == WeightKind::kFp4) {
    const float* block = scales + k0 / 32 * PackedLinear::kPanel;
    if (std::all_of(block, block + PackedLinear::kPanel, [](float s) { return IsModest(s) && s <= 1; })) {
      return FillFp4Step(panel, scales, k0, step);
    }
  }
  FillAnyStep(kind, panel, scales, width, k0, step);
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
  if constexpr (kKind == WeightKind::kFp4) return WidenFp4(panel + k * 32 + lane % 32, lane >= 32);
  const uint16_t* at = reinterpret_cast<const uint16_t*>(panel) + k * width + lane;
  if constexpr (kKind == WeightKind::kFp8) return WidenHalf(at);
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
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("gfni")) {
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

namespace {

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
      FillStep(w.kind(), w.panel_data(panel), w.panel_scales(panel), w.panel_width(panel), k0 + s * kTileK, steps[s]);
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
bool AmxAvailable() { return false; }
void AmxProduct(const PackedLinear&, int64_t, int64_t, const uint16_t*, int64_t, float*, int64_t) {
  CHECK(false, "AMX on a processor without it");
}
void NarrowRows(const ActivationRows&, int64_t, int64_t, uint16_t*) { CHECK(false, "AMX on a processor without it"); }
}  // namespace millrace

#endif
