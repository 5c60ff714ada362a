// SPDX-License-Identifier: Apache-2.0
// The loops of vector_cpu.h in Highway. Every function has one order of summation per instruction set: four partial
// vectors where it sums along a row, none where it sums along keys or streams.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/ops/vector_cpu.cc"
#include <hwy/foreach_target.h>
// Highway's per-target sections follow.
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/ops/rounding.h"
#include "engine/ops/vector_cpu.h"
#include "engine/ops/widen_cpu-inl.h"

HWY_BEFORE_NAMESPACE();
namespace millrace::vec {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace millrace::HWY_NAMESPACE;  // widen_cpu-inl.h

HWY_INLINE V RoundVector(V x) {
  const D d;
  const hn::Rebind<uint32_t, D> du;
  const auto bits = hn::BitCast(du, x);
  const auto lsb = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const auto rounded = hn::And(hn::Add(bits, hn::Add(lsb, hn::Set(du, 0x7fffu))), hn::Set(du, 0xffff0000u));
  // NaN must stay NaN: adding could carry its mantissa away.
  return hn::IfThenElse(hn::IsNaN(x), x, hn::BitCast(d, rounded));
}

float SumSquaresV(const float* HWY_RESTRICT x, int64_t n) {
  const D d;
  V s[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int v = 0; v < 4; ++v) {
      const V a = hn::LoadU(d, x + i + v * kLanes);
      s[v] = hn::MulAdd(a, a, s[v]);
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    const V a = hn::LoadU(d, x + i);
    s[0] = hn::MulAdd(a, a, s[0]);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s[0], s[1]), hn::Add(s[2], s[3]))));
  for (; i < n; ++i) total = std::fma(x[i], x[i], total);
  return total;
}

void ScaleV(const float* x, float scale, int64_t n, float* y) {
  const D d;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::Set(d, scale)), d, y + i);
  for (; i < n; ++i) y[i] = x[i] * scale;
}

// Runs `body(vector index)` over whole vectors and once over a padded tail through a small buffer is not worth it here:
// every row the model has is a multiple of 16, so tails go element by element through the same vector code.
template <typename Body>
HWY_INLINE void ForVectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

HWY_INLINE V LoadSome(const float* p, int64_t count) {
  const D d;
  if (count == kLanes) return hn::LoadU(d, p);
  HWY_ALIGN float lanes[kLanes] = {};
  for (int64_t j = 0; j < count; ++j) lanes[j] = p[j];
  return hn::Load(d, lanes);
}

HWY_INLINE void StoreSome(V v, float* p, int64_t count) {
  const D d;
  if (count == kLanes) return hn::StoreU(v, d, p);
  HWY_ALIGN float lanes[kLanes];
  hn::Store(v, d, lanes);
  for (int64_t j = 0; j < count; ++j) p[j] = lanes[j];
}

void RoundBf16V(float* y, int64_t n) {
  ForVectors(n, [&](int64_t i, int64_t c) HWY_ATTR { StoreSome(RoundVector(LoadSome(y + i, c)), y + i, c); });
}

void ScaleWeightedV(const float* x, float scale, const float* w, int64_t n, bool round, float* out) {
  const D d;
  ForVectors(n, [&](int64_t i, int64_t c) HWY_ATTR {
    V v = hn::Mul(LoadSome(x + i, c), hn::Set(d, scale));
    if (w != nullptr) v = hn::Mul(v, LoadSome(w + i, c));
    StoreSome(round ? RoundVector(v) : v, out + i, c);
  });
}

void RotatePairsV(float* x, const float* cos, const float* sin, float sign, bool round) {
  const D d;
  for (int64_t i = 0; i < 32; i += kLanes) {
    V a, b;
    hn::LoadInterleaved2(d, x + 2 * i, a, b);
    const V c = hn::LoadU(d, cos + i), s = hn::Mul(hn::LoadU(d, sin + i), hn::Set(d, sign));
    // Products rounded on their own, as in the reference: near-ties decide BF16 values.
    const V x0 = hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), x1 = hn::Add(hn::Mul(a, s), hn::Mul(b, c));
    hn::StoreInterleaved2(round ? RoundVector(x0) : x0, round ? RoundVector(x1) : x1, d, x + 2 * i);
  }
}

