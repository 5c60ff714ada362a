// SPDX-License-Identifier: Apache-2.0
// What a tap or a sender sees of a pass on the device: copies of streams, experts and selections, layer by layer.
//
// Each copy waits for the pass, so that a watched pass is slow. One nobody watches has no watch. Thread: engine thread.
#pragma once

#include <algorithm>
#include <vector>

#include "absl/types/span.h"
#include "engine/device/cuda_device.h"
#include "engine/engine.h"
#include "engine/model/cuda_forward.h"
#include "engine/ops/ops.h"
#include "engine/ops/rounding.h"

namespace millrace::cuda {

// Brings back what a tap or a sender wants to see, layer by layer; a pass that nobody watches has none.
class PassWatch : public ForwardHooks {
 public:
  PassWatch(const ModelConfig& config, const ForwardOptions& options, absl::Span<const SequenceRows> sequences,
            Stream& stream)
      : config_(config), options_(options), sequences_(sequences), stream_(stream) {}
  bool wanted() const { return options_.tap != nullptr || options_.on_layer_done; }

  void OnExperts(int layer, const int32_t* experts, int64_t rows) override {
    if (options_.tap == nullptr) return;
    options_.tap->OnExperts(layer, Fetch(experts, rows * config_.num_experts_per_tok).data(), rows);
  }

  void OnSelection(int layer, SelectionView selection, int64_t rows) override {
    if (options_.tap == nullptr) return;
    bool all = true;
    for (const SequenceRows& s : sequences_) all &= (s.start + s.count) / 4 <= selection.topk;
    if (all) return;
    const std::vector<int32_t> entries = Fetch(selection.entries, rows * selection.topk);
    const std::vector<int32_t> counts = Fetch(selection.counts, rows);
    for (int64_t r = 0; r < rows; ++r) {
      options_.tap->OnSelection(
          layer, r, absl::MakeConstSpan(entries).subspan(r * selection.topk, static_cast<size_t>(counts[r])));
    }
  }

  void OnLayer(int layer, const Bf16* streams, int64_t rows) override {
    if (options_.tap != nullptr) {
      const std::vector<uint16_t> bits =
          Fetch(reinterpret_cast<const uint16_t*>(streams), rows * kStreams * config_.hidden_size);
      std::vector<float> values(bits.size());
      std::transform(bits.begin(), bits.end(), values.begin(), DecodeBf16);
      options_.tap->OnStreams(layer, values.data(), rows);
    }
    if (options_.on_layer_done) {
      stream_.Wait();
      options_.on_layer_done(layer);
    }
  }

 private:
  template <typename T>
  std::vector<T> Fetch(const T* device, int64_t count) {
    std::vector<T> host(count);
    CUDA_CHECK(cudaMemcpyAsync(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost, stream_.get()));
    stream_.Wait();
    return host;
  }

  const ModelConfig& config_;
  const ForwardOptions& options_;
  const absl::Span<const SequenceRows> sequences_;
  Stream& stream_;
};

}  // namespace millrace::cuda
