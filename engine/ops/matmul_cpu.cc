// SPDX-License-Identifier: Apache-2.0
// The product of packed_linear.h, with Highway's run-time dispatch.
//
// One row streams the panel and widens weights in registers; more rows widen a strip of 16 lanes once into L1 and
// run over it. Both do the same fused multiply-adds in the same order for each output, so a row's bits do not depend on
// how many rows there are. FP8 and FP4 codes are widened the cheapest way there is, which leaves out a power of two
// that the block's scale puts back exactly.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/ops/matmul_cpu.cc"
#include <hwy/foreach_target.h>
// Highway's per-target sections follow.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <algorithm>

#include "engine/ops/packed_linear.h"

HWY_BEFORE_NAMESPACE();
namespace millrace {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
constexpr int kStrip = 16;                      // lanes widened at a time
constexpr int kStripVectors = kStrip / kLanes;  // 1, 2 or 4
// Sums in flight: enough to hide a multiply-add's latency, few enough to stay in registers.
constexpr int kRowTile = kStripVectors == 1 ? 12 : 6;

template <WeightKind kKind>
struct Block {
  static constexpr int kK = kKind == WeightKind::kFp8 ? 128 : 32;
  // What Widen and kInput leave out.
  static constexpr float kWidened = kKind == WeightKind::kFp8 ? 0x1p60f : kKind == WeightKind::kFp4 ? 0.5f : 1.0f;
  // What an input is multiplied by before it meets a widened weight.
  static constexpr float kInput = kKind == WeightKind::kFp8 ? 0x1p60f : 1.0f;
  static constexpr int kBits = kKind == WeightKind::kF32    ? 32
                               : kKind == WeightKind::kBf16 ? 16
                               : kKind == WeightKind::kFp8  ? 8
                                                            : 4;
};

// Twice the value of the 64 FP4 codes of one input, outputs in order.
HWY_INLINE void ExpandFp4(const uint8_t* HWY_RESTRICT pairs, int8_t* HWY_RESTRICT twice) {
  alignas(16) static constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < 32; ++i) {
    twice[i] = kTwice[pairs[i] & 15];
    twice[32 + i] = kTwice[pairs[i] >> 4];
  }
#else
  const hn::FixedTag<uint8_t, 16> d8;
  const hn::FixedTag<int8_t, 16> di8;
  const hn::RepartitionToWide<decltype(d8)> d16;
  const auto table = hn::Load(di8, kTwice);
  const auto nibble = hn::Set(d8, 15);
  for (int i = 0; i < 32; i += 16) {
    const auto pair = hn::LoadU(d8, pairs + i);
    const auto high = hn::And(hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, pair))), nibble);
    hn::StoreU(hn::TableLookupBytes(table, hn::BitCast(di8, hn::And(pair, nibble))), di8, twice + i);
    hn::StoreU(hn::TableLookupBytes(table, hn::BitCast(di8, high)), di8, twice + 32 + i);
  }
#endif
}

// Widens kLanes weights at `at` (for FP4, of expanded codes). E4M3 becomes the F32 whose exponent field is the code's
// own: 2^120 too small, the code's subnormals being exact subnormals of F32.
template <WeightKind kKind>
HWY_INLINE V Widen(const void* at) {
  const D d;
  const hn::Rebind<int32_t, D> di;
  const hn::Rebind<int8_t, D> d8;
  if constexpr (kKind == WeightKind::kF32) {
    return hn::LoadU(d, static_cast<const float*>(at));
  } else if constexpr (kKind == WeightKind::kBf16) {
    const hn::Rebind<uint16_t, D> d16;
    const hn::Rebind<uint32_t, D> d32;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, static_cast<const uint16_t*>(at)))));
  } else if constexpr (kKind == WeightKind::kFp8) {
    const auto raw = hn::PromoteTo(di, hn::LoadU(d8, static_cast<const int8_t*>(at)));
    return hn::BitCast(d, hn::And(hn::ShiftLeft<20>(raw), hn::Set(di, static_cast<int32_t>(0x87f00000u))));
  } else {
    return hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d8, static_cast<const int8_t*>(at))));
  }
}

