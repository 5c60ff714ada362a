// SPDX-License-Identifier: Apache-2.0
// The product of packed_linear.h, with Highway's run-time dispatch.
//
// One row streams the panel and widens weights in registers; more rows widen strips of 16 lanes once into L1 and run
// over them. Both do the same fused multiply-adds in the same order for each output, so a row's bits do not depend on
// how many rows there are. FP8 codes are widened the cheapest way there is, which leaves out a power of two that the
// block's scale puts back exactly.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/ops/matmul_cpu.cc"
#include <hwy/foreach_target.h>
// Highway's per-target sections follow.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <algorithm>

#include "engine/ops/packed_linear.h"
#include "engine/ops/rounding.h"
#include "engine/ops/widen_cpu-inl.h"

HWY_BEFORE_NAMESPACE();
namespace millrace {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kStrip = 16;                      // lanes that a tile of rows meets at a time
constexpr int kStripVectors = kStrip / kLanes;  // 1, 2 or 4
// Sums in flight: enough to hide a multiply-add's latency, few enough to stay in registers.
constexpr int kRowTile = kStripVectors == 1 ? 12 : 6;

template <WeightKind kKind>
struct Block {
  static constexpr int kK = kKind == WeightKind::kFp8 ? 128 : 32;
  // What Widen and kInput leave out.
  static constexpr float kWidened = kKind == WeightKind::kFp8 ? 0x1p60f : 1.0f;
  // What an input is multiplied by before it meets a widened weight.
  static constexpr float kInput = kKind == WeightKind::kFp8 ? 0x1p60f : 1.0f;
  static constexpr int kBits = kKind == WeightKind::kF32    ? 32
                               : kKind == WeightKind::kBf16 ? 16
                               : kKind == WeightKind::kFp8  ? 8
                                                            : 4;
};

// Where the outputs of a panel stand in vectors. One vector of stored weights of a full panel becomes kUnit vectors of
// F32 by interleaving with zeros inside blocks of 128 bits, which costs a fraction of what moving weights across blocks
// would: vector v of a unit then holds, four to a block, the outputs from 4 v on, 4 kUnit outputs apart. Panels that
// are not full, and processors without such blocks, take one vector after the other in order.
template <WeightKind kKind, bool kFull>
struct Form {
  static constexpr bool kBlocks = kFull && kLanes >= 4;
  static constexpr int kUnit = !kBlocks ? 1 : kKind == WeightKind::kF32 ? 1 : kKind == WeightKind::kBf16 ? 2 : 4;
  static constexpr int kStride = 4 * kUnit;
  // First output of vector `v` of a panel.
  static constexpr int First(int v) { return v / kUnit * kUnit * kLanes + v % kUnit * 4; }
};

#if HWY_TARGET != HWY_SCALAR
// FP4 codes of as many outputs from `lane` on as a vector has bytes; a panel keeps outputs 0 .. 31 in the low nibbles.
HWY_INLINE hn::Vec<D8> Nibbles(const uint8_t* pairs, int lane) {
  const D8 d8;
  const auto high = [](auto d, auto pair) HWY_ATTR {
    const hn::RepartitionToWide<decltype(d)> wide;
    return hn::BitCast(d, hn::ShiftRight<4>(hn::BitCast(wide, pair)));
  };
  hn::Vec<D8> codes;
  if constexpr (kLanes == 16) {
    const hn::Half<D8> half;
    const auto pair = hn::LoadU(half, pairs);
    codes = hn::Combine(d8, high(half, pair), pair);
  } else {
    codes = hn::LoadU(d8, pairs + lane % 32);
    if (lane >= 32) codes = high(d8, codes);
  }
  return hn::And(codes, hn::Set(d8, 15));
}
#endif

// Widens a unit of weights, outputs from `lane` on, of one input whose weights are `row`. E4M3 becomes the F32 whose
// exponent field is the code's own: 2^120 too small, the code's subnormals being exact subnormals of F32.
template <WeightKind kKind, bool kFull>
HWY_INLINE void Widen(const uint8_t* row, int lane, V* out) {
  const D d;
  if constexpr (kKind == WeightKind::kF32) {
    out[0] = hn::LoadU(d, reinterpret_cast<const float*>(row) + lane);
  } else if constexpr (!Form<kKind, kFull>::kBlocks) {
    const hn::Rebind<int32_t, D> di;
    if constexpr (kKind == WeightKind::kBf16) {
      const hn::Rebind<uint16_t, D> d16;
      const hn::Rebind<uint32_t, D> d32;
      const auto raw = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(row) + lane);
      out[0] = hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, raw)));
    } else if constexpr (kKind == WeightKind::kFp8) {
      const hn::Rebind<int8_t, D> d8;
      const auto raw = hn::PromoteTo(di, hn::LoadU(d8, reinterpret_cast<const int8_t*>(row) + lane));
      out[0] = hn::BitCast(d, hn::And(hn::ShiftLeft<20>(raw), hn::Set(di, static_cast<int32_t>(0x87f00000u))));
    } else {
      alignas(64) float values[kLanes];
      for (int i = 0; i < kLanes; ++i) values[i] = DecodeE2m1(row[(lane + i) % 32] >> (lane + i >= 32 ? 4 : 0));
      out[0] = hn::LoadU(d, values);
    }
