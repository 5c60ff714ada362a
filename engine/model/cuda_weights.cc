// SPDX-License-Identifier: Apache-2.0
// Copies a checkpoint to the device. One walk over the tensors serves twice: with a null bump it only adds up sizes.
#include "engine/model/cuda_weights.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>

#include "absl/strings/str_cat.h"
#include "engine/model/tensor_scan.h"
#include "engine/model/weights.h"
#include "engine/ops/packed_experts_plan.h"
#include "engine/ops/rounding.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int64_t kStagingBytes = 16 << 20;

std::string ScaleName(const std::string& weight) { return weight.substr(0, weight.size() - 6) + "scale"; }

// Of one expert as the checkpoint has it, each tensor on 256 bytes; behind it, how many groups could not be packed.
int64_t RawExpertBytes(const ModelConfig& config) {
  const int64_t elements = int64_t{config.hidden_size} * config.moe_intermediate_size;
  Bump bump;
  for (int tensor = 0; tensor < 3; ++tensor) {
    bump.Take<uint8_t>(elements / 2);
    bump.Take<uint8_t>(elements / 32);
  }
  return bump.used();
}

class Loader {
 public:
  // `staging` empty: count only.
  Loader(const Checkpoint& checkpoint, Bump& bump, const PinnedBuffer* staging,
         const std::function<void(int64_t, int64_t)>& progress, int64_t total)
      : c_(checkpoint), bump_(bump), staging_(staging), progress_(progress), total_(total) {
    if (staging != nullptr) stream_.emplace();
  }

  absl::StatusOr<ModelWeights> Model(bool mtp, bool with_experts) {
    const ModelConfig& config = c_.config();
    if (with_experts) {
      all_experts_.resize(config.n_routed_experts);
      std::iota(all_experts_.begin(), all_experts_.end(), 0);
      RETURN_IF_ERROR(PrepareToPack());
    }
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
    RETURN_IF_ERROR(refused_);
    return w;
  }

  absl::StatusOr<std::vector<ExpertWeights>> Routed(absl::Span<const int> ids, bool mtp) {
    RETURN_IF_ERROR(PrepareToPack());
    std::vector<ExpertWeights> layers;
    for (int n = 0; n < c_.config().num_hidden_layers; ++n) {
      layers.push_back(Experts(absl::StrCat("layers.", n, ".ffn.experts."), ids));
      Report();
    }
    if (mtp) {
      layers.push_back(Experts("mtp.0.ffn.experts.", ids));
      Report();
    }
    if (stream_) stream_->Wait();
    RETURN_IF_ERROR(refused_);
    return layers;
  }

 private:
  absl::Status PrepareToPack() {
    if (staging_ == nullptr) return absl::OkStatus();
    ASSIGN_OR_RETURN(raw_expert_,
                     DeviceBuffer::Take(RawExpertBytes(c_.config()) + 4, "an expert on its way to be packed"));
    CUDA_CHECK(cudaMemsetAsync(out_of_range(), 0, 4, stream_->get()));
    return absl::OkStatus();
  }
  void Refuse(const absl::Status& status) {
    if (refused_.ok()) refused_ = status;
  }
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

  Weight Linear(const std::string& name) { return Stack({name}).all; }