// What a block's sum is multiplied by, for the lanes at `lane`.
template <WeightKind kKind>
HWY_INLINE V BlockScale(const float* HWY_RESTRICT scales, int64_t block, int lane, float activation_scale) {
  const D d;
  const V s = hn::Set(d, activation_scale * Block<kKind>::kWidened);
  if constexpr (kKind == WeightKind::kFp8) return hn::Mul(s, hn::Set(d, scales[block]));
  if constexpr (kKind == WeightKind::kFp4)
    return hn::Mul(s, hn::LoadU(d, scales + block * PackedLinear::kPanel + lane));
  return s;
}

HWY_INLINE float ActivationScale(const ActivationRows& x, int64_t row, int64_t k0) {
  return x.scales == nullptr ? 1.0f : x.scales[row * x.scales_ld + k0 / 128];
}

// Adds kBlocks blocks from input k0 on, summed side by side and added in order, to the totals of one row: kVectors
// vectors of one panel from first_lane on.
template <WeightKind kKind, int kVectors, int kBlocks>
HWY_INLINE void AddBlocks(const PackedLinear& w, int64_t panel, const ActivationRows& x, int first_lane, int64_t k0,
                          V* HWY_RESTRICT total) {
  const D d;
  constexpr int64_t kK = Block<kKind>::kK;
  const float* HWY_RESTRICT scales = w.panel_scales(panel);
  const int64_t row_bytes = static_cast<int64_t>(w.panel_width(panel)) * Block<kKind>::kBits / 8;
  const uint8_t* HWY_RESTRICT data = w.panel_data(panel) + k0 * row_bytes;
  const int64_t len = std::min<int64_t>(w.k() - k0, kK);
  constexpr int64_t kAhead = 2048;
  V sum[kBlocks][kVectors];
  for (int b = 0; b < kBlocks; ++b) {
    for (int v = 0; v < kVectors; ++v) sum[b][v] = hn::Zero(d);
  }
  for (int64_t i = 0; i < len; ++i) {
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t k = b * kK + i;
      const V value = hn::Set(d, x.values[k0 + k] * Block<kKind>::kInput);
      const uint8_t* HWY_RESTRICT at = data + k * row_bytes;
      // Weights are read once and from far away: the hardware's own prefetch stops at every page.
      for (int64_t line = 0; line < row_bytes; line += 64) hwy::Prefetch(at + kAhead + line);
      HWY_ALIGN int8_t twice[PackedLinear::kPanel];
      if constexpr (kKind == WeightKind::kFp4) ExpandFp4(at, twice);
      for (int v = 0; v < kVectors; ++v) {
        const int lane = first_lane + v * kLanes;
        const void* weights = at + lane * Block<kKind>::kBits / 8;
        if constexpr (kKind == WeightKind::kFp4) weights = twice + lane;
        sum[b][v] = hn::MulAdd(value, Widen<kKind>(weights), sum[b][v]);
      }
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const float activation_scale = ActivationScale(x, 0, k0 + b * kK);
    for (int v = 0; v < kVectors; ++v) {
      total[v] = hn::MulAdd(
          sum[b][v], BlockScale<kKind>(scales, k0 / kK + b, first_lane + v * kLanes, activation_scale), total[v]);
    }
  }
}

// One row, `kVectors` vectors of one panel, kBlocks blocks at a time.
template <WeightKind kKind, int kVectors, int kBlocks>
HWY_INLINE void RowTimesPanel(const PackedLinear& w, int64_t panel, const ActivationRows& x, float* HWY_RESTRICT out,
                              int first_lane) {
  const D d;
  constexpr int64_t kK = Block<kKind>::kK;
  V total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = hn::Zero(d);
  int64_t k0 = 0;
  for (; k0 + kBlocks * kK <= w.k(); k0 += kBlocks * kK) {
    AddBlocks<kKind, kVectors, kBlocks>(w, panel, x, first_lane, k0, total);
  }
  for (; k0 < w.k(); k0 += kK) AddBlocks<kKind, kVectors, 1>(w, panel, x, first_lane, k0, total);
  for (int v = 0; v < kVectors; ++v) hn::StoreU(total[v], d, out + first_lane + v * kLanes);
}