void EncodeE4m3ValuesV(const float* x, int64_t n, uint8_t* codes) {
  const D d;
  const hn::Rebind<int32_t, D> di;
  const hn::Rebind<uint8_t, D> d8;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const V v = hn::LoadU(d, x + i), magnitude = hn::Abs(v);
    const auto sign = hn::And(hn::ShiftRight<24>(hn::BitCast(di, v)), hn::Set(di, 0x80));
    const auto normal = hn::Sub(hn::ShiftRight<20>(hn::BitCast(di, magnitude)), hn::Set(di, (127 - 7) << 3));
    const auto subnormal = hn::ConvertTo(di, hn::Mul(magnitude, hn::Set(d, 0x1p9f)));
    const auto is_small = hn::RebindMask(di, hn::Lt(magnitude, hn::Set(d, 0x1p-6f)));
    hn::StoreU(hn::DemoteTo(d8, hn::Or(sign, hn::IfThenElse(is_small, subnormal, normal))), d8, codes + i);
  }
  for (; i < n; ++i) codes[i] = EncodeE4m3(x[i]);
}

// kHeads queries against kKeys keys: one partial vector each, enough of them in flight to hide a multiply-add's
// latency.
template <int kHeads, int kKeys>
HWY_INLINE void DotSome(const float* HWY_RESTRICT q, const float* const* keys, int64_t n, float scale,
                        float* HWY_RESTRICT logits, int64_t ld) {
  const D d;
  V s[kHeads][kKeys];
  for (int h = 0; h < kHeads; ++h) {
    for (int j = 0; j < kKeys; ++j) s[h][j] = hn::Zero(d);
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    V key[kKeys];
    for (int j = 0; j < kKeys; ++j) key[j] = hn::LoadU(d, keys[j] + i);
    for (int h = 0; h < kHeads; ++h) {
      const V query = hn::LoadU(d, q + h * n + i);
      for (int j = 0; j < kKeys; ++j) s[h][j] = hn::MulAdd(query, key[j], s[h][j]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int j = 0; j < kKeys; ++j) logits[h * ld + j] = scale * hn::GetLane(hn::SumOfLanes(d, s[h][j]));
  }
}

template <int kKeys>
HWY_INLINE void DotKeys(const float* q, int heads, const float* const* keys, int64_t n, float scale, float* logits,
                        int64_t ld) {
  int h = 0;
  for (; h + 4 <= heads; h += 4) DotSome<4, kKeys>(q + h * n, keys, n, scale, logits + h * ld, ld);
  for (; h < heads; ++h) DotSome<1, kKeys>(q + h * n, keys, n, scale, logits + h * ld, ld);
}

void DotHeadsV(const float* q, int heads, const float* const* keys, int num_keys, int64_t n, float scale, float* logits,
               int64_t ld) {
  int j = 0;
  for (; j + 2 <= num_keys; j += 2) DotKeys<2>(q, heads, keys + j, n, scale, logits + j, ld);
  for (; j < num_keys; ++j) DotKeys<1>(q, heads, keys + j, n, scale, logits + j, ld);
}

// Sums of kHeads rows in ascending order: side by side, so that additions need not wait for each other.
template <int kHeads>
HWY_INLINE void SumRows(const float* HWY_RESTRICT rows, int64_t ld, int n, float* HWY_RESTRICT sum) {
  float s[kHeads] = {};
  for (int j = 0; j < n; ++j) {
    for (int h = 0; h < kHeads; ++h) s[h] += rows[h * ld + j];
  }
  for (int h = 0; h < kHeads; ++h) sum[h] = s[h];
}

void SoftmaxV(float* logits, int64_t ld, int heads, int n, bool round, float* max, float* sum) {
  const D d;
  const V floor = hn::Set(d, -87.0f);
  for (int h = 0; h < heads; ++h) {
    float* row = logits + h * ld;
    V best = hn::Set(d, row[0]);
    ForVectors(n, [&](int64_t i, int64_t c) HWY_ATTR {
      if (c == kLanes) {
        best = hn::Max(best, hn::LoadU(d, row + i));
      } else {
        for (int64_t j = i; j < i + c; ++j) best = hn::Max(best, hn::Set(d, row[j]));
      }
    });
    max[h] = hn::GetLane(hn::MaxOfLanes(d, best));
    ForVectors(n, [&](int64_t i, int64_t c) HWY_ATTR {
      const V x = hn::Sub(LoadSome(row + i, c), hn::Set(d, max[h]));
      // Far below, Exp would meet -inf; its true value rounds to 0 there anyway.
      const V e = hn::IfThenElseZero(hn::Gt(x, floor), hn::Exp(d, hn::Max(x, floor)));
      StoreSome(e, row + i, c);
    });
  }
  int h = 0;
  for (; h + 4 <= heads; h += 4) SumRows<4>(logits + h * ld, ld, n, sum + h);
  for (; h < heads; ++h) SumRows<1>(logits + h * ld, ld, n, sum + h);
  if (!round) return;
  for (h = 0; h < heads; ++h) RoundBf16V(logits + h * ld, n);
}

void DivideV(const float* x, float z, int64_t n, bool round, float* out) {
  const D d;
  ForVectors(n, [&](int64_t i, int64_t c) HWY_ATTR {
    const V v = hn::Div(LoadSome(x + i, c), hn::Set(d, z));
    StoreSome(round ? RoundVector(v) : v, out + i, c);
  });
}

// Adds kKeys keys, in order, to kHeads sums that stay in memory: keys are read once, from start to end.
template <int kHeads, int kKeys>
HWY_INLINE void AccumulateSome(const float* HWY_RESTRICT p, int64_t ld_p, const float* const* keys, int64_t dim,
                               float* HWY_RESTRICT o) {
  const D d;
  constexpr int kWidth = 2;
  for (int64_t i = 0; i < dim; i += kWidth * kLanes) {
    V s[kHeads][kWidth];
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kWidth; ++v) s[h][v] = hn::LoadU(d, o + h * dim + i + v * kLanes);
    }
    for (int j = 0; j < kKeys; ++j) {
      V k[kWidth];
      for (int v = 0; v < kWidth; ++v) k[v] = hn::LoadU(d, keys[j] + i + v * kLanes);
      for (int h = 0; h < kHeads; ++h) {
        const V weight = hn::Set(d, p[h * ld_p + j]);
        for (int v = 0; v < kWidth; ++v) s[h][v] = hn::MulAdd(weight, k[v], s[h][v]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kWidth; ++v) hn::StoreU(s[h][v], d, o + h * dim + i + v * kLanes);
    }
  }
}