  StackedWeight Stack(const std::vector<std::string>& names) {
    StackedWeight w;
    w.all.k = c_.Get(names[0]).shape[1];
    const bool fp8 = c_.Get(names[0]).dtype == DType::kF8E4M3;
    w.all.kind = fp8 ? WeightKind::kFp8 : WeightKind::kBf16;
    for (const std::string& name : names) {
      const HostTensor& t = c_.Get(name);
      if (fp8) w.all.n = (w.all.n + 127) / 128 * 128;
      w.start.push_back(w.all.n);
      w.all.n += t.shape[0];
    }
    const int64_t row_bytes = w.all.k * (fp8 ? 1 : 2), blocks = (w.all.k + 127) / 128;
    uint8_t* data = bump_.Take<uint8_t>(w.all.n * row_bytes);
    uint8_t* scales = fp8 ? bump_.Take<uint8_t>((w.all.n + 127) / 128 * blocks) : nullptr;
    w.all.data = data;
    w.all.scales = scales;
    if (staging_ == nullptr || !refused_.ok()) return w;
    if (names.size() > 1) CUDA_CHECK(cudaMemsetAsync(data, 0, w.all.n * row_bytes, stream_->get()));
    for (size_t i = 0; i < names.size(); ++i) {
      const HostTensor& t = c_.Get(names[i]);
      Copy(data + w.start[i] * row_bytes, t.data, t.bytes);
      if (!fp8) continue;
      // A kernel that widens codes takes them for numbers, and a large checkpoint has not been scanned for others.
      Refuse(CheckFinite("checkpoint", names[i], t));
      const HostTensor& s = c_.Get(ScaleName(names[i]));
      Copy(scales + w.start[i] / 128 * blocks, s.data, s.bytes);
    }
    return w;
  }

  const float* F32(const std::string& name) {
    if (staging_ == nullptr) return bump_.Take<float>(c_.Get(name).elements());
    const std::vector<float> values = LoadF32(c_, name);
    return Put<float>(values.data(), static_cast<int64_t>(values.size()));
  }

  HyperWeights Hyper(const std::string& prefix) {
    return {F32(prefix + "_fn"), F32(prefix + "_base"), F32(prefix + "_scale")};
  }

  PoolWeights Pool(const std::string& prefix) { return {F32(prefix + "ape"), F32(prefix + "norm.weight")}; }

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

  // Packed one by one from a copy of the checkpoint's bytes. All on one stream: the next expert's copy waits for the
  // packing of the last.
  ExpertWeights Experts(const std::string& prefix, absl::Span<const int> ids) {
    const ModelConfig& config = c_.config();
    ExpertWeights w;
    w.num_experts = static_cast<int>(ids.size());
    w.hidden = config.hidden_size;
    w.width = config.moe_intermediate_size;
    const int64_t gate_up_bytes = PackedGateUpBytes(w.hidden, w.width), down_bytes = PackedDownBytes(w.hidden, w.width);
    uint8_t* gate_up = bump_.Take<uint8_t>(gate_up_bytes * w.num_experts);
    uint8_t* down = bump_.Take<uint8_t>(down_bytes * w.num_experts);
    w.gate_up = gate_up;
    w.down = down;
    if (staging_ == nullptr || !refused_.ok()) return w;
    for (int place = 0; place < w.num_experts; ++place) {
      Bump raw_bump(raw_expert_.data());
      const auto put = [&](const char* tensor) {
        const HostTensor& t = c_.Get(absl::StrCat(prefix, ids[place], ".", tensor));
        uint8_t* to = raw_bump.Take<uint8_t>(t.bytes);
        Copy(to, t.data, t.bytes);
        return to;
      };
      RawExpert raw;
      raw.w1 = put("w1.weight");
      raw.w2 = put("w2.weight");
      raw.w3 = put("w3.weight");
      raw.w1_scales = put("w1.scale");
      raw.w2_scales = put("w2.scale");
      raw.w3_scales = put("w3.scale");
      PackExpert(raw, w.hidden, w.width, gate_up + place * gate_up_bytes, down + place * down_bytes, out_of_range(),
                 stream_->get());
    }
    int32_t bad = 0;
    CUDA_CHECK(cudaMemcpyAsync(&bad, out_of_range(), 4, cudaMemcpyDeviceToHost, stream_->get()));
    stream_->Wait();
    if (bad != 0) {
      Refuse(absl::FailedPreconditionError(
          absl::StrCat("device: cuda takes FP4 scales of up to 2^", kMaxExponentDistance,
                       " below the largest of their 128 weights; ", prefix, "* has ", bad, " groups beyond")));
    }
    return w;
  }
  int32_t* out_of_range() const { return reinterpret_cast<int32_t*>(raw_expert_.data() + RawExpertBytes(c_.config())); }

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
    w.q_kv = Stack({p + "attn.wq_a.weight", p + "attn.wkv.weight"});
    w.wo_a = Groups(p + "attn.wo_a.weight");
    w.wo_b = Linear(p + "attn.wo_b.weight");
    w.q_norm = F32(p + "attn.q_norm.weight");
    w.kv_norm = F32(p + "attn.kv_norm.weight");
    w.attn_sink = F32(p + "attn.attn_sink");
    std::vector<std::string> from_qr = {p + "attn.wq_b.weight"};
    std::vector<std::string> from_u = {p + "attn.compressor.wkv.weight", p + "attn.compressor.wgate.weight"};
    if (kind == LayerKind::kCsa) {
      const std::string index = p + "attn.indexer.";
      from_qr.push_back(index + "wq_b.weight");
      from_u.push_back(index + "compressor.wkv.weight");
      from_u.push_back(index + "compressor.wgate.weight");
      from_u.push_back(index + "weights_proj.weight");
      w.index_pool = Pool(index + "compressor.");
    }
    w.q_index = Stack(from_qr);
    if (kind != LayerKind::kWindow) {
      w.compress = Stack(from_u);
      w.pool = Pool(p + "attn.compressor.");
    }
    w.gate = Linear(p + "ffn.gate.weight");
    if (!mtp && config.hash_routed(layer)) {
      w.tid2eid = RoutingTable(p + "ffn.gate.tid2eid");
    } else {
      w.gate_bias = F32(p + "ffn.gate.bias");
    }
    w.shared_up = Stack({p + "ffn.shared_experts.w1.weight", p + "ffn.shared_experts.w3.weight"});
    w.shared_w2 = Linear(p + "ffn.shared_experts.w2.weight");
    if (with_experts) w.experts = Experts(p + "ffn.experts.", all_experts_);
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
  std::vector<int> all_experts_;
  DeviceBuffer raw_expert_;
  absl::Status refused_;
};

}  // namespace