template <WeightKind kKind>
void OneRow(const PackedLinear& w, int64_t panel, const ActivationRows& x, float* HWY_RESTRICT lanes) {
  const int width = w.panel_width(panel);
  constexpr int kFull = PackedLinear::kPanel / kLanes;
  // Eight accumulators hide the latency of a fused multiply-add; more would spill. Where a panel has fewer vectors,
  // several blocks make up for it; 16 lanes in two vectors do well as they are.
  constexpr int kBlocks = kStripVectors == 1 ? 4 : 1;
  if constexpr (kFull <= 8) {
    if (width == PackedLinear::kPanel)
      return RowTimesPanel < kKind, kFull, kFull == 4 ? 2 : 1 > (w, panel, x, lanes, 0);
  }
  if constexpr (kStripVectors == 1) {
    if (width == 2 * kStrip) return RowTimesPanel<kKind, 2, kBlocks>(w, panel, x, lanes, 0);
  }
  for (int lane = 0; lane < width; lane += kStrip) {
    RowTimesPanel<kKind, kStripVectors, kBlocks>(w, panel, x, lanes, lane);
  }
}

// kRows rows times one widened strip [block][kStrip], added to totals [kRows][kPanel].
template <WeightKind kKind, int kRows>
HWY_INLINE void RowsTimesStrip(const float* HWY_RESTRICT strip, int64_t k0, int64_t len,
                               const float* HWY_RESTRICT scales, int lane, const ActivationRows& x, int64_t row,
                               float* HWY_RESTRICT totals) {
  const D d;
  V sum[kRows][kStripVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kStripVectors; ++v) sum[r][v] = hn::Zero(d);
  }
  for (int64_t i = 0; i < len; ++i) {
    V weight[kStripVectors];
    for (int v = 0; v < kStripVectors; ++v) weight[v] = hn::Load(d, strip + i * kStrip + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const V value = hn::Set(d, x.values[(row + r) * x.ld + k0 + i]);
      for (int v = 0; v < kStripVectors; ++v) sum[r][v] = hn::MulAdd(value, weight[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float activation_scale = ActivationScale(x, row + r, k0);
    for (int v = 0; v < kStripVectors; ++v) {
      float* at = totals + r * PackedLinear::kPanel + lane + v * kLanes;
      const V scale = BlockScale<kKind>(scales, k0 / Block<kKind>::kK, lane + v * kLanes, activation_scale);
      hn::StoreU(hn::MulAdd(sum[r][v], scale, hn::LoadU(d, at)), d, at);
    }
  }
}

// Rows `row` to `m` in tiles of kRows, what is left in smaller ones.
template <WeightKind kKind, int kRows>
HWY_INLINE void RowTiles(const float* HWY_RESTRICT strip, int64_t k0, int64_t len, const float* HWY_RESTRICT scales,
                         int lane, const ActivationRows& x, int64_t row, int64_t m, float* HWY_RESTRICT totals) {
  for (; row + kRows <= m; row += kRows) {
    RowsTimesStrip<kKind, kRows>(strip, k0, len, scales, lane, x, row, totals + row * PackedLinear::kPanel);
  }
  if constexpr (kRows > 1) RowTiles<kKind, kRows / 2>(strip, k0, len, scales, lane, x, row, m, totals);
}

// All rows times one panel; totals [m][kPanel] must be zero.
template <WeightKind kKind>
void ManyRows(const PackedLinear& w, int64_t panel, const ActivationRows& x, int64_t m, float* HWY_RESTRICT totals) {
  const D d;
  HWY_ALIGN float strip[Block<kKind>::kK * kStrip];
  const uint8_t* data = w.panel_data(panel);
  const float* scales = w.panel_scales(panel);
  const int width = w.panel_width(panel);
  const V input = hn::Set(d, Block<kKind>::kInput);
  const int64_t row_bytes = static_cast<int64_t>(width) * Block<kKind>::kBits / 8;
  for (int64_t k0 = 0; k0 < w.k(); k0 += Block<kKind>::kK) {
    const int64_t len = std::min<int64_t>(w.k() - k0, Block<kKind>::kK);
    HWY_ALIGN int8_t twice[kKind == WeightKind::kFp4 ? Block<kKind>::kK * PackedLinear::kPanel : 1];
    if constexpr (kKind == WeightKind::kFp4) {
      for (int64_t i = 0; i < len; ++i) ExpandFp4(data + (k0 + i) * row_bytes, twice + i * PackedLinear::kPanel);
    }
    for (int lane = 0; lane < width; lane += kStrip) {
      for (int64_t i = 0; i < len; ++i) {
        for (int v = 0; v < kStripVectors; ++v) {
          const void* weights = data + (k0 + i) * row_bytes + (lane + v * kLanes) * Block<kKind>::kBits / 8;
          if constexpr (kKind == WeightKind::kFp4) weights = twice + i * PackedLinear::kPanel + lane + v * kLanes;
          hn::Store(hn::Mul(Widen<kKind>(weights), input), d, strip + i * kStrip + v * kLanes);
        }
      }
      RowTiles<kKind, kRowTile>(strip, k0, len, scales, lane, x, 0, m, totals);
    }
  }
}

template <WeightKind kKind>
void PanelProduct(const PackedLinear& w, int64_t panel, const ActivationRows& x, int64_t m, float* out,
                  int64_t out_ld) {
  const int64_t first = panel * PackedLinear::kPanel;
  const int64_t used = std::min<int64_t>(PackedLinear::kPanel, w.n() - first);
  if (m == 1) {
    HWY_ALIGN float lanes[PackedLinear::kPanel];
    OneRow<kKind>(w, panel, x, lanes);
    std::copy_n(lanes, used, out + first);
    return;
  }
  thread_local std::vector<float> totals;
  totals.assign(m * PackedLinear::kPanel, 0.0f);
  ManyRows<kKind>(w, panel, x, m, totals.data());
  for (int64_t r = 0; r < m; ++r) std::copy_n(totals.data() + r * PackedLinear::kPanel, used, out + r * out_ld + first);
}

void PanelProductAny(const PackedLinear& w, int64_t panel, const ActivationRows& x, int64_t m, float* out,
                     int64_t out_ld) {
  switch (w.kind()) {
    case WeightKind::kF32:
      return PanelProduct<WeightKind::kF32>(w, panel, x, m, out, out_ld);
    case WeightKind::kBf16:
      return PanelProduct<WeightKind::kBf16>(w, panel, x, m, out, out_ld);
    case WeightKind::kFp8:
      return PanelProduct<WeightKind::kFp8>(w, panel, x, m, out, out_ld);
    case WeightKind::kFp4:
      return PanelProduct<WeightKind::kFp4>(w, panel, x, m, out, out_ld);
  }
}

// Rounds to E4M3 code values: to 3 mantissa bits in the normal range, to steps of 2^-9 below 2^-6; |x| <= 448 after the
// clamp. Same values as DecodeE4m3(EncodeE4m3(x)).
void QuantiseGroup(const float* x, int64_t n, float inv_scale, float* codes) {
  const D d;
  const hn::Rebind<uint32_t, D> du;
  const auto one = [&](V value) HWY_ATTR {
    const V scaled = hn::Mul(value, hn::Set(d, inv_scale));
    const V magnitude = hn::Min(hn::Abs(scaled), hn::Set(d, 448.0f));
    const auto bits = hn::BitCast(du, magnitude);
    const auto lsb = hn::And(hn::ShiftRight<20>(bits), hn::Set(du, 1u));
    const auto rounded = hn::And(hn::Add(bits, hn::Add(lsb, hn::Set(du, 0x7ffffu))), hn::Set(du, 0xfff00000u));
    const V small = hn::Sub(hn::Add(magnitude, hn::Set(d, 0x1p14f)), hn::Set(d, 0x1p14f));
    const V result = hn::IfThenElse(hn::Lt(magnitude, hn::Set(d, 0x1p-6f)), small, hn::BitCast(d, rounded));
    return hn::CopySign(result, scaled);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(one(hn::LoadU(d, x + i)), d, codes + i);
  for (; i < n; ++i) {
    float lane[kLanes] = {x[i]};
    hn::StoreU(one(hn::LoadU(d, lane)), d, lane);
    codes[i] = lane[0];
  }
}

float AbsMax(const float* x, int64_t n) {
  const D d;
  V best = hn::Zero(d);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) best = hn::Max(best, hn::Abs(hn::LoadU(d, x + i)));
  float result = hn::GetLane(hn::MaxOfLanes(d, best));
  for (; i < n; ++i) result = std::max(result, std::abs(x[i]));
  return result;
}

}  // namespace HWY_NAMESPACE
}  // namespace millrace
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "engine/ops/matmul_amx.h"
#include "engine/ops/rounding.h"