template <int kHeads>
HWY_INLINE void AccumulateHeads(const float* p, int64_t ld_p, const float* const* keys, int num_keys, int64_t dim,
                                float* o) {
  int j = 0;
  for (; j + 8 <= num_keys; j += 8) AccumulateSome<kHeads, 8>(p + j, ld_p, keys + j, dim, o);
  for (; j < num_keys; ++j) AccumulateSome<kHeads, 1>(p + j, ld_p, keys + j, dim, o);
}

void AccumulateValuesV(const float* p, int64_t ld_p, int heads, const float* const* keys, int num_keys, int64_t dim,
                       float* o) {
  int h = 0;
  for (; h + 4 <= heads; h += 4) AccumulateHeads<4>(p + h * ld_p, ld_p, keys, num_keys, dim, o + h * dim);
  for (; h < heads; ++h) AccumulateHeads<1>(p + h * ld_p, ld_p, keys, num_keys, dim, o + h * dim);
}

void MixStreamsV(const float* streams, const float* pre, int hc, int64_t dim, bool round, float* y) {
  const D d;
  ForVectors(dim, [&](int64_t i, int64_t c) HWY_ATTR {
    V s = hn::Mul(LoadSome(streams + i, c), hn::Set(d, pre[0]));
    for (int j = 1; j < hc; ++j) s = hn::MulAdd(LoadSome(streams + j * dim + i, c), hn::Set(d, pre[j]), s);
    StoreSome(round ? RoundVector(s) : s, y + i, c);
  });
}

