// SPDX-License-Identifier: Apache-2.0
// Stored numbers to vectors of F32, for the CPU sources that Highway compiles once per instruction set. Included by
// those only, after <hwy/highway.h>; the formats are rounding.h's.
//
// One vector of stored numbers becomes several of F32 by interleaving with zeros inside blocks of 128 bits, which costs
// a fraction of what moving numbers across blocks would: vector v of N then holds, block by block, the four numbers
// from 4 v on, blocks 4 N numbers apart. LoadBlocks and StoreBlocks go to and from memory in order.
#if defined(MILLRACE_WIDEN_CPU_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MILLRACE_WIDEN_CPU_INL_H_
#undef MILLRACE_WIDEN_CPU_INL_H_
#else
#define MILLRACE_WIDEN_CPU_INL_H_
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace millrace {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

// The blocks of a vector from, or to, places `stride` floats apart.
template <class DF>
HWY_INLINE hn::Vec<DF> LoadBlocks(DF d, const float* from, [[maybe_unused]] int stride) {
#if HWY_TARGET == HWY_SCALAR
  return hn::LoadU(d, from);
#else
  if constexpr (hn::MaxLanes(d) <= 4) {
    return hn::LoadU(d, from);
  } else {
    const hn::Half<DF> half;
    constexpr int kHalf = static_cast<int>(hn::MaxLanes(half));
    return hn::Combine(d, LoadBlocks(half, from + kHalf / 4 * stride, stride), LoadBlocks(half, from, stride));
  }
#endif
}

template <class DF>
HWY_INLINE void StoreBlocks(DF d, hn::Vec<DF> v, float* to, [[maybe_unused]] int stride) {
#if HWY_TARGET == HWY_SCALAR
  hn::StoreU(v, d, to);
#else
  if constexpr (hn::MaxLanes(d) <= 4) {
    hn::StoreU(v, d, to);
  } else {
    const hn::Half<DF> half;
    constexpr int kHalf = static_cast<int>(hn::MaxLanes(half));
    StoreBlocks(half, hn::LowerHalf(half, v), to, stride);
    StoreBlocks(half, hn::UpperHalf(half, v), to + kHalf / 4 * stride, stride);
  }
#endif
}

#if HWY_TARGET != HWY_SCALAR
using D8 = hn::Repartition<uint8_t, D>;
using D16 = hn::Repartition<uint16_t, D>;

// BF16 values as F32, in units of two.
HWY_INLINE void WidenWords(hn::Vec<D16> words, V* out) {
  const D d;
  const D16 d16;
  out[0] = hn::BitCast(d, hn::InterleaveLower(d16, hn::Zero(d16), words));
  out[1] = hn::BitCast(d, hn::InterleaveUpper(d16, hn::Zero(d16), words));
}

// E4M3 codes in units of four: the F32 whose exponent field is the code's own, 2^120 too small, the code's subnormals
// being exact subnormals of F32.
HWY_INLINE void WidenFp8(hn::Vec<D8> codes, V* out) {
  const D8 d8;
  const D16 d16;
  const hn::RebindToSigned<D16> di16;
  const auto words = [&](auto high_bytes) HWY_ATTR {
    const auto shifted = hn::ShiftRight<4>(hn::BitCast(di16, high_bytes));
    return hn::And(hn::BitCast(d16, shifted), hn::Set(d16, 0x87f0));
  };
  WidenWords(words(hn::InterleaveLower(d8, hn::Zero(d8), codes)), out);
  WidenWords(words(hn::InterleaveUpper(d8, hn::Zero(d8), codes)), out + 2);
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace millrace
HWY_AFTER_NAMESPACE();

#endif
