// SPDX-License-Identifier: Apache-2.0
// `millrace inspect` as text for people and as JSON for scripts: see model_report.h.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "engine/model/model_report.h"

namespace millrace {
namespace {

std::string WithCommas(int64_t n) {
  const std::string digits = absl::StrCat(n);
  std::string out;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) out.push_back(',');
    out.push_back(digits[i]);
  }
  return out;
}

// Decimal units, as memory and disks are sold.
std::string Readable(int64_t bytes) {
  const double value = static_cast<double>(bytes);
  if (value >= 1e12) return absl::StrFormat("%.2f TB", value / 1e12);
  if (value >= 1e9) return absl::StrFormat("%.2f GB", value / 1e9);
  if (value >= 1e6) return absl::StrFormat("%.1f MB", value / 1e6);
  if (value >= 1e3) return absl::StrFormat("%.1f KB", value / 1e3);
  return absl::StrFormat("%d B", bytes);
}

std::string ReadableCount(int64_t n) {
  if (n >= 1'000'000'000'000) return absl::StrFormat("%.3f T", static_cast<double>(n) / 1e12);
  if (n >= 1'000'000'000) return absl::StrFormat("%.2f B", static_cast<double>(n) / 1e9);
  return absl::StrFormat("%.2f M", static_cast<double>(n) / 1e6);
}

std::string ReadableTokens(int64_t tokens) {
  return tokens >= 1 << 20 ? absl::StrCat(tokens >> 20, "M") : absl::StrCat(tokens >> 10, "K");
}

const char* KindName(LayerKind kind) {
  switch (kind) {
    case LayerKind::kWindow:
      return "window";
    case LayerKind::kCsa:
      return "CSA";
    case LayerKind::kHca:
      return "HCA";
  }
  return "";
}

std::vector<int> LayersOf(const ModelConfig& config, LayerKind kind) {
  std::vector<int> layers;
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    if (config.layer_kinds[i] == kind) layers.push_back(i);
  }
  return layers;
}

// "0, 1, 3, 5 ... 59": runs of equal steps are cut short.
std::string LayerList(const std::vector<int>& layers) {
  std::vector<std::string> parts;
  for (size_t i = 0; i < layers.size();) {
    size_t end = i + 1;
    while (end + 1 < layers.size() && layers[end + 1] - layers[end] == layers[i + 1] - layers[i]) ++end;
    if (end - i >= 4 && end < layers.size()) {
      parts.push_back(absl::StrCat(layers[i], ", ", layers[i + 1], " ... ", layers[end]));
      i = end + 1;
    } else {
      parts.push_back(absl::StrCat(layers[i++]));
    }
  }
  return absl::StrJoin(parts, ", ");
}

void Row(std::string& out, const char* name, const std::string& value) {
  absl::StrAppendFormat(&out, "  %-19s %s\n", name, value);
}

void ArchitectureText(const ModelReport& r, std::string& out) {
  const ModelConfig& c = r.config;
  absl::StrAppendFormat(&out, "DeepSeek-V4, %d layers, %s\n", c.num_hidden_layers,
                        c.weight_format == WeightFormat::kFp8 ? "FP8 linears and FP4 experts (released format)"
                                                              : "unquantised (exact numerics, CPU only)");
  Row(out, "parameters",
      absl::StrCat(ReadableCount(r.parameters), ", ", ReadableCount(r.active_parameters), " active per token",
                   r.mtp_parameters > 0 ? absl::StrCat(", MTP ", ReadableCount(r.mtp_parameters)) : ""));
  Row(out, "vocabulary", WithCommas(c.vocab_size));
  Row(out, "hidden", absl::StrCat(c.hidden_size, " x ", c.hc_mult, " streams"));
  Row(out, "attention",
      absl::StrCat(c.num_attention_heads, " heads of ", c.head_dim, ", one shared KV, window of ", c.sliding_window));
  Row(out, "projections",
      absl::StrCat("query rank ", c.q_lora_rank, ", output ", c.o_groups, " groups of rank ", c.o_lora_rank));
  Row(out, "indexer", absl::StrCat(c.index_n_heads, " heads of ", c.index_head_dim, ", top ", c.index_topk));
  Row(out, "experts",
      absl::StrCat(c.n_routed_experts, " routed, ", c.num_experts_per_tok, " a token, 1 shared, width ",
                   c.moe_intermediate_size));
  Row(out, "positions",
      absl::StrCat(WithCommas(c.max_position_embeddings),
                   c.yarn ? absl::StrCat(", YaRN x", c.yarn->factor, " of ",
                                         WithCommas(c.yarn->original_max_position_embeddings))
                          : ", no YaRN"));
  if (c.dspark) Row(out, "speculation", "DSpark checkpoint: its draft stages are not used");
  if (!c.ignored_keys.empty())
    Row(out, "ignored keys", absl::StrCat(absl::StrJoin(c.ignored_keys, ", "), " (nothing is executed or fetched)"));
  out += "\nLayers\n";
  for (const LayerKind kind : {LayerKind::kWindow, LayerKind::kCsa, LayerKind::kHca}) {
    const std::vector<int> layers = LayersOf(c, kind);
    if (!layers.empty()) Row(out, KindName(kind), absl::StrFormat("%3d   %s", layers.size(), LayerList(layers)));
  }
  std::vector<int> hashed;
  for (int i = 0; i < c.num_hash_layers; ++i) hashed.push_back(i);
  if (!hashed.empty()) Row(out, "hash-routed", absl::StrFormat("%3d   %s", hashed.size(), LayerList(hashed)));
  if (c.has_mtp()) Row(out, "MTP", "  1   window");
}

