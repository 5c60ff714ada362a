// SPDX-License-Identifier: Apache-2.0
// Copies a checkpoint to the device. One walk over the tensors serves twice: with a null bump it only adds up sizes.
#include "engine/model/cuda_weights.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "absl/strings/str_cat.h"
#include "engine/model/weights.h"
#include "engine/ops/rounding.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int64_t kStagingBytes = 16 << 20;

std::string ScaleName(const std::string& weight) { return weight.substr(0, weight.size() - 6) + "scale"; }

class Loader {
 public:
  // `staging` empty: count only.
  Loader(const Checkpoint& checkpoint, Bump& bump, const PinnedBuffer* staging,
         const std::function<void(int64_t, int64_t)>& progress, int64_t total)
      : c_(checkpoint), bump_(bump), staging_(staging), progress_(progress), total_(total) {
    if (staging != nullptr) stream_.emplace();
  }

  ModelWeights Model(bool mtp, bool with_experts) {
    const ModelConfig& config = c_.config();
    ModelWeights w;
    w.embed = static_cast<const Bf16*>(Linear("embed.weight").data);
    w.head = Linear("head.weight");
    w.norm = F32("norm.weight");
    w.hc_head = Hyper("hc_head");
    for (int n = 0; n < config.num_hidden_layers; ++n) {
      w.layers.push_back(Layer(absl::StrCat("layers.", n, "."), n, with_experts));
      Report();
    }
    if (mtp) {
      MtpWeights m;
      m.block = Layer("mtp.0.", config.num_hidden_layers, with_experts);
      m.e_proj = Linear("mtp.0.e_proj.weight");
      m.h_proj = Linear("mtp.0.h_proj.weight");
      m.enorm = F32("mtp.0.enorm.weight");
      m.hnorm = F32("mtp.0.hnorm.weight");
      m.norm = F32("mtp.0.norm.weight");
      m.hc_head = Hyper("mtp.0.hc_head");
      w.mtp.push_back(m);
      Report();
    }
    if (stream_) stream_->Wait();
    return w;
  }

 private:
  void Report() {
    if (staging_ != nullptr && progress_) progress_(bump_.used(), total_);
  }

  // Copies through the halves of the staging buffer in turn; `fill(to, offset, n)` produces bytes of the source.
  template <typename Fill>
  void CopyBy(uint8_t* to, int64_t bytes, Fill fill) {
    constexpr int64_t kHalf = kStagingBytes / 2;
    for (int64_t offset = 0; offset < bytes; offset += kHalf) {
      const int64_t n = std::min(kHalf, bytes - offset);
      if (++pieces_ > 2) CUDA_CHECK(cudaEventSynchronize(copied_[pieces_ % 2].event));
      uint8_t* half = staging_->data() + pieces_ % 2 * kHalf;
      fill(half, offset, n);
      CUDA_CHECK(cudaMemcpyAsync(to + offset, half, n, cudaMemcpyHostToDevice, stream_->get()));
      CUDA_CHECK(cudaEventRecord(copied_[pieces_ % 2].event, stream_->get()));
    }
  }
  void Copy(uint8_t* to, const void* from, int64_t bytes) {
    CopyBy(to, bytes, [from](uint8_t* half, int64_t offset, int64_t n) {
      std::memcpy(half, static_cast<const uint8_t*>(from) + offset, n);
    });
  }
  template <typename T>
  const T* Put(const void* from, int64_t count) {
    T* to = bump_.Take<T>(count);
    if (staging_ != nullptr) Copy(reinterpret_cast<uint8_t*>(to), from, count * static_cast<int64_t>(sizeof(T)));
    return to;
  }

  Weight Linear(const std::string& name) {
    const HostTensor& t = c_.Get(name);
    Weight w;
    w.n = t.shape[0];
    w.k = t.dtype == DType::kI8 ? t.shape[1] * 2 : t.shape[1];
    w.kind = t.dtype == DType::kF32    ? WeightKind::kF32
             : t.dtype == DType::kBF16 ? WeightKind::kBf16
             : t.dtype == DType::kI8   ? WeightKind::kFp4
                                       : WeightKind::kFp8;
    w.data = Put<uint8_t>(t.data, t.bytes);
    if (w.quantised()) {
      const HostTensor& scales = c_.Get(ScaleName(name));
      w.scales = Put<uint8_t>(scales.data, scales.bytes);
    }
    return w;
  }

  const float* F32(const std::string& name) {
    if (staging_ == nullptr) return bump_.Take<float>(c_.Get(name).elements());
    const std::vector<float> values = LoadF32(c_, name);
    return Put<float>(values.data(), static_cast<int64_t>(values.size()));
  }

  HyperWeights Hyper(const std::string& prefix) {
    return {Linear(prefix + "_fn"), F32(prefix + "_base"), F32(prefix + "_scale")};
  }

  CompressorWeights Compressor(const std::string& prefix) {
    return {Linear(prefix + "wkv.weight"),
            Linear(prefix + "wgate.weight"),
            {F32(prefix + "ape"), F32(prefix + "norm.weight")}};
  }

  // FP8 to BF16, a row at a time.
  Weight Groups(const std::string& name) {
    const HostTensor& t = c_.Get(name);
    const uint8_t* scales = c_.Get(ScaleName(name)).data;
    const int64_t k = t.shape[1], blocks = (k + 127) / 128, row_bytes = k * 2;
    uint8_t* to = bump_.Take<uint8_t>(t.shape[0] * row_bytes);
    const auto widen = [&](uint8_t* half, int64_t offset, int64_t n) {
      for (int64_t at = offset; at < offset + n; at += 2) {
        const int64_t r = at / row_bytes, i = at % row_bytes / 2;
        const uint16_t bits =
            EncodeBf16(DecodeE4m3(t.data[r * k + i]) * DecodeE8m0(scales[r / 128 * blocks + i / 128]));
        std::memcpy(half + (at - offset), &bits, 2);
      }
    };
    if (staging_ != nullptr) CopyBy(to, t.shape[0] * row_bytes, widen);
    return {WeightKind::kBf16, t.shape[0] / c_.config().o_groups, k, to, nullptr};
  }