#if HWY_TARGET != HWY_SCALAR
  } else if constexpr (kKind == WeightKind::kBf16) {
    WidenWords(hn::LoadU(D16(), reinterpret_cast<const uint16_t*>(row) + lane), out);
  } else if constexpr (kKind == WeightKind::kFp8) {
    WidenFp8(hn::LoadU(D8(), row + lane), out);
  } else {
    const D8 d8;
    const D16 d16;
    alignas(16) static constexpr uint8_t kLow[16] = {0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0,
                                                     0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0};
    alignas(16) static constexpr uint8_t kHigh[16] = {0,    0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                                      0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
    const auto codes = Nibbles(row, lane);
    const auto low = hn::TableLookupBytes(hn::LoadDup128(d8, kLow), codes);
    const auto high = hn::TableLookupBytes(hn::LoadDup128(d8, kHigh), codes);
    WidenWords(hn::BitCast(d16, hn::InterleaveLower(d8, low, high)), out);
    WidenWords(hn::BitCast(d16, hn::InterleaveUpper(d8, low, high)), out + 2);
#endif
  }
}

// What a block's sum is multiplied by, for vector `v` of the panel.
template <WeightKind kKind, bool kFull>
HWY_INLINE V BlockScale(const float* HWY_RESTRICT scales, int64_t block, int v, float activation_scale) {
  const D d;
  const V s = hn::Set(d, activation_scale * Block<kKind>::kWidened);
  if constexpr (kKind == WeightKind::kFp8) return hn::Mul(s, hn::Set(d, scales[block]));
  if constexpr (kKind == WeightKind::kFp4) {
    using F = Form<kKind, kFull>;
    return hn::Mul(s, LoadBlocks(d, scales + block * PackedLinear::kPanel + F::First(v), F::kStride));
  }
  return s;
}

HWY_INLINE float ActivationScale(const ActivationRows& x, int64_t row, int64_t k0) {
  return x.scales == nullptr ? 1.0f : x.scales[row * x.scales_ld + k0 / 128];
}

// Where a panel's weights and scales lie.
template <WeightKind kKind>
struct Panel {
  Panel(const PackedLinear& w, int64_t panel)
      : data(w.panel_data(panel)),
        scales(w.panel_scales(panel)),
        k(w.k()),
        width(w.panel_width(panel)),
        row_bytes(static_cast<int64_t>(width) * Block<kKind>::kBits / 8) {}
  const uint8_t* data;
  const float* scales;
  int64_t k;
  int width;
  int64_t row_bytes;
};

// Adds kBlocks blocks from input k0 on, summed side by side and added in order, to the totals of one row: kVectors
// vectors of one panel from `first` on. A function of its own so that totals are in memory while it sums: in registers
// there is no room for both.
template <WeightKind kKind, bool kFull, int kVectors, int kBlocks>
HWY_NOINLINE void AddBlocks(const Panel<kKind>& w, const ActivationRows& x, int first, int64_t k0,
                            float* HWY_RESTRICT totals) {
  const D d;
  constexpr int64_t kK = Block<kKind>::kK;
  constexpr int kUnit = Form<kKind, kFull>::kUnit;
  static_assert(kVectors % kUnit == 0);
  const uint8_t* HWY_RESTRICT data = w.data + k0 * w.row_bytes;
  const int64_t row_bytes = kFull ? PackedLinear::kPanel * Block<kKind>::kBits / 8 : w.row_bytes;
  const int64_t len = std::min<int64_t>(w.k - k0, kK);
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
      for (int v = 0; v < kVectors; v += kUnit) {
        V weight[kUnit];
        Widen<kKind, kFull>(at, (first + v) * kLanes, weight);
        for (int u = 0; u < kUnit; ++u) sum[b][v + u] = hn::MulAdd(value, weight[u], sum[b][v + u]);
      }
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const float activation_scale = ActivationScale(x, 0, k0 + b * kK);
    for (int v = 0; v < kVectors; ++v) {
      const V scale = BlockScale<kKind, kFull>(w.scales, k0 / kK + b, first + v, activation_scale);
      hn::Store(hn::MulAdd(sum[b][v], scale, hn::Load(d, totals + v * kLanes)), d, totals + v * kLanes);
    }
  }
}