namespace millrace {
HWY_EXPORT(PanelProductAny);
HWY_EXPORT(QuantiseGroup);
HWY_EXPORT(AbsMax);

void MatMul(const PackedLinear& w, const ActivationRows& x, int64_t m, float* out, int64_t out_ld, ThreadPool& pool) {
  if (m == 0) return;
  const int64_t panels = w.num_panels();
  if (x.bf16 && AmxTakes(w) && AmxAvailable()) {
    // Widened weights serve all rows of a strip, whose inputs stay in the second-level cache.
    constexpr int64_t kRowStrip = 512;
    const uint16_t* narrow = x.narrow;
    static thread_local std::vector<uint16_t> rows;
    if (narrow == nullptr) {
      rows.resize(std::max<size_t>(rows.size(), m * w.k()));
      NarrowRows(x, m, w.k(), rows.data());
      narrow = rows.data();
    }
    // Tiles are configured once per group of panels; one group per thread and strip would leave threads waiting.
    const int64_t groups = std::min<int64_t>(panels, pool.num_threads() == 1 ? 1 : 4 * pool.num_threads());
    pool.For(groups * ((m + kRowStrip - 1) / kRowStrip), [&](int64_t i) {
      const int64_t group = i % groups, row = i / groups * kRowStrip;
      AmxProduct(w, panels * group / groups, panels * (group + 1) / groups, narrow + row * w.k(),
                 std::min(kRowStrip, m - row), out + row * out_ld, out_ld);
    });
    return;
  }
  // Rows go through in strips that keep the activations in cache; the split changes no sum.
  constexpr int64_t kRowStrip = 96;
  pool.For(panels * ((m + kRowStrip - 1) / kRowStrip), [&](int64_t i) {
    const int64_t panel = i % panels, row = i / panels * kRowStrip;
    ActivationRows part = x;
    part.values += row * x.ld;
    if (part.scales != nullptr) part.scales += row * x.scales_ld;
    HWY_DYNAMIC_DISPATCH(PanelProductAny)(w, panel, part, std::min(kRowStrip, m - row), out + row * out_ld, out_ld);
  });
}

void QuantiseActivations(const float* x, int64_t k, int group, float* codes, float* scales) {
  for (int64_t i = 0; i < k; i += group) {
    const int64_t n = std::min<int64_t>(group, k - i);
    const int exponent = ActQuantScale(HWY_DYNAMIC_DISPATCH(AbsMax)(x + i, n));
    scales[i / group] = PowerOfTwo(exponent);
    HWY_DYNAMIC_DISPATCH(QuantiseGroup)(x + i, n, PowerOfTwo(-exponent), codes + i);
  }
}

}  // namespace millrace
#endif  // HWY_ONCE
