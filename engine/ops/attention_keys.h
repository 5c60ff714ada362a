// SPDX-License-Identifier: Apache-2.0
// Keys widened for attention on the CPU, in the two forms that its products read: rows of F32 for vectors, and BF16 bits
// in blocks for AMX tiles (attention_amx.h). Both are arrays of keys that grow to the largest size asked for.
//
// Thread: Reserve alone; different keys may be written by different threads.
#pragma once

#include <cstdint>
#include <vector>

namespace millrace {

class RowKeys {
 public:
  using Key = const float*;  // [dim]
  void Reserve(int64_t count, int64_t dim) {
    dim_ = dim;
    if (static_cast<int64_t>(values_.size()) < count * dim) values_.resize(count * dim);
  }
  Key operator[](int64_t i) const { return values_.data() + i * dim_; }
  float* at(int64_t i) { return values_.data() + i * dim_; }

 private:
  std::vector<float> values_;
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
    if (count * kDims > step_) step_ = (count | 1) * kDims;  // odd: a key's blocks are not all in one cache set
    const int64_t size = step_ * (dim / kDims) + kTileRows * kDims;
    if (static_cast<int64_t>(bits_.size()) < size) bits_.resize(size);
  }
  Key operator[](int64_t i) const { return {bits_.data() + i * kDims, step_}; }
  uint16_t* at(int64_t i) { return bits_.data() + i * kDims; }
  int64_t step() const { return step_; }

 private:
  std::vector<uint16_t> bits_;
  int64_t step_ = 0;
};

}  // namespace millrace