  ExpertWeights Experts(const std::string& prefix) {
    const ModelConfig& config = c_.config();
    ExpertWeights w;
    w.num_experts = config.n_routed_experts;
    w.hidden = config.hidden_size;
    w.width = config.moe_intermediate_size;
    const auto stack = [&](const char* name, const uint8_t*& codes, const uint8_t*& scales) {
      const std::string first = absl::StrCat(prefix, 0, ".", name, ".weight");
      const int64_t code_bytes = c_.Get(first).bytes, scale_bytes = c_.Get(ScaleName(first)).bytes;
      uint8_t* to_codes = bump_.Take<uint8_t>(code_bytes * w.num_experts);
      uint8_t* to_scales = bump_.Take<uint8_t>(scale_bytes * w.num_experts);
      codes = to_codes;
      scales = to_scales;
      for (int e = 0; staging_ != nullptr && e < w.num_experts; ++e) {
        const std::string weight = absl::StrCat(prefix, e, ".", name, ".weight");
        Copy(to_codes + e * code_bytes, c_.Get(weight).data, code_bytes);
        Copy(to_scales + e * scale_bytes, c_.Get(ScaleName(weight)).data, scale_bytes);
      }
    };
    stack("w1", w.w1, w.w1_scales);
    stack("w2", w.w2, w.w2_scales);
    stack("w3", w.w3, w.w3_scales);
    return w;
  }

  const int32_t* RoutingTable(const std::string& name) {
    const HostTensor& t = c_.Get(name);
    if (staging_ == nullptr) return bump_.Take<int32_t>(t.elements());
    std::vector<int32_t> ids(t.elements());
    for (int64_t i = 0; i < t.elements(); ++i) {
      int64_t id;
      std::memcpy(&id, t.data + i * 8, 8);
      ids[i] = static_cast<int32_t>(id);
    }
    return Put<int32_t>(ids.data(), t.elements());
  }

  LayerWeights Layer(const std::string& p, int layer, bool with_experts) {
    const ModelConfig& config = c_.config();
    const bool mtp = layer >= config.num_hidden_layers;
    const LayerKind kind = mtp ? LayerKind::kWindow : config.layer_kinds[layer];
    LayerWeights w;
    w.hc_attn = Hyper(p + "hc_attn");
    w.hc_ffn = Hyper(p + "hc_ffn");
    w.attn_norm = F32(p + "attn_norm.weight");
    w.ffn_norm = F32(p + "ffn_norm.weight");
    w.wq_a = Linear(p + "attn.wq_a.weight");
    w.wq_b = Linear(p + "attn.wq_b.weight");
    w.wkv = Linear(p + "attn.wkv.weight");
    w.wo_a = Groups(p + "attn.wo_a.weight");
    w.wo_b = Linear(p + "attn.wo_b.weight");
    w.q_norm = F32(p + "attn.q_norm.weight");
    w.kv_norm = F32(p + "attn.kv_norm.weight");
    w.attn_sink = F32(p + "attn.attn_sink");
    if (kind != LayerKind::kWindow) w.compressor = Compressor(p + "attn.compressor.");
    if (kind == LayerKind::kCsa) {
      w.index_wq_b = Linear(p + "attn.indexer.wq_b.weight");
      w.index_weights_proj = Linear(p + "attn.indexer.weights_proj.weight");
      w.index_compressor = Compressor(p + "attn.indexer.compressor.");
    }
    w.gate = Linear(p + "ffn.gate.weight");
    if (!mtp && config.hash_routed(layer)) {
      w.tid2eid = RoutingTable(p + "ffn.gate.tid2eid");
    } else {
      w.gate_bias = F32(p + "ffn.gate.bias");
    }
    w.shared_w1 = Linear(p + "ffn.shared_experts.w1.weight");
    w.shared_w2 = Linear(p + "ffn.shared_experts.w2.weight");
    w.shared_w3 = Linear(p + "ffn.shared_experts.w3.weight");
    if (with_experts) w.experts = Experts(p + "ffn.experts.");
    return w;
  }

  struct Event {
    Event() { CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming)); }
    ~Event() { cudaEventDestroy(event); }
    cudaEvent_t event = nullptr;
  };

  const Checkpoint& c_;
  Bump& bump_;
  const PinnedBuffer* staging_;
  const std::function<void(int64_t, int64_t)>& progress_;
  const int64_t total_;
  std::optional<Stream> stream_;
  std::vector<Event> copied_ = std::vector<Event>(staging_ != nullptr ? 2 : 0);
  int64_t pieces_ = 0;
};

}  // namespace

int64_t ModelWeights::Bytes(const Checkpoint& checkpoint, bool mtp, bool with_experts) {
  Bump counting;
  Loader(checkpoint, counting, nullptr, nullptr, 0).Model(mtp, with_experts);
  return counting.used();
}

absl::StatusOr<ModelWeights> ModelWeights::Load(const Checkpoint& checkpoint, bool mtp, bool with_experts, Bump& bump,
                                                const std::function<void(int64_t, int64_t)>& progress) {
  ASSIGN_OR_RETURN(const PinnedBuffer staging, PinnedBuffer::Take(kStagingBytes, "staging of weights"));
  const int64_t total = Bytes(checkpoint, mtp, with_experts);
  return Loader(checkpoint, bump, &staging, progress, total).Model(mtp, with_experts);
}

}  // namespace millrace::cuda