void RecombineStreamsV(const float* out, const float* post, const float* comb, int hc, int64_t dim, bool round,
                       float* streams) {
  const D d;
  ForVectors(dim, [&](int64_t i, int64_t c) HWY_ATTR {
    V x[8];
    for (int j = 0; j < hc; ++j) x[j] = LoadSome(streams + j * dim + i, c);
    const V o = LoadSome(out + i, c);
    for (int k = 0; k < hc; ++k) {
      V s = hn::Mul(hn::Set(d, post[k]), o);
      for (int j = 0; j < hc; ++j) s = hn::MulAdd(hn::Set(d, comb[j * hc + k]), x[j], s);
      StoreSome(round ? RoundVector(s) : s, streams + k * dim + i, c);
    }
  });
}

void AddV(const float* x, int64_t n, float* y) {
  ForVectors(
      n, [&](int64_t i, int64_t c) HWY_ATTR { StoreSome(hn::Add(LoadSome(y + i, c), LoadSome(x + i, c)), y + i, c); });
}

void LoadKvEntryV(const uint8_t* body, const uint8_t* scales, int64_t plain, int64_t rope, float* out) {
  const uint8_t* tail = body + plain;
#if HWY_TARGET == HWY_SCALAR
  for (int64_t i = 0; i < plain; ++i) out[i] = DecodeE4m3(body[i]) * DecodeE8m0(scales[i / 64]);
  for (int64_t i = 0; i < rope; ++i) {
    uint16_t bits;
    std::memcpy(&bits, tail + 2 * i, 2);
    out[plain + i] = DecodeBf16(bits);
  }
#else
  const D d;
  V v[4];
  for (int64_t i = 0; i < plain; i += 64) {
    // Codes come 2^120 too small; put back in two steps where one would overflow.
    const float scale = DecodeE8m0(scales[i / 64]);
    const V back = hn::Set(d, 0x1p120f * std::min(scale, 128.0f)), rest = hn::Set(d, scale * 0x1p-7f);
    for (int64_t j = i; j < i + 64; j += 4 * kLanes) {
      WidenFp8(hn::LoadU(D8(), body + j), v);
      for (int u = 0; u < 4; ++u) {
        V value = hn::Mul(v[u], back);
        if (!(scale <= 128)) value = hn::Mul(value, rest);
        StoreBlocks(d, value, out + j + 4 * u, 16);
      }
    }
  }
  for (int64_t i = 0; i < rope; i += 2 * kLanes) {
    WidenWords(hn::BitCast(D16(), hn::LoadU(D8(), tail + 2 * i)), v);
    for (int u = 0; u < 2; ++u) StoreBlocks(d, v[u], out + plain + i + 4 * u, 8);
  }
#endif
}

float IndexScoreV(const float* q, const float* weights, int heads, const float* key) {
  const D d;
  constexpr int kPerGroup = 32 / kLanes;
  V k[128 / kLanes];
  for (int v = 0; v < 128 / kLanes; ++v) k[v] = hn::LoadU(d, key + v * kLanes);
  float score = 0;
  for (int h = 0; h < heads; ++h) {
    float dot = 0;
    for (int g = 0; g < 4; ++g) {
      V s = hn::Zero(d);
      for (int v = 0; v < kPerGroup; ++v) {
        s = hn::MulAdd(hn::LoadU(d, q + h * 128 + g * 32 + v * kLanes), k[g * kPerGroup + v], s);
      }
      dot += hn::GetLane(hn::SumOfLanes(d, s));
    }
    score = std::fma(weights[h], std::max(dot, 0.0f), score);
  }
  return score;
}

