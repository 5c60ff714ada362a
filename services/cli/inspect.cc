// SPDX-License-Identifier: Apache-2.0
// `millrace inspect`: what a checkpoint is, what it weighs, what its cache costs, what hardware it needs.
//
// A config.json alone is enough for everything but the check of the files themselves; byte counts then come from the
// architecture's inventory. Cache figures are those of the engine's own layout, so they are what will be allocated.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/cache/cache_layout.h"
#include "engine/model/checkpoint.h"
#include "engine/model/config.h"
#include "engine/model/preset_config.h"
#include "engine/model/random_checkpoint.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"
#include "services/cli/command.h"
#include "services/cli/model_loading.h"
#include "services/cli/terminal.h"

namespace millrace::cli {
namespace {

using Json = nlohmann::ordered_json;

const char* KindName(LayerKind kind) {
  return kind == LayerKind::kWindow ? "window" : kind == LayerKind::kCsa ? "CSA" : "HCA";
}

// What a tensor is for, as a person groups weights.
std::string TensorKind(const TensorSpec& spec, const ModelConfig& config) {
  if (spec.layer >= config.num_hidden_layers) return "mtp";
  if (spec.expert >= 0) return "routed experts";
  if (absl::StrContains(spec.name, "shared_experts")) return "shared experts";
  if (spec.layer < 0) return "embedding and head";
  if (absl::StrContains(spec.name, ".attn")) return "attention";
  if (absl::StrContains(spec.name, ".ffn.gate")) return "gates";
  return "norms and hyper-connections";
}

int64_t Elements(const TensorSpec& spec) {
  int64_t product = 1;
  for (int64_t d : spec.shape) product *= d;
  return product;
}

struct Cost {
  std::map<std::string, int64_t> bytes_by_kind;
  std::map<std::string, int64_t> bytes_by_dtype;
  int64_t total = 0;
  int64_t tensors = 0;
};

// From the files if they are there, else from the inventory of the architecture.
Cost WeightCost(const ModelConfig& config, const Checkpoint* checkpoint) {
  Cost cost;
  for (const TensorSpec& spec : TensorInventory(config)) {
    int64_t bytes = Elements(spec) * DTypeSize(spec.dtype);
    std::string dtype(DTypeName(spec.dtype));
    if (checkpoint != nullptr) {
      if (!checkpoint->Has(spec.name)) continue;
      const HostTensor& tensor = checkpoint->Get(spec.name);
      bytes = tensor.bytes;
      dtype = std::string(DTypeName(tensor.dtype));
    }
    cost.bytes_by_kind[TensorKind(spec, config)] += bytes;
    cost.bytes_by_dtype[dtype] += bytes;
    cost.total += bytes;
    ++cost.tensors;
  }
  return cost;
}

// Runs of equal layers: "0-1 window, 2 CSA, 3 HCA, ...".
std::string Schedule(const ModelConfig& config) {
  std::string text;
  for (size_t begin = 0; begin < config.layer_kinds.size();) {
    size_t end = begin + 1;
    while (end < config.layer_kinds.size() && config.layer_kinds[end] == config.layer_kinds[begin]) ++end;
    absl::StrAppend(&text, text.empty() ? "" : ", ", begin, end - begin > 1 ? absl::StrCat("-", end - 1) : "", " ",
                    KindName(config.layer_kinds[begin]));
    begin = end;
  }
  return text;
}

// Payload bytes that each further token adds to the compressed cache, over whole pages.
double BytesPerToken(const CacheLayout& layout) {
  return static_cast<double>(layout.page_payload_bytes) / kPageTokens;
}

struct SequenceCost {
  int64_t tokens, payload, allocated;
};
SequenceCost CostAt(const CacheLayout& layout, int64_t tokens) {
  const int64_t pages = (tokens + kPageTokens - 1) / kPageTokens;
  return {tokens, pages * layout.page_payload_bytes + layout.slot_bytes, pages * layout.page_bytes + layout.slot_bytes};
}

std::string Hardware(int64_t weights, int64_t sequence_bytes) {
  // Weights, one sequence at full context, and a tenth for activations and the runtime.
  const double need = 1.1 * static_cast<double>(weights + sequence_bytes);
  if (need < 16e9) return "runs on this kind of machine: a laptop's memory is enough (CPU backend)";
  const int h200 = static_cast<int>((need + 141e9 - 1) / 141e9);
  const int h100 = static_cast<int>((need + 80e9 - 1) / 80e9);
  return absl::StrFormat("weights and one full-length sequence: %d H200 (141 GB) or %d H100 (80 GB)", h200, h100);
}

Json Report(const ModelConfig& config, const Cost& cost, const CacheLayout& layout, bool files_checked) {
  Json kinds = Json::object(), dtypes = Json::object(), sequences = Json::array();
  for (const auto& [kind, bytes] : cost.bytes_by_kind) kinds[kind] = bytes;
  for (const auto& [dtype, bytes] : cost.bytes_by_dtype) dtypes[dtype] = bytes;
  for (int64_t tokens : {int64_t{8192}, int64_t{131072}, int64_t{1048576}}) {
    const SequenceCost at = CostAt(layout, tokens);
    sequences.push_back(Json{{"tokens", at.tokens}, {"payload_bytes", at.payload}, {"allocated_bytes", at.allocated}});
  }
  Json layers = Json::array();
  for (LayerKind kind : config.layer_kinds) layers.push_back(KindName(kind));
  return Json{
      {"architecture", "DeepSeek-V4"},
      {"files_checked", files_checked},
      {"layers", config.num_hidden_layers},
      {"layer_kinds", layers},
      {"hidden_size", config.hidden_size},
      {"attention_heads", config.num_attention_heads},
      {"head_dim", config.head_dim},
      {"routed_experts", config.n_routed_experts},
      {"experts_per_token", config.num_experts_per_tok},
      {"hash_layers", config.num_hash_layers},
      {"residual_streams", config.hc_mult},
      {"index_topk", config.index_topk},
      {"mtp", config.has_mtp()},
      {"dspark", config.dspark},
      {"vocab_size", config.vocab_size},
      {"max_context_tokens", config.max_position_embeddings},
      {"weight_format", config.weight_format == WeightFormat::kFp8 ? "released (FP8, FP4 experts)" : "plain"},
      {"tensors", cost.tensors},
      {"weight_bytes", cost.total},
      {"weight_bytes_by_kind", kinds},
      {"weight_bytes_by_dtype", dtypes},
      {"cache",
       {{"numerics", std::string(NumericsName(layout.numerics))},
        {"page_tokens", kPageTokens},
        {"page_bytes", layout.page_bytes},
        {"page_payload_bytes", layout.page_payload_bytes},
        {"bytes_per_token", BytesPerToken(layout)},
        {"slot_bytes", layout.slot_bytes},
        {"sequences", sequences}}},
      {"hardware", Hardware(cost.total, CostAt(layout, config.max_position_embeddings).allocated)}};
}

void PrintReport(const std::string& model, const ModelConfig& config, const Cost& cost, const CacheLayout& layout,
                 bool files_checked) {
  std::printf("%s: DeepSeek-V4 architecture, %d layers, hidden %lld, %d heads of %d\n", model.c_str(),
              config.num_hidden_layers, static_cast<long long>(config.hidden_size), config.num_attention_heads,
              config.head_dim);
  std::printf("  schedule    %s%s\n", Schedule(config).c_str(),
              config.has_mtp() ? "; MTP module" : config.dspark ? "; DSpark" : "");
  std::printf("  experts     %d routed, %d per token, hash-routed in the first %d layers; index top %d\n",
              config.n_routed_experts, config.num_experts_per_tok, config.num_hash_layers, config.index_topk);
  std::printf("  context     %lld tokens, vocabulary %lld\n", static_cast<long long>(config.max_position_embeddings),
              static_cast<long long>(config.vocab_size));
  std::printf("\nWeights: %s in %lld tensors%s\n", HumanBytes(cost.total).c_str(),
              static_cast<long long>(cost.tensors), files_checked ? ", every shape and dtype as expected" : " (by the architecture; no files here)");
  for (const auto& [kind, bytes] : cost.bytes_by_kind) {
    std::printf("  %-28s %15lld B  %s\n", kind.c_str(), static_cast<long long>(bytes), HumanBytes(bytes).c_str());
  }
  for (const auto& [dtype, bytes] : cost.bytes_by_dtype) {
    std::printf("  as %-25s %15lld B  %s\n", dtype.c_str(), static_cast<long long>(bytes), HumanBytes(bytes).c_str());
  }
  std::printf("\nCache (%s numerics): %.2f B per token, in pages of %d tokens and %s; %s of state per sequence\n",
              std::string(NumericsName(layout.numerics)).c_str(), BytesPerToken(layout), kPageTokens,
              HumanBytes(layout.page_bytes).c_str(), HumanBytes(layout.slot_bytes).c_str());
  for (int64_t tokens : {int64_t{8192}, int64_t{131072}, int64_t{1048576}}) {
    const SequenceCost at = CostAt(layout, tokens);
    std::printf("  %8lld tokens %15lld B  %s allocated\n", static_cast<long long>(tokens),
                static_cast<long long>(at.payload), HumanBytes(at.allocated).c_str());
  }
  std::printf("\nNeeds: %s\n",
              Hardware(cost.total, CostAt(layout, config.max_position_embeddings).allocated).c_str());
}

int MakeRandom(const std::string& preset, const std::string& out_dir, int64_t layers, int64_t experts, int64_t seed) {
  if (out_dir.empty()) return Fail("inspect", kExitUsage, "--make-random PRESET needs the folder to write as MODEL");
  const ModelPreset which = preset == "flash" ? ModelPreset::kFlash
                            : preset == "pro" ? ModelPreset::kPro
                                              : ModelPreset::kTiny;
  Progress progress("writing " + out_dir, true);
  RandomCheckpointOptions options;
  options.seed = static_cast<uint64_t>(seed);
  options.progress = [&](int64_t done, int64_t total) { progress.Update(done, total); };
  const PresetChanges changes{.layers = static_cast<int>(layers), .experts = static_cast<int>(experts)};
  if (absl::Status status = MakeRandomCheckpoint(which, changes, out_dir, options); !status.ok()) {
    return Fail("inspect", kExitCantCreate, status);
  }
  progress.Finish();
  return kExitOk;
}

}  // namespace

int RunInspect(Arguments arguments) {
  std::string model, numerics, make_random;
  bool json = false, verify = false;
  int64_t layers = 0, experts = 0, seed = 0;
  Flags flags("inspect", "Says what a checkpoint is, what it weighs and what it needs",
              "MODEL is a folder, or a config.json alone (the weights are then counted from the architecture).\n\n"
              "  millrace inspect deploy/demo/model\n"
              "  millrace inspect path/to/config.json --json\n"
              "  millrace inspect /tmp/random --make-random flash --layers 4 --experts 16");
  flags.Positional("MODEL", &model, "Folder of the checkpoint, or a config.json.");
  flags.Bool("json", &json, "One JSON object instead of text.");
  flags.Bool("verify", &verify, "Read every tensor and refuse NaN and Inf.");
  flags.Enum("numerics", &numerics, {"exact", "release"}, "Whose cache to describe. Default: as millrace run chooses.");
  flags.Enum("make-random", &make_random, {"flash", "pro", "tiny"},
             "Write a checkpoint of random weights in the released format to MODEL instead.");
  flags.Int("layers", &layers, 0, 1000, "With --make-random: only the first N layers; 0: all.");
  flags.Int("experts", &experts, 0, 100000, "With --make-random: only N routed experts; 0: all.");
  flags.Int("seed", &seed, 0, INT64_MAX, "With --make-random.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "inspect", arguments, &exit_code)) return exit_code;
  if (!make_random.empty()) return MakeRandom(make_random, model, layers, experts, seed);

  absl::StatusOr<ModelConfig> config = absl::InternalError("");
  std::unique_ptr<Checkpoint> checkpoint;
  std::error_code ignored;
  const bool is_folder = std::filesystem::is_directory(model, ignored);
  const bool has_weights = is_folder && (std::filesystem::exists(model + "/model.safetensors.index.json", ignored) ||
                                         std::filesystem::exists(model + "/model.safetensors", ignored));
  if (has_weights) {
    Progress progress("checking " + model, verify);
    CheckpointOptions options;
    options.verify_finite = verify;
    options.progress = [&](int64_t done, int64_t total) { progress.Update(done, total); };
    auto opened = Checkpoint::Open(model, std::move(options));
    if (!opened.ok()) return Fail("inspect", ModelExitCode(opened.status()), opened.status());
    if (verify) progress.Finish();
    checkpoint = *std::move(opened);
    config = checkpoint->config();
  } else if (is_folder) {
    config = ModelConfig::Load(model);
  } else {
    const absl::StatusOr<std::string> text = ReadInput(model, 1 << 20);
    if (!text.ok()) return Fail("inspect", kExitBadModel, text.status());
    config = ModelConfig::Parse(*text);
  }
  if (!config.ok()) return Fail("inspect", ModelExitCode(config.status()), config.status());

  const Numerics chosen = numerics.empty() ? (config->weight_format == WeightFormat::kFp8 ? Numerics::kRelease
                                                                                          : Numerics::kExact)
                          : numerics == "exact" ? Numerics::kExact
                                                : Numerics::kRelease;
  const CacheLayout layout = CacheLayout::Make(*config, chosen, config->has_mtp());
  const Cost cost = WeightCost(*config, checkpoint.get());
  if (json) {
    std::printf("%s\n", Report(*config, cost, layout, checkpoint != nullptr).dump(2).c_str());
  } else {
    PrintReport(model, *config, cost, layout, checkpoint != nullptr);
  }
  return kExitOk;
}

}  // namespace millrace::cli
