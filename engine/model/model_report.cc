// SPDX-License-Identifier: Apache-2.0
// The numbers of `millrace inspect`: see model_report.h. How they look is model_report_format.cc.
#include "engine/model/model_report.h"

#include <sys/stat.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/cache/cache_layout.h"
#include "engine/model/mapped_file.h"
#include "engine/model/shard_index.h"
#include "engine/status.h"

namespace millrace {
namespace {

// Order of the table: from the top of the model down, the large ones last.
constexpr const char* kKinds[] = {"embedding",      "head",           "norms",    "hyper connections",
                                  "attention",      "compressors",    "indexers", "gates and hash",
                                  "shared experts", "routed experts", "MTP"};

const char* KindOf(const TensorSpec& spec) {
  const auto has = [&](const char* part) { return absl::StrContains(spec.name, part); };
  if (absl::StartsWith(spec.name, "mtp.")) return "MTP";
  if (spec.name == "embed.weight") return "embedding";
  if (spec.name == "head.weight") return "head";
  if (spec.expert >= 0) return "routed experts";
  if (has(".shared_experts.")) return "shared experts";
  if (has(".gate.")) return "gates and hash";
  if (has(".indexer.")) return "indexers";
  if (has(".compressor.")) return "compressors";
  if (has("hc_")) return "hyper connections";
  if (has(".attn.")) return "attention";
  return "norms";
}

int64_t Product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t dim : shape) n *= dim;
  return n;
}

// Logical weights: two per packed byte; scales and routing tables are none.
int64_t Parameters(const TensorSpec& spec, WeightFormat format) {
  if (spec.dtype == DType::kF8E8M0 || spec.dtype == DType::kI64) return 0;
  const bool packed = spec.dtype == DType::kI8 && format == WeightFormat::kFp8;
  return Product(spec.shape) * (packed ? 2 : 1);
}

int64_t BytesOf(const TensorSpec& spec, WeightFormat format, const Checkpoint* checkpoint) {
  if (checkpoint != nullptr) return checkpoint->Get(spec.name).bytes;
  const DType dtype = format == WeightFormat::kPlain && spec.quantised ? DType::kBF16 : spec.dtype;
  return Product(spec.shape) * DTypeSize(dtype);
}

void AddTensors(const Checkpoint* checkpoint, ModelReport& report) {
  const ModelConfig& config = report.config;
  for (const char* kind : kKinds) report.kinds.push_back({.kind = kind});
  int64_t expert_parameters = 0, embedding_parameters = 0;
  for (const TensorSpec& spec : TensorInventory(config)) {
    const int64_t bytes = BytesOf(spec, config.weight_format, checkpoint);
    const int64_t parameters = Parameters(spec, config.weight_format);
    const std::string kind = KindOf(spec);
    const auto row =
        std::find_if(report.kinds.begin(), report.kinds.end(), [&](const auto& k) { return k.kind == kind; });
    ++row->tensors;
    row->bytes += bytes;
    ++report.tensors;
    report.tensor_bytes += bytes;
    if (spec.expert >= 0) report.expert_bytes += bytes;
    if (kind == "MTP") {
      report.mtp_parameters += parameters;
      continue;
    }
    report.parameters += parameters;
    if (kind == "routed experts") expert_parameters += parameters;
    if (kind == "embedding") embedding_parameters += parameters;
  }
  std::erase_if(report.kinds, [](const TensorKindBytes& k) { return k.tensors == 0; });
  report.active_parameters = report.parameters - embedding_parameters - expert_parameters +
                             expert_parameters / config.n_routed_experts * config.num_experts_per_tok;
}

