// SPDX-License-Identifier: Apache-2.0
// Reads weights.h's structs out of a checkpoint.
#include "engine/model/weights.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/ops/rounding.h"
#include "engine/status.h"

namespace millrace {
namespace {

template <typename T>
std::vector<T> Copy(const HostTensor& t) {
  std::vector<T> values(t.elements());
  std::memcpy(values.data(), t.data, values.size() * sizeof(T));
  return values;
}

// BF16 bits of an FP8 or FP4 tensor times its scales.
std::vector<uint16_t> WidenToBf16(const HostTensor& t, const uint8_t* scales, int64_t* k) {
  const int64_t n = t.shape[0];
  const bool fp4 = t.dtype == DType::kI8;
  *k = fp4 ? t.shape[1] * 2 : t.shape[1];
  std::vector<uint16_t> out(n * *k);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < *k; ++i) {
      float value;
      if (fp4) {
        const uint8_t pair = t.data[r * t.shape[1] + i / 2];
        value = DecodeE2m1(i % 2 == 0 ? pair & 15 : pair >> 4) * DecodeE8m0(scales[r * (*k / 32) + i / 32]);
      } else {
        value = DecodeE4m3(t.data[r * *k + i]) * DecodeE8m0(scales[r / 128 * ((*k + 127) / 128) + i / 128]);
      }
      out[r * *k + i] = EncodeBf16(value);
    }
  }
  return out;
}

std::string ScaleName(const std::string& weight) { return weight.substr(0, weight.size() - 6) + "scale"; }

HyperConnectionWeights LoadHyper(const Checkpoint& c, const std::string& prefix) {
  const HostTensor& fn = c.Get(prefix + "_fn");
  const std::vector<float> values = LoadF32(c, prefix + "_fn");
  return {PackedLinear::FromF32(values.data(), fn.shape[0], fn.shape[1]), LoadF32(c, prefix + "_base"),
          LoadF32(c, prefix + "_scale")};
}

CompressorWeights LoadCompressor(const Checkpoint& c, const std::string& prefix, Numerics numerics) {
  return {LoadLinear(c, prefix + "wkv.weight", numerics), LoadLinear(c, prefix + "wgate.weight", numerics),
          LoadF32(c, prefix + "ape"), LoadF32(c, prefix + "norm.weight")};
}

// The grouped output projection: stored FP8, computed in BF16 (widening is exact).
std::vector<PackedLinear> LoadGroups(const Checkpoint& c, const std::string& name, int groups) {
  const HostTensor& t = c.Get(name);
  const int64_t rows = t.shape[0] / groups, k = t.shape[1];
  std::vector<PackedLinear> out;
  if (t.dtype == DType::kF32) {
    const std::vector<float> values = Copy<float>(t);
    for (int g = 0; g < groups; ++g) out.push_back(PackedLinear::FromF32(values.data() + g * rows * k, rows, k));
    return out;
  }
  int64_t width;
  const std::vector<uint16_t> values =
      t.dtype == DType::kBF16 ? Copy<uint16_t>(t) : WidenToBf16(t, c.Get(ScaleName(name)).data, &width);
  for (int g = 0; g < groups; ++g) out.push_back(PackedLinear::FromBf16(values.data() + g * rows * k, rows, k));
  return out;
}

LayerWeights LoadLayer(const Checkpoint& c, const std::string& p, int layer, Numerics numerics) {
  const ModelConfig& config = c.config();
  const bool mtp = layer >= config.num_hidden_layers;
  const LayerKind kind = mtp ? LayerKind::kWindow : config.layer_kinds[layer];
  const auto linear = [&](const char* name) { return LoadLinear(c, p + name, numerics); };
  LayerWeights w;
  w.hc_attn = LoadHyper(c, p + "hc_attn");
  w.hc_ffn = LoadHyper(c, p + "hc_ffn");
  w.attn_norm = LoadF32(c, p + "attn_norm.weight");
  w.ffn_norm = LoadF32(c, p + "ffn_norm.weight");
  w.wq_a = linear("attn.wq_a.weight");
  w.wq_b = linear("attn.wq_b.weight");
  w.wkv = linear("attn.wkv.weight");
  w.wo_a = LoadGroups(c, p + "attn.wo_a.weight", config.o_groups);
  w.wo_b = linear("attn.wo_b.weight");
  w.q_norm = LoadF32(c, p + "attn.q_norm.weight");
  w.kv_norm = LoadF32(c, p + "attn.kv_norm.weight");
  w.attn_sink = LoadF32(c, p + "attn.attn_sink");
  if (kind != LayerKind::kWindow) w.compressor = LoadCompressor(c, p + "attn.compressor.", numerics);
  if (kind == LayerKind::kCsa) {
    w.index_wq_b = linear("attn.indexer.wq_b.weight");
    w.index_weights_proj = linear("attn.indexer.weights_proj.weight");
    w.index_compressor = LoadCompressor(c, p + "attn.indexer.compressor.", numerics);
  }
  w.gate = linear("ffn.gate.weight");
  if (!mtp && config.hash_routed(layer)) {
    const HostTensor& table = c.Get(p + "ffn.gate.tid2eid");
    w.tid2eid.resize(table.elements());
    for (int64_t i = 0; i < table.elements(); ++i) {
      int64_t id;
      std::memcpy(&id, table.data + i * 8, 8);
      w.tid2eid[i] = static_cast<int32_t>(id);
    }
  } else {
    w.gate_bias = LoadF32(c, p + "ffn.gate.bias");
  }
  w.shared_w1 = linear("ffn.shared_experts.w1.weight");
  w.shared_w2 = linear("ffn.shared_experts.w2.weight");
  w.shared_w3 = linear("ffn.shared_experts.w3.weight");
  return w;
}

}  // namespace

