// SPDX-License-Identifier: Apache-2.0
// A linear layer's weight as the CPU kernels read it, and the product that fixes the bits of every linear.
//
// Outputs are cut into panels of 64; inside a panel the weights of one input stand side by side, so a product adds in
// ascending k for each output on its own lane: no horizontal sum, and the same order on any vector width and for any
// number of rows. K is cut into blocks (128 for FP8, 32 for the others: shorter sums round less): a block is summed
// from zero in FP32 (fused multiply-add), then multiplied by its scales and added to the total. Weights stay in their
// stored width (FP4, FP8, BF16, F32) and are widened on the fly, exactly.
//
// Source: docs/model.md, "Quantised linears". Thread: immutable after packing; MatMul from the engine thread.
#pragma once

#include <cstdint>

#include "engine/device/buffer.h"
#include "engine/device/thread_pool.h"

namespace millrace {

enum class WeightKind : uint8_t { kF32, kBf16, kFp8, kFp4 };

class PackedLinear {
 public:
  static constexpr int kPanel = 64;
  static constexpr int kLaneGroup = 16;  // the last panel is as wide as its outputs need, in groups of 16

  PackedLinear() = default;
  // F32 or BF16 (raw bits) rows [n, k], row-major.
  static PackedLinear FromF32(const float* rows, int64_t n, int64_t k);
  static PackedLinear FromBf16(const uint16_t* rows, int64_t n, int64_t k);
  // E4M3 codes [n, k], E8M0 scales [ceil(n/128), ceil(k/128)].
  static PackedLinear FromFp8(const uint8_t* codes, const uint8_t* scales, int64_t n, int64_t k);
  // E2M1 pairs [n, k/2] (even k in the low nibble), E8M0 scales [n, k/32].
  static PackedLinear FromFp4(const uint8_t* pairs, const uint8_t* scales, int64_t n, int64_t k);

  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  WeightKind kind() const { return kind_; }
  int64_t bytes() const { return data_.bytes() + scales_.bytes(); }
  bool empty() const { return n_ == 0; }
  // Whether the reference quantises the activations of this linear (FP8 and FP4 do, except where a caller says not).
  bool quantised() const { return kind_ == WeightKind::kFp8 || kind_ == WeightKind::kFp4; }

  int64_t num_panels() const { return (n_ + kPanel - 1) / kPanel; }
  int panel_width(int64_t panel) const;
  const uint8_t* panel_data(int64_t panel) const { return data_.data() + panel * kPanel * k_ * element_bits() / 8; }
  // FP8: one scale per block of the panel. FP4: [block of 32][64].
  const float* panel_scales(int64_t panel) const;

 private:
  int element_bits() const;
  static PackedLinear Make(WeightKind kind, int64_t n, int64_t k);
  WeightKind kind_ = WeightKind::kF32;
  int64_t n_ = 0, k_ = 0;
  Buffer<uint8_t> data_;
  Buffer<float> scales_;
};

// Rows of activations. With `scales` the values are E4M3 code values and scales holds one factor per 128 of k.
struct ActivationRows {
  const float* values = nullptr;  // [m, ld]
  int64_t ld = 0;
  const float* scales = nullptr;  // [m, scales_ld] or null
  int64_t scales_ld = 0;
  bool bf16 = false;                 // every value is a BF16 value, so that matmul_amx.h may take the product
  const uint16_t* narrow = nullptr;  // what NarrowRows makes of these rows, if the caller has it already
};

// out[m, n] = x · wᵀ for m rows; out must not alias x. m may be 0.
void MatMul(const PackedLinear& w, const ActivationRows& x, int64_t m, float* out, int64_t out_ld, ThreadPool& pool);

// Activation quantisation ("actquant", groups of `group`): values become E4M3 code values, scales powers of two. The
// last group may be short. codes may alias x.
void QuantiseActivations(const float* x, int64_t k, int group, float* codes, float* scales);

}  // namespace millrace