CacheBytes CacheOf(const ModelConfig& config, Numerics numerics) {
  const CacheLayout layout = CacheLayout::Make(config, numerics, config.has_mtp());
  const auto layers_of = [&](LayerKind kind) {
    return std::count(config.layer_kinds.begin(), config.layer_kinds.end(), kind);
  };
  const int64_t head = config.head_dim, index = config.index_head_dim, f32 = sizeof(float);
  CacheBytes c;
  c.numerics = std::string(NumericsName(numerics));
  c.entry = layout.entry.body_bytes + layout.entry.scale_bytes;
  c.index_key = layout.index_key.body_bytes + layout.index_key.scale_bytes;
  c.per_token = static_cast<double>(layout.page_payload_bytes) / kPageTokens;
  c.page = layout.page_bytes;
  c.page_payload = layout.page_payload_bytes;
  c.windows = layout.window * c.entry * config.num_hidden_layers;
  c.windows_with_mtp = c.windows + (config.has_mtp() ? layout.window * c.entry : 0);
  // kv and score of the previous block's first halves (4 rows) and of the current block's rows (4, twice as wide).
  c.csa_pending = layers_of(LayerKind::kCsa) * 2 * 4 * 3 * (head + index) * f32;
  c.hca_state = layers_of(LayerKind::kHca) * 3 * head * f32;
  c.last_streams = config.hc_mult * config.hidden_size * (numerics == Numerics::kRelease ? 2 : 4);
  c.slot = layout.slot_bytes;
  for (const int64_t tokens : {int64_t{8} << 10, int64_t{128} << 10, int64_t{1} << 20}) {
    if (tokens > config.max_position_embeddings) continue;
    const int64_t pages = tokens / kPageTokens;
    c.sequences.push_back({.tokens = tokens,
                           .entries = pages * layout.page_payload_bytes,
                           .windows = c.windows_with_mtp,
                           .allocated = pages * layout.page_bytes + layout.slot_bytes});
  }
  return c;
}

// Nominal memory; a tenth is kept for the driver, activations, workspaces and graphs.
constexpr struct {
  const char* name;
  int64_t memory;
} kGpus[] = {{"H100 80 GB", 80'000'000'000}, {"H200 141 GB", 141'000'000'000}, {"B200 180 GB", 180'000'000'000}};
constexpr int kMaxGpus = 64;

void AddGpus(ModelReport& report) {
  const int64_t everywhere = report.tensor_bytes - report.expert_bytes;
  const CacheBytes& cache = report.caches.front();
  for (const auto& gpu : kGpus) {
    GpuFit fit{.gpu = gpu.name, .memory = gpu.memory};
    const int64_t usable = gpu.memory / 10 * 9;
    for (int n = 1; n <= std::min(kMaxGpus, report.config.n_routed_experts); ++n) {
      const int64_t left = usable - everywhere - (report.expert_bytes + n - 1) / n;
      if (left <= 0) continue;
      fit.gpus = n;
      fit.left_for_cache = left;
      const int64_t tokens = std::min<int64_t>(int64_t{128} << 10, report.config.max_position_embeddings);
      fit.sequences_128k = left / (cache.slot + (tokens + kPageTokens - 1) / kPageTokens * cache.page);
      break;
    }
    report.gpus.push_back(fit);
  }
}

}  // namespace

ModelReport MakeModelReport(const ModelConfig& config, const Checkpoint* checkpoint) {
  ModelReport report;
  report.config = config;
  report.weights_present = checkpoint != nullptr;
  AddTensors(checkpoint, report);
  if (config.weight_format == WeightFormat::kFp8) report.caches.push_back(CacheOf(config, Numerics::kRelease));
  report.caches.push_back(CacheOf(config, Numerics::kExact));
  if (config.weight_format == WeightFormat::kFp8) AddGpus(report);
  return report;
}

absl::StatusOr<ModelReport> InspectModel(const std::string& path, CheckpointOptions options, bool hash_contents) {
  RETURN_IF_ERROR(RefuseOtherFormat(path));
  struct stat info;
  if (stat(path.c_str(), &info) == 0 && !S_ISDIR(info.st_mode)) {
    ASSIGN_OR_RETURN(const ScopedFd fd, OpenRegularFile(path));
    ASSIGN_OR_RETURN(const std::string text, ReadWholeFile(fd, path, 1 << 20));
    ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Parse(text));
    return MakeModelReport(config, nullptr);
  }
  ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Load(path));
  ASSIGN_OR_RETURN(const ScopedFd dir, OpenDirectory(path));
  if (absl::IsNotFound(FindShards(path, dir).status())) return MakeModelReport(config, nullptr);
  ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(path, std::move(options)));
  ModelReport report = MakeModelReport(config, checkpoint.get());
  if (hash_contents) report.content_hash = checkpoint->ContentHash();
  return report;
}

}  // namespace millrace