void SwiGluRowV(const float* g, const float* p, float weight, float limit, int64_t n, bool round, float* a) {
  const D d;
  const V one = hn::Set(d, 1.0f);
  ForVectors(n, [&](int64_t i, int64_t c) HWY_ATTR {
    const V gate = hn::Min(LoadSome(g + i, c), hn::Set(d, limit));
    const V up = hn::Min(hn::Max(LoadSome(p + i, c), hn::Set(d, -limit)), hn::Set(d, limit));
    const V e = hn::Exp(d, hn::Min(hn::Neg(gate), hn::Set(d, 87.0f)));
    V v = hn::Mul(hn::Div(gate, hn::Add(one, e)), up);
    v = hn::Mul(v, hn::Set(d, weight));
    StoreSome(round ? RoundVector(v) : v, a + i, c);
  });
}

void OnlineSoftmaxStepV(const float* score, const float* kv, int64_t n, float* max, float* sum, float* weighted) {
  const D d;
  const V floor = hn::Set(d, -87.0f);
  const auto exp = [&](V x) HWY_ATTR { return hn::IfThenElseZero(hn::Gt(x, floor), hn::Exp(d, hn::Max(x, floor))); };
  ForVectors(n, [&](int64_t i, int64_t c) HWY_ATTR {
    const V s = LoadSome(score + i, c), old_max = LoadSome(max + i, c);
    const V new_max = hn::Max(s, old_max);
    const V keep = exp(hn::Sub(old_max, new_max)), add = exp(hn::Sub(s, new_max));
    StoreSome(new_max, max + i, c);
    StoreSome(hn::MulAdd(LoadSome(sum + i, c), keep, add), sum + i, c);
    StoreSome(hn::MulAdd(LoadSome(weighted + i, c), keep, hn::Mul(add, LoadSome(kv + i, c))), weighted + i, c);
  });
}