void TensorText(const ModelReport& r, std::string& out) {
  absl::StrAppend(&out, "\nTensors", r.weights_present ? "" : " (no weights here: sizes follow from config.json)",
                  "\n");
  for (const TensorKindBytes& k : r.kinds) {
    absl::StrAppendFormat(&out, "  %-19s %9s  %19s B  %10s\n", k.kind, WithCommas(k.tensors), WithCommas(k.bytes),
                          Readable(k.bytes));
  }
  absl::StrAppendFormat(&out, "  %-19s %9s  %19s B  %10s\n", "total", WithCommas(r.tensors), WithCommas(r.tensor_bytes),
                        Readable(r.tensor_bytes));
  if (!r.content_hash.empty()) Row(out, "content hash", r.content_hash);
}

void CacheText(const CacheBytes& c, std::string& out) {
  absl::StrAppendFormat(&out, "\nCache, %s numerics (entry %d B, index key %d B)\n", c.numerics, c.entry, c.index_key);
  Row(out, "per token", absl::StrFormat("%.2f B", c.per_token));
  Row(out, "page, 128 tokens",
      absl::StrFormat("%s B (%s B without alignment)", WithCommas(c.page), WithCommas(c.page_payload)));
  Row(out, "per sequence", absl::StrFormat("%s B of state that does not grow", WithCommas(c.slot)));
  Row(out, "  windows",
      absl::StrFormat(
          "%s B%s", WithCommas(c.windows),
          c.windows_with_mtp != c.windows ? absl::StrCat(", with MTP ", WithCommas(c.windows_with_mtp), " B") : ""));
  Row(out, "  CSA pending", absl::StrCat(WithCommas(c.csa_pending), " B"));
  Row(out, "  HCA state", absl::StrCat(WithCommas(c.hca_state), " B"));
  Row(out, "  last streams", absl::StrCat(WithCommas(c.last_streams), " B"));
  if (c.sequences.empty()) return;
  absl::StrAppendFormat(&out, "  %-19s %16s %14s %16s %16s\n", "tokens", "entries", "windows", "sum", "allocated");
  for (const SequenceBytes& s : c.sequences) {
    absl::StrAppendFormat(&out, "  %-19s %16s %14s %16s %16s  %s\n", ReadableTokens(s.tokens), WithCommas(s.entries),
                          WithCommas(s.windows), WithCommas(s.entries + s.windows), WithCommas(s.allocated),
                          Readable(s.allocated));
  }
}

void HardwareText(const ModelReport& r, std::string& out) {
  out += "\nHardware\n";
  Row(out, "CPU",
      absl::StrFormat("%s of memory for the weights, plus the cache of each sequence", Readable(r.tensor_bytes)));
  if (r.gpus.empty()) {
    Row(out, "GPU", "none: unquantised weights run in exact numerics, which the CUDA backend refuses");
    return;
  }
  absl::StrAppendFormat(
      &out, "  %-19s %5s   %-22s %s\n", "GPU", "count", "left for cache, each",
      absl::StrCat("sequences of ",
                   ReadableTokens(std::min<int64_t>(int64_t{128} << 10, r.config.max_position_embeddings)), ", each"));
  for (const GpuFit& g : r.gpus) {
    if (g.gpus == 0) {
      absl::StrAppendFormat(&out, "  %-19s %5s   what every GPU holds does not fit\n", g.gpu, "-");
    } else {
      absl::StrAppendFormat(&out, "  %-19s %5d   %-22s %s\n", g.gpu, g.gpus, Readable(g.left_for_cache),
                            WithCommas(g.sequences_128k));
    }
  }
  Row(out, "", "(experts split evenly, the rest on each; a tenth of the memory kept free)");
}

}  // namespace

