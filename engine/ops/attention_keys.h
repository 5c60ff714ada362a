// SPDX-License-Identifier: Apache-2.0
// Keys widened for attention on the CPU, in the two forms that its products read: rows of F32 for vectors, and BF16
// bits in blocks for AMX tiles (attention_amx.h). Both are arrays of keys that grow by doubling and forget what they
// held then. They are Buffers, for huge pages: the blocks of one key lie in as many small ones.
//
// Thread: Reserve alone; different keys may be written by different threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine/device/buffer.h"

namespace millrace {

class RowKeys {
 public:
  using Key = const float*;  // [dim]
  void Reserve(int64_t count, int64_t dim) {
    dim_ = dim;
    if (values_.size() < count * dim) values_ = Buffer<float>(std::max(count * dim, 2 * values_.size()));
  }
  Key operator[](int64_t i) const { return values_.data() + i * dim_; }
  float* at(int64_t i) { return values_.data() + i * dim_; }

 private:
  Buffer<float> values_;
  int64_t dim_ = 0;
};

// A key of TileKeys: 32 dims where it points, the next 32 `step` values on.
struct TileKey {
  const uint16_t* at = nullptr;
  int64_t step = 0;
  bool operator==(const TileKey&) const = default;
};

// Blocks of 32 dims, each [count][32]: any 16 neighbours are the rows of a tile. What follows the last key of the last
// block is readable as far as a tile goes.
class TileKeys {
 public:
  using Key = TileKey;
  static constexpr int kDims = 32, kTileRows = 16;
  void Reserve(int64_t count, int64_t dim) {
    if (count * kDims > step_) step_ = (std::max(count, 2 * step_ / kDims) | 1) * kDims;  // odd, see below
    const int64_t size = step_ * (dim / kDims) + kTileRows * kDims;
    if (bits_.size() < size) bits_ = Buffer<uint16_t>(size);
  }
  Key operator[](int64_t i) const { return {bits_.data() + i * kDims, step_}; }
  uint16_t* at(int64_t i) { return bits_.data() + i * kDims; }
  int64_t step() const { return step_; }

 private:
  Buffer<uint16_t> bits_;
  int64_t step_ = 0;  // an odd multiple of 64 bytes: a key's blocks are not all in one cache set
};

}  // namespace millrace
