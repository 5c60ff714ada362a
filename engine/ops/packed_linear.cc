// SPDX-License-Identifier: Apache-2.0
// Packs weights into panels (packed_linear.h). The product is matmul_cpu.cc.
#include "engine/ops/packed_linear.h"

#include <algorithm>
#include <cstring>

#include "engine/ops/rounding.h"
#include "engine/status.h"

namespace millrace {

int PackedLinear::element_bits() const {
  switch (kind_) {
    case WeightKind::kF32:
      return 32;
    case WeightKind::kBf16:
      return 16;
    case WeightKind::kFp8:
      return 8;
    case WeightKind::kFp4:
      return 4;
  }
  return 0;
}

int PackedLinear::panel_width(int64_t panel) const {
  if (kind_ == WeightKind::kFp4) return kPanel;  // two half panels share a byte
  const int64_t left = n_ - panel * kPanel;
  return static_cast<int>(std::min<int64_t>(kPanel, (left + kLaneGroup - 1) / kLaneGroup * kLaneGroup));
}

const float* PackedLinear::panel_scales(int64_t panel) const {
  if (kind_ == WeightKind::kFp8) return scales_.data() + panel * ((k_ + 127) / 128);
  if (kind_ == WeightKind::kFp4) return scales_.data() + panel * (k_ / 32) * kPanel;
  return nullptr;
}

PackedLinear PackedLinear::Make(WeightKind kind, int64_t n, int64_t k) {
  PackedLinear w;
  w.kind_ = kind;
  w.n_ = n;
  w.k_ = k;
  const int64_t panels = w.num_panels();
  int64_t lanes = 0;
  for (int64_t p = 0; p < panels; ++p) lanes += w.panel_width(p);
  w.data_ = Buffer<uint8_t>(lanes * k * w.element_bits() / 8);
  if (kind == WeightKind::kFp8) w.scales_ = Buffer<float>(panels * ((k + 127) / 128));
  if (kind == WeightKind::kFp4) w.scales_ = Buffer<float>(panels * (k / 32) * kPanel);
  return w;
}

namespace {

// Copies elements [n, k] into panels [k][width].
template <typename T>
void FillPanels(const PackedLinear& w, const T* rows, uint8_t* data) {
  for (int64_t p = 0; p < w.num_panels(); ++p) {
    const int width = w.panel_width(p);
    T* panel = reinterpret_cast<T*>(data) + p * PackedLinear::kPanel * w.k();
    const int64_t used = std::min<int64_t>(width, w.n() - p * PackedLinear::kPanel);
    for (int64_t j = 0; j < used; ++j) {
      const T* row = rows + (p * PackedLinear::kPanel + j) * w.k();
      for (int64_t i = 0; i < w.k(); ++i) panel[i * width + j] = row[i];
    }
  }
}

}  // namespace

PackedLinear PackedLinear::FromF32(const float* rows, int64_t n, int64_t k) {
  PackedLinear w = Make(WeightKind::kF32, n, k);
  FillPanels(w, rows, w.data_.data());
  return w;
}

PackedLinear PackedLinear::FromBf16(const uint16_t* rows, int64_t n, int64_t k) {
  PackedLinear w = Make(WeightKind::kBf16, n, k);
  FillPanels(w, rows, w.data_.data());
  return w;
}

PackedLinear PackedLinear::FromFp8(const uint8_t* codes, const uint8_t* scales, int64_t n, int64_t k) {
  PackedLinear w = Make(WeightKind::kFp8, n, k);
  FillPanels(w, codes, w.data_.data());
  const int64_t blocks = (k + 127) / 128;
  for (int64_t p = 0; p < w.num_panels(); ++p) {
    for (int64_t b = 0; b < blocks; ++b) {
      w.scales_[p * blocks + b] = DecodeE8m0(scales[(p * kPanel / 128) * blocks + b]);
    }
  }
  return w;
}

PackedLinear PackedLinear::FromFp4(const uint8_t* pairs, const uint8_t* scales, int64_t n, int64_t k) {
  CHECK(k % 32 == 0, "FP4 rows come in groups of 32");
  PackedLinear w = Make(WeightKind::kFp4, n, k);
  const int64_t blocks = k / 32;
  for (int64_t row = 0; row < n; ++row) {
    const int64_t panel = row / kPanel;
    const int lane = static_cast<int>(row % kPanel);
    uint8_t* data = w.data_.data() + panel * kPanel * k / 2;
    for (int64_t i = 0; i < k; ++i) {
      const uint8_t pair = pairs[row * k / 2 + i / 2];
      const uint8_t code = i % 2 == 0 ? pair & 15 : pair >> 4;
      // [k][32 bytes]: outputs 0..31 of the panel in the low nibbles, 32..63 in the high ones.
      data[i * (kPanel / 2) + lane % 32] |= lane < 32 ? code : static_cast<uint8_t>(code << 4);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      w.scales_[(panel * blocks + b) * kPanel + lane] = DecodeE8m0(scales[row * blocks + b]);
    }
  }
  return w;
}

}  // namespace millrace