std::string ModelReportText(const ModelReport& report) {
  std::string out;
  ArchitectureText(report, out);
  TensorText(report, out);
  for (const CacheBytes& cache : report.caches) CacheText(cache, out);
  HardwareText(report, out);
  return out;
}

nlohmann::ordered_json ModelReportJson(const ModelReport& r) {
  using Json = nlohmann::ordered_json;
  const ModelConfig& c = r.config;
  Json layers = Json::array(), kinds = Json::array(), caches = Json::object(), gpus = Json::array();
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    layers.push_back({{"kind", KindName(c.layer_kinds[i])},
                      {"ratio", c.ratio(i)},
                      {"routing", c.hash_routed(i) ? "hash" : "scored"}});
  }
  for (const TensorKindBytes& k : r.kinds)
    kinds.push_back({{"kind", k.kind}, {"tensors", k.tensors}, {"bytes", k.bytes}});
  for (const CacheBytes& cache : r.caches) {
    Json sequences = Json::array();
    for (const SequenceBytes& s : cache.sequences) {
      sequences.push_back({{"tokens", s.tokens},
                           {"entry_bytes", s.entries},
                           {"window_bytes", s.windows},
                           {"bytes", s.entries + s.windows},
                           {"allocated_bytes", s.allocated}});
    }
    caches[cache.numerics] = {{"entry_bytes", cache.entry},
                              {"index_key_bytes", cache.index_key},
                              {"bytes_per_token", cache.per_token},
                              {"page_tokens", 128},
                              {"page_bytes", cache.page},
                              {"page_payload_bytes", cache.page_payload},
                              {"state",
                               {{"window_bytes", cache.windows},
                                {"window_bytes_with_mtp", cache.windows_with_mtp},
                                {"csa_pending_bytes", cache.csa_pending},
                                {"hca_state_bytes", cache.hca_state},
                                {"last_streams_bytes", cache.last_streams},
                                {"allocated_bytes", cache.slot}}},
                              {"sequences", std::move(sequences)}};
  }
  for (const GpuFit& g : r.gpus) {
    gpus.push_back({{"gpu", g.gpu},
                    {"memory_bytes", g.memory},
                    {"count", g.gpus},
                    {"left_for_cache_bytes", g.left_for_cache},
                    {"sequences", g.sequences_128k}});
  }
  Json out = {{"architecture",
               {{"model_type", "deepseek_v4"},
                {"weight_format", c.weight_format == WeightFormat::kFp8 ? "fp8" : "plain"},
                {"vocab_size", c.vocab_size},
                {"hidden_size", c.hidden_size},
                {"num_hidden_layers", c.num_hidden_layers},
                {"num_attention_heads", c.num_attention_heads},
                {"head_dim", c.head_dim},
                {"index_topk", c.index_topk},
                {"n_routed_experts", c.n_routed_experts},
                {"num_experts_per_tok", c.num_experts_per_tok},
                {"moe_intermediate_size", c.moe_intermediate_size},
                {"max_position_embeddings", c.max_position_embeddings},
                {"mtp", c.has_mtp()},
                {"dspark", c.dspark},
                {"ignored_keys", c.ignored_keys}}},
              {"layers", std::move(layers)},
              {"parameters",
               {{"backbone", r.parameters}, {"active_per_token", r.active_parameters}, {"mtp", r.mtp_parameters}}},
              {"tensors",
               {{"weights_present", r.weights_present},
                {"count", r.tensors},
                {"bytes", r.tensor_bytes},
                {"routed_expert_bytes", r.expert_bytes},
                {"by_kind", std::move(kinds)}}},
              {"cache", std::move(caches)},
              {"hardware", {{"cpu_memory_bytes", r.tensor_bytes}, {"gpus", std::move(gpus)}}}};
  if (!r.content_hash.empty()) out["tensors"]["content_hash"] = r.content_hash;
  return out;
}

}  // namespace millrace
