// SPDX-License-Identifier: Apache-2.0
// What the device's operation tests share: a card or a skip, arrays on both sides, random values as the model has them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "engine/cache/cache_layout.h"
#include "engine/device/buffer.h"
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_pass.h"
#include "engine/ops/rounding.h"

namespace millrace::cuda {

// Skips where there is no card; tests/gpu.sh counts skips as failures.
class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    static const absl::StatusOr<DeviceInfo> device = OpenDevice(0);
    if (!device.ok()) GTEST_SKIP() << device.status().message();
    stream_ = std::make_unique<Stream>();
  }
  cudaStream_t stream() { return stream_->get(); }
  std::unique_ptr<Stream> stream_;
};

// An array on the device; unwritten memory holds NaN in every float format.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count), memory_(Take(count)) {
    CUDA_CHECK(cudaMemset(memory_.data(), 0xff, count * sizeof(T)));
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  explicit DeviceArray(const std::vector<T>& values)
      : count_(static_cast<int64_t>(values.size())), memory_(Take(count_)) {
    CUDA_CHECK(cudaMemcpy(memory_.data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  T* data() { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> Fetch() {
    std::vector<T> values(count_);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(values.data(), memory_.data(), count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  static DeviceBuffer Take(int64_t count) {
    auto buffer = DeviceBuffer::Take(std::max<int64_t>(count, 1) * sizeof(T), "a test");
    EXPECT_TRUE(buffer.ok()) << buffer.status().ToString();
    return std::move(*buffer);
  }
  int64_t count_;
  DeviceBuffer memory_;
};

// F32 values that BF16 holds, as every activation is on both backends.
inline std::vector<float> RandomBf16(int64_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& v : values) v = RoundBf16(normal(random));
  return values;
}
inline std::vector<float> RandomF32(int64_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

inline std::vector<Bf16> ToDeviceBf16(const std::vector<float>& values) {
  std::vector<Bf16> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = EncodeBf16(values[i]);
    std::memcpy(static_cast<void*>(&out[i]), &bits, 2);
  }
  return out;
}
inline std::vector<float> FromDeviceBf16(const std::vector<Bf16>& values) {
  std::vector<float> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, &values[i], 2);
    out[i] = DecodeBf16(bits);
  }
  return out;
}

// Fills every page with entries and keys that could be there.
inline void FillPages(Buffer<uint8_t>& pages, int num_pages, const CacheLayout& layout) {
  std::mt19937 random(30);
  for (int p = 0; p < num_pages; ++p) {
    for (const PageLayerLayout& l : layout.page_layers) {
      uint8_t* base = pages.data() + p * layout.page_bytes;
      for (int e = 0; e < l.entries; ++e) {
        uint8_t* body = base + l.bodies + e * layout.entry.body_bytes;
        for (int i = 0; i < 448; ++i) body[i] = static_cast<uint8_t>(random() % 120 | (random() & 0x80));
        for (int i = 0; i < 64; ++i) {
          const uint16_t bits = EncodeBf16(static_cast<float>(random() % 1000) / 250 - 2);
          std::memcpy(body + 448 + 2 * i, &bits, 2);
        }
        for (int g = 0; g < 7; ++g) base[l.scales + e * 8 + g] = static_cast<uint8_t>(118 + random() % 3);
        if (l.kind != LayerKind::kCsa) continue;
        for (int i = 0; i < 64; ++i) base[l.index_bodies + e * 64 + i] = static_cast<uint8_t>(random());
        for (int g = 0; g < 4; ++g) base[l.index_scales + e * 4 + g] = static_cast<uint8_t>(124 + random() % 5);
      }
    }
  }
}

// First index whose bits differ, or -1.
inline int64_t FirstDifference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return static_cast<int64_t>(std::min(a.size(), b.size()));
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], 4) != 0) return static_cast<int64_t>(i);
  }
  return -1;
}

// |a - b| / |b|, Euclidean; infinite if anything is not finite.
inline double RelativeNorm(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  if (a.size() != b.size()) return INFINITY;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  const double ratio = std::sqrt(difference / norm);
  return std::isfinite(ratio) ? ratio : INFINITY;
}

}  // namespace millrace::cuda