void PoolRowsV(const float* const* score, const float* const* kv, int rows, int64_t n, float* out) {
  const D d;
  const V floor = hn::Set(d, -87.0f);
  ForVectors(n, [&](int64_t i, int64_t c) HWY_ATTR {
    V max = LoadSome(score[0] + i, c);
    for (int r = 1; r < rows; ++r) max = hn::Max(max, LoadSome(score[r] + i, c));
    V sum = hn::Zero(d), total = hn::Zero(d);
    for (int r = 0; r < rows; ++r) {
      const V x = hn::Sub(LoadSome(score[r] + i, c), max);
      const V e = hn::IfThenElseZero(hn::Gt(x, floor), hn::Exp(d, hn::Max(x, floor)));
      sum = hn::Add(sum, e);
      total = hn::MulAdd(e, LoadSome(kv[r] + i, c), total);
    }
    StoreSome(hn::Div(total, sum), out + i, c);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace millrace::vec
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "engine/ops/matmul_amx.h"

namespace millrace::vec {
HWY_EXPORT(SumSquaresV);
HWY_EXPORT(ScaleV);
HWY_EXPORT(RoundBf16V);
HWY_EXPORT(ScaleWeightedV);
HWY_EXPORT(DotHeadsV);
HWY_EXPORT(RotatePairsV);
HWY_EXPORT(EncodeE4m3ValuesV);
HWY_EXPORT(SoftmaxV);
HWY_EXPORT(DivideV);
HWY_EXPORT(AccumulateValuesV);
HWY_EXPORT(MixStreamsV);
HWY_EXPORT(RecombineStreamsV);
HWY_EXPORT(AddV);
HWY_EXPORT(LoadKvEntryV);
HWY_EXPORT(IndexScoreV);
HWY_EXPORT(SwiGluRowV);
HWY_EXPORT(OnlineSoftmaxStepV);
HWY_EXPORT(PoolRowsV);

std::string TargetName() {
  // The best target this processor supports is the one Highway dispatches to.
  const int64_t supported = hwy::SupportedTargets() & HWY_TARGETS;
  return absl::AsciiStrToLower(hwy::TargetName(supported & -supported));
}

// Raised whenever a change of the CPU kernels changes bits.
constexpr int kCpuKernelRevision = 3;

std::string KernelSet() {
  return absl::StrCat("cpu/", TargetName(), AmxAvailable() ? "+amx" : "", "/", kCpuKernelRevision);
}

float SumSquares(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(SumSquaresV)(x, n); }
void Scale(const float* x, float scale, int64_t n, float* y) { HWY_DYNAMIC_DISPATCH(ScaleV)(x, scale, n, y); }
void RoundBf16(float* y, int64_t n) { HWY_DYNAMIC_DISPATCH(RoundBf16V)(y, n); }
void ScaleWeighted(const float* x, float scale, const float* w, int64_t n, bool round, float* out) {
  HWY_DYNAMIC_DISPATCH(ScaleWeightedV)(x, scale, w, n, round, out);
}
void DotHeads(const float* q, int heads, const float* const* keys, int num_keys, int64_t n, float scale, float* logits,
              int64_t ld_logits) {
  HWY_DYNAMIC_DISPATCH(DotHeadsV)(q, heads, keys, num_keys, n, scale, logits, ld_logits);
}
void RotatePairs(float* x, const float* cos, const float* sin, float sign, bool round) {
  HWY_DYNAMIC_DISPATCH(RotatePairsV)(x, cos, sin, sign, round);
}
void EncodeE4m3Values(const float* x, int64_t n, uint8_t* codes) {
  HWY_DYNAMIC_DISPATCH(EncodeE4m3ValuesV)(x, n, codes);
}
void Softmax(float* logits, int64_t ld, int heads, int n, bool round, float* max, float* sum) {
  HWY_DYNAMIC_DISPATCH(SoftmaxV)(logits, ld, heads, n, round, max, sum);
}
void Divide(const float* x, float z, int64_t n, bool round, float* out) {
  HWY_DYNAMIC_DISPATCH(DivideV)(x, z, n, round, out);
}
void AccumulateValues(const float* p, int64_t ld_p, int heads, const float* const* keys, int num_keys, int64_t dim,
                      float* o) {
  HWY_DYNAMIC_DISPATCH(AccumulateValuesV)(p, ld_p, heads, keys, num_keys, dim, o);
}
void MixStreams(const float* streams, const float* pre, int hc, int64_t dim, bool round, float* y) {
  HWY_DYNAMIC_DISPATCH(MixStreamsV)(streams, pre, hc, dim, round, y);
}
void RecombineStreams(const float* out, const float* post, const float* comb, int hc, int64_t dim, bool round,
                      float* streams) {
  HWY_DYNAMIC_DISPATCH(RecombineStreamsV)(out, post, comb, hc, dim, round, streams);
}
void Add(const float* x, int64_t n, float* y) { HWY_DYNAMIC_DISPATCH(AddV)(x, n, y); }
void LoadKvEntry(const uint8_t* body, const uint8_t* scales, int64_t plain, int64_t rope, float* out) {
  HWY_DYNAMIC_DISPATCH(LoadKvEntryV)(body, scales, plain, rope, out);
}
float IndexScore(const float* q, const float* weights, int heads, const float* key) {
  return HWY_DYNAMIC_DISPATCH(IndexScoreV)(q, weights, heads, key);
}
void SwiGluRow(const float* g, const float* p, float weight, float limit, int64_t n, bool round, float* a) {
  HWY_DYNAMIC_DISPATCH(SwiGluRowV)(g, p, weight, limit, n, round, a);
}
void OnlineSoftmaxStep(const float* score, const float* kv, int64_t n, float* max, float* sum, float* weighted) {
  HWY_DYNAMIC_DISPATCH(OnlineSoftmaxStepV)(score, kv, n, max, sum, weighted);
}
void PoolRows(const float* const* score, const float* const* kv, int rows, int64_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(PoolRowsV)(score, kv, rows, n, out);
}

}  // namespace millrace::vec
#endif  // HWY_ONCE