PackedLinear LoadLinear(const Checkpoint& checkpoint, const std::string& name, Numerics numerics) {
  const HostTensor& t = checkpoint.Get(name);
  switch (t.dtype) {
    case DType::kF32:
      return PackedLinear::FromF32(Copy<float>(t).data(), t.shape[0], t.shape[1]);
    case DType::kBF16:
      return PackedLinear::FromBf16(Copy<uint16_t>(t).data(), t.shape[0], t.shape[1]);
    case DType::kF8E4M3:
    case DType::kI8:
      break;
    default:
      CHECK(false, absl::StrCat(name, " has no linear type"));
  }
  const uint8_t* scales = checkpoint.Get(ScaleName(name)).data;
  if (numerics == Numerics::kExact) {
    int64_t k;
    const std::vector<uint16_t> wide = WidenToBf16(t, scales, &k);
    return PackedLinear::FromBf16(wide.data(), t.shape[0], k);
  }
  if (t.dtype == DType::kI8) return PackedLinear::FromFp4(t.data, scales, t.shape[0], t.shape[1] * 2);
  return PackedLinear::FromFp8(t.data, scales, t.shape[0], t.shape[1]);
}

std::vector<float> LoadF32(const Checkpoint& checkpoint, const std::string& name) {
  const HostTensor& t = checkpoint.Get(name);
  if (t.dtype == DType::kF32) return Copy<float>(t);
  CHECK(t.dtype == DType::kBF16, name);
  const std::vector<uint16_t> bits = Copy<uint16_t>(t);
  std::vector<float> out(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) out[i] = DecodeBf16(bits[i]);
  return out;
}

int64_t LayerWeights::bytes() const {
  int64_t total = 0;
  for (const PackedLinear* w : {&hc_attn.fn, &hc_ffn.fn, &wq_a, &wq_b, &wkv, &wo_b, &compressor.wkv, &compressor.wgate,
                                &index_wq_b, &index_weights_proj, &index_compressor.wkv, &index_compressor.wgate, &gate,
                                &shared_w1, &shared_w2, &shared_w3}) {
    total += w->bytes();
  }
  for (const PackedLinear& w : wo_a) total += w.bytes();
  for (const std::vector<float>* v : {&attn_norm, &ffn_norm, &q_norm, &kv_norm, &attn_sink, &compressor.ape,
                                      &compressor.norm, &index_compressor.ape, &index_compressor.norm, &gate_bias}) {
    total += static_cast<int64_t>(v->size()) * 4;
  }
  return total + static_cast<int64_t>(tid2eid.size()) * 4;
}

ModelWeights ModelWeights::Load(const Checkpoint& c, Numerics numerics, bool mtp,
                                const std::function<void(int64_t, int64_t)>& progress) {
  const ModelConfig& config = c.config();
  const int steps = config.num_hidden_layers + 1 + (mtp ? 1 : 0);
  ModelWeights w;
  int done = 0;
  const auto advance = [&](int64_t bytes) {
    w.bytes += bytes;
    ++done;
    if (progress) progress(w.bytes, w.bytes * steps / done);  // the total is an estimate until the last layer
  };
  const HostTensor& embed = c.Get("embed.weight");
  w.embed.dim = config.hidden_size;
  if (embed.dtype == DType::kBF16) {
    w.embed.bf16 = Buffer<uint16_t>(embed.elements());
    std::memcpy(w.embed.bf16.data(), embed.data, embed.bytes);
  } else {
    w.embed.f32 = Buffer<float>(embed.elements());
    std::memcpy(w.embed.f32.data(), embed.data, embed.bytes);
  }
  w.head = LoadLinear(c, "head.weight", numerics);
  w.norm = LoadF32(c, "norm.weight");
  w.hc_head = LoadHyper(c, "hc_head");
  advance(w.embed.bf16.bytes() + w.embed.f32.bytes() + w.head.bytes());
  for (int n = 0; n < config.num_hidden_layers; ++n) {
    w.layers.push_back(LoadLayer(c, absl::StrCat("layers.", n, "."), n, numerics));
    advance(w.layers.back().bytes());
  }
  if (mtp) {
    MtpWeights m;
    m.block = LoadLayer(c, "mtp.0.", config.num_hidden_layers, numerics);
    m.e_proj = LoadLinear(c, "mtp.0.e_proj.weight", numerics);
    m.h_proj = LoadLinear(c, "mtp.0.h_proj.weight", numerics);
    m.enorm = LoadF32(c, "mtp.0.enorm.weight");
    m.hnorm = LoadF32(c, "mtp.0.hnorm.weight");
    m.norm = LoadF32(c, "mtp.0.norm.weight");
    m.hc_head = LoadHyper(c, "mtp.0.hc_head");
    w.mtp.push_back(std::move(m));
    advance(w.mtp[0].block.bytes() + w.mtp[0].e_proj.bytes() + w.mtp[0].h_proj.bytes());
  }
  return w;
}

}  // namespace millrace