// One row, `kVectors` vectors of one panel, kBlocks blocks at a time.
template <WeightKind kKind, bool kFull, int kVectors, int kBlocks>
HWY_INLINE void RowTimesPanel(const Panel<kKind>& w, const ActivationRows& x, int first, float* HWY_RESTRICT out) {
  const D d;
  constexpr int64_t kK = Block<kKind>::kK;
  HWY_ALIGN float totals[kVectors * kLanes] = {};
  int64_t k0 = 0;
  for (; k0 + kBlocks * kK <= w.k; k0 += kBlocks * kK) {
    AddBlocks<kKind, kFull, kVectors, kBlocks>(w, x, first, k0, totals);
  }
  for (; k0 < w.k; k0 += kK) AddBlocks<kKind, kFull, kVectors, 1>(w, x, first, k0, totals);
  using F = Form<kKind, kFull>;
  for (int v = 0; v < kVectors; ++v)
    StoreBlocks(d, hn::Load(d, totals + v * kLanes), out + F::First(first + v), F::kStride);
}

// One row times one panel, outputs in order.
template <WeightKind kKind>
void OneRow(const Panel<kKind>& w, const ActivationRows& x, float* HWY_RESTRICT out) {
  constexpr int kPanelVectors = PackedLinear::kPanel / kLanes;
  // Eight sums hide the latency of a fused multiply-add; more would spill. Where a panel has fewer vectors, several
  // blocks side by side make up for it.
  if (w.width == PackedLinear::kPanel) {
    if constexpr (kPanelVectors <= 8) {
      RowTimesPanel<kKind, true, kPanelVectors, 8 / kPanelVectors>(w, x, 0, out);
    } else {
      for (int v = 0; v < kPanelVectors; v += kStripVectors) RowTimesPanel<kKind, true, kStripVectors, 1>(w, x, v, out);
    }
    return;
  }
  int v = 0;
  if constexpr (kStripVectors <= 2) {
    constexpr int kTwo = 2 * kStripVectors;
    if (w.width >= 2 * kStrip) {
      RowTimesPanel<kKind, false, kTwo, 8 / kTwo>(w, x, 0, out);
      v = kTwo;
    }
  }
  for (; v < w.width / kLanes; v += kStripVectors) {
    RowTimesPanel<kKind, false, kStripVectors, std::clamp(8 / kStripVectors, 1, 4)>(w, x, v, out);
  }
}

// kRows rows times one widened strip [block][kStrip], vectors `first` and on of the panel, added to totals
// [kRows][kPanel].
template <WeightKind kKind, bool kFull, int kRows>
HWY_INLINE void RowsTimesStrip(const float* HWY_RESTRICT strip, int64_t k0, int64_t len,
                               const float* HWY_RESTRICT scales, int first, const ActivationRows& x, int64_t row,
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
      float* at = totals + r * PackedLinear::kPanel + (first + v) * kLanes;
      const V scale = BlockScale<kKind, kFull>(scales, k0 / Block<kKind>::kK, first + v, activation_scale);
      hn::StoreU(hn::MulAdd(sum[r][v], scale, hn::LoadU(d, at)), d, at);
    }
  }
}

// `rows` rows, at most kRows, in one tile.
template <WeightKind kKind, bool kFull, int kRows>
HWY_INLINE void RowTile(int64_t rows, const float* HWY_RESTRICT strip, int64_t k0, int64_t len,
                        const float* HWY_RESTRICT scales, int first, const ActivationRows& x, int64_t row,
                        float* HWY_RESTRICT totals) {
  if (kRows == 1 || rows == kRows) {
    RowsTimesStrip<kKind, kFull, kRows>(strip, k0, len, scales, first, x, row, totals);
  } else if constexpr (kRows > 1) {
    RowTile<kKind, kFull, kRows - 1>(rows, strip, k0, len, scales, first, x, row, totals);
  }
}

