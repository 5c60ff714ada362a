// SPDX-License-Identifier: Apache-2.0
// A small model's cache on both backends, and passes over it as each describes them: what tests of the device's
// operations against their CPU twins start from.
//
// Where both do the same IEEE operations in the same order (rotations, formats, selection, combination) bits are asked
// for. Where a sum runs over lanes in another order or an exponential is another library's, results before rounding
// differ by a few ulp of FP32, so that about one BF16 value in a thousand rounds the other way: bounds are relative
// norms well below one rounding (2^-9), each beside its check.
#pragma once

#include <memory>
#include <vector>

#include "engine/device/buffer.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/cuda_norm_rope.h"
#include "engine/ops/cuda_test_util.h"

namespace millrace::cuda {

inline constexpr double kFewRoundings =
    2e-4;  // relative norm of a tensor in which one value in a thousand rounds otherwise

inline ModelConfig TestConfig() {
  ModelConfig c;
  c.vocab_size = 512;
  c.hidden_size = 256;
  c.num_hidden_layers = 3;
  c.num_attention_heads = 8;
  c.head_dim = 512;
  c.rope_head_dim = 64;
  c.sliding_window = 128;
  c.layer_kinds = {LayerKind::kWindow, LayerKind::kCsa, LayerKind::kHca};
  c.index_n_heads = 16;
  c.index_head_dim = 128;
  c.index_topk = 24;
  c.n_routed_experts = 16;
  c.num_experts_per_tok = 3;
  c.weight_format = WeightFormat::kFp8;
  return c;
}

inline RopeFrequencies TestFrequencies() {
  RopeFrequencies f;
  for (int i = 0; i < 32; ++i) f.f[i] = 1.0f / std::pow(160000.0f, static_cast<float>(2 * i) / 64);
  return f;
}

// Sequences in host memory with a device image of the same bytes: every operation runs on both.
class CudaModelOps : public CudaTest {
 protected:
  static constexpr int kPages = 40, kSlots = 4;

  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    pages_ = Buffer<uint8_t>(kPages * layout_.page_bytes);
    slots_ = Buffer<uint8_t>(kSlots * layout_.slot_bytes);
    device_pages_ = std::make_unique<DeviceArray<uint8_t>>(kPages * layout_.page_bytes);
    device_slots_ = std::make_unique<DeviceArray<uint8_t>>(kSlots * layout_.slot_bytes);
    CUDA_CHECK(cudaMemset(device_pages_->data(), 0, kPages * layout_.page_bytes));
    CUDA_CHECK(cudaMemset(device_slots_->data(), 0, kSlots * layout_.slot_bytes));
    // Scattered and interleaved pages, another order for each sequence.
    for (int s = 0; s < kSlots; ++s) {
      for (int p = 0; p < kPages / kSlots; ++p) table_.push_back((p * kSlots + s) * 7 % kPages);
    }
    for (int s = 0; s < kSlots; ++s) {
      for (int p = 0; p < kPages / kSlots; ++p) {
        host_pages_[s].push_back(pages_.data() + table_[s * kPages / kSlots + p] * layout_.page_bytes);
      }
    }
    device_table_ = std::make_unique<DeviceArray<int32_t>>(table_);
  }

  struct Part {
    int sequence;
    int64_t start, count;
  };
  // A pass over parts of sequences, as both backends describe it.
  struct BothPasses {
    std::vector<SequenceRows> sequences;
    std::vector<int64_t> positions;
    std::vector<int32_t> ids;
    Pass host() const { return {sequences, static_cast<int64_t>(ids.size()), positions.data(), ids.data()}; }
    std::unique_ptr<DeviceArray<int32_t>> device_ids, device_positions, device_row_sequence;
    std::unique_ptr<DeviceArray<SequenceView>> device_sequences;
    PassView device;
    std::vector<float> cos, sin;
    std::unique_ptr<DeviceArray<float>> device_cos, device_sin;
    RopeRows rope() const { return {cos.data(), sin.data()}; }
    RopeView rope_view() const { return {device_cos->data(), device_sin->data()}; }
  };