int64_t ModelWeights::Bytes(const Checkpoint& checkpoint, bool mtp, bool with_experts) {
  Bump counting;
  const auto counted = Loader(checkpoint, counting, nullptr, nullptr, 0).Model(mtp, with_experts);
  static_cast<void>(counted);  // what Load refuses, Load reports
  return counting.used();
}

absl::StatusOr<ModelWeights> ModelWeights::Load(const Checkpoint& checkpoint, bool mtp, bool with_experts, Bump& bump,
                                                const std::function<void(int64_t, int64_t)>& progress) {
  ASSIGN_OR_RETURN(const PinnedBuffer staging, PinnedBuffer::Take(kStagingBytes, "staging of weights"));
  const int64_t total = Bytes(checkpoint, mtp, with_experts);
  return Loader(checkpoint, bump, &staging, progress, total).Model(mtp, with_experts);
}

int64_t RoutedExpertBytes(const Checkpoint& checkpoint, absl::Span<const int> ids, bool mtp) {
  Bump counting;
  const auto counted = Loader(checkpoint, counting, nullptr, nullptr, 0).Routed(ids, mtp);
  static_cast<void>(counted);
  return counting.used();
}

absl::StatusOr<std::vector<ExpertWeights>> LoadRoutedExperts(const Checkpoint& checkpoint, absl::Span<const int> ids,
                                                             bool mtp, Bump& bump,
                                                             const std::function<void(int64_t, int64_t)>& progress) {
  ASSIGN_OR_RETURN(const PinnedBuffer staging, PinnedBuffer::Take(kStagingBytes, "staging of weights"));
  const int64_t total = RoutedExpertBytes(checkpoint, ids, mtp);
  return Loader(checkpoint, bump, &staging, progress, total).Routed(ids, mtp);
}

}  // namespace millrace::cuda