// All rows times one panel; totals [m][kPanel] must be zero, and stand in the order of Form.
template <WeightKind kKind, bool kFull>
void ManyRows(const Panel<kKind>& w, const ActivationRows& x, int64_t m, float* HWY_RESTRICT totals) {
  const D d;
  constexpr int kUnit = Form<kKind, kFull>::kUnit;
  // Vectors widened together: whole units and whole strips.
  constexpr int kGroup = std::max(kUnit, kStripVectors), kStrips = kGroup / kStripVectors;
  constexpr int64_t kK = Block<kKind>::kK;
  HWY_ALIGN float strips[kStrips][kK * kStrip];
  const V input = hn::Set(d, Block<kKind>::kInput);
  for (int64_t k0 = 0; k0 < w.k; k0 += kK) {
    const int64_t len = std::min<int64_t>(w.k - k0, kK);
    for (int first = 0; first < w.width / kLanes; first += kGroup) {
      for (int64_t i = 0; i < len; ++i) {
        V weight[kGroup];
        for (int v = 0; v < kGroup; v += kUnit) {
          Widen<kKind, kFull>(w.data + (k0 + i) * w.row_bytes, (first + v) * kLanes, weight + v);
        }
        for (int v = 0; v < kGroup; ++v) {
          float* at = strips[v / kStripVectors] + i * kStrip + v % kStripVectors * kLanes;
          hn::Store(Block<kKind>::kInput == 1.0f ? weight[v] : hn::Mul(weight[v], input), d, at);
        }
      }
      for (int s = 0; s < kStrips; ++s) {
        // A tile of few rows waits for its own sums: the last two share what is left.
        for (int64_t row = 0, rows; row < m; row += rows) {
          const int64_t left = m - row;
          rows = left <= kRowTile ? left : left < 2 * kRowTile ? (left + 1) / 2 : kRowTile;
          RowTile<kKind, kFull, kRowTile>(rows, strips[s], k0, len, w.scales, first + s * kStripVectors, x, row,
                                          totals + row * PackedLinear::kPanel);
        }
      }
    }
  }
}

template <WeightKind kKind, bool kFull>
void ManyRowsInOrder(const Panel<kKind>& w, const ActivationRows& x, int64_t m, int64_t used, float* out,
                     int64_t out_ld) {
  const D d;
  using F = Form<kKind, kFull>;
  thread_local std::vector<float> totals;
  totals.assign(m * PackedLinear::kPanel, 0.0f);
  ManyRows<kKind, kFull>(w, x, m, totals.data());
  for (int64_t r = 0; r < m; ++r) {
    const float* from = totals.data() + r * PackedLinear::kPanel;
    HWY_ALIGN float lanes[PackedLinear::kPanel];
    const bool whole = used == PackedLinear::kPanel;  // outputs that do not exist must not be written
    float* to = whole ? out + r * out_ld : lanes;
    for (int v = 0; v < w.width / kLanes; ++v) {
      StoreBlocks(d, hn::LoadU(d, from + v * kLanes), to + F::First(v), F::kStride);
    }
    if (!whole) std::copy_n(lanes, used, out + r * out_ld);
  }
}

template <WeightKind kKind>
void PanelProduct(const PackedLinear& weight, int64_t panel, const ActivationRows& x, int64_t m, float* out,
                  int64_t out_ld) {
  const Panel<kKind> w(weight, panel);
  const int64_t first = panel * PackedLinear::kPanel;
  const int64_t used = std::min<int64_t>(PackedLinear::kPanel, weight.n() - first);
  out += first;
  if (m > 1) {
    if (w.width == PackedLinear::kPanel) return ManyRowsInOrder<kKind, true>(w, x, m, used, out, out_ld);
    return ManyRowsInOrder<kKind, false>(w, x, m, used, out, out_ld);
  }
  if (used == PackedLinear::kPanel) return OneRow<kKind>(w, x, out);
  HWY_ALIGN float lanes[PackedLinear::kPanel];
  OneRow<kKind>(w, x, lanes);
  std::copy_n(lanes, used, out);
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