  std::unique_ptr<BothPasses> MakePass(const std::vector<Part>& parts) {
    auto p = std::make_unique<BothPasses>();
    std::vector<int32_t> positions, row_sequence;
    std::vector<SequenceView> views;
    for (const Part& part : parts) {
      const auto row = static_cast<int64_t>(p->ids.size());
      p->sequences.push_back({row, part.count, part.start, slots_.data() + part.sequence * layout_.slot_bytes,
                              &host_pages_[part.sequence]});
      views.push_back({row, part.count, part.start, device_slots_->data() + part.sequence * layout_.slot_bytes,
                       device_table_->data() + part.sequence * kPages / kSlots});
      for (int64_t i = 0; i < part.count; ++i) {
        p->ids.push_back(static_cast<int32_t>((row * 37 + i * 11) % config_.vocab_size));
        p->positions.push_back(part.start + i);
        positions.push_back(static_cast<int32_t>(part.start + i));
        row_sequence.push_back(static_cast<int32_t>(views.size()) - 1);
      }
    }
    p->device_ids = std::make_unique<DeviceArray<int32_t>>(p->ids);
    p->device_positions = std::make_unique<DeviceArray<int32_t>>(positions);
    p->device_row_sequence = std::make_unique<DeviceArray<int32_t>>(row_sequence);
    p->device_sequences = std::make_unique<DeviceArray<SequenceView>>(views);
    p->device = {static_cast<int64_t>(p->ids.size()),
                 static_cast<int>(views.size()),
                 p->device_ids->data(),
                 p->device_positions->data(),
                 p->device_row_sequence->data(),
                 p->device_sequences->data(),
                 device_pages_->data(),
                 layout_.page_bytes};
    const int64_t rows = p->device.num_rows;
    p->cos.resize(rows * 32);
    p->sin.resize(rows * 32);
    ops_.PrepareRope(frequencies_, p->positions.data(), rows, p->cos.data(), p->sin.data());
    p->device_cos = std::make_unique<DeviceArray<float>>(rows * 32);
    p->device_sin = std::make_unique<DeviceArray<float>>(rows * 32);
    PrepareRope(table(), p->device_positions->data(), rows, p->device_cos->data(), p->device_sin->data(), stream());
    return p;
  }

  RopeTable table() const {
    RopeTable t;
    std::copy_n(frequencies_.f, 32, t.f);
    return t;
  }

  // Makes both caches hold the host's bytes, so that the next operation starts from the same state.
  void UploadCache() {
    CUDA_CHECK(cudaMemcpy(device_pages_->data(), pages_.data(), pages_.bytes(), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(device_slots_->data(), slots_.data(), slots_.bytes(), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());
  }

  // Share of bytes of the cache that differ.
  double DifferentBytes() {
    const std::vector<uint8_t> pages = device_pages_->Fetch(), slots = device_slots_->Fetch();
    int64_t different = 0, written = 0;
    for (int64_t i = 0; i < pages_.bytes(); ++i) {
      different += pages[i] != pages_[i];
      written += pages_[i] != 0 || pages[i] != 0;
    }
    for (int64_t i = 0; i < slots_.bytes(); ++i) {
      different += slots[i] != slots_[i];
      written += slots_[i] != 0 || slots[i] != 0;
    }
    return static_cast<double>(different) / static_cast<double>(std::max<int64_t>(written, 1));
  }

  const ModelConfig config_ = TestConfig();
  const CacheLayout layout_ = CacheLayout::Make(config_, Numerics::kRelease, true);
  const RopeFrequencies frequencies_ = TestFrequencies();
  ThreadPool pool_{2};
  CpuOps ops_{config_, layout_, Rounding::All(), pool_, /*tiles=*/false};
  Buffer<uint8_t> pages_, slots_;
  std::unique_ptr<DeviceArray<uint8_t>> device_pages_, device_slots_;
  std::vector<int32_t> table_;
  std::unique_ptr<DeviceArray<int32_t>> device_table_;
  std::vector<uint8_t*> host_pages_[kSlots];
};

}  // namespace millrace::cuda
