// SPDX-License-Identifier: Apache-2.0
// Opens a checkpoint: config, shards, and the proof that together they are exactly one model.
//
// Open() reads as the list of proofs. Each failure is one line that names the file and the tensor; nothing is repaired.
#include "engine/model/checkpoint.h"

#include <algorithm>
#include <optional>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/absl_view.h"
#include "engine/model/checkpoint_manifest.h"
#include "engine/model/mapped_file.h"
#include "engine/model/shard_index.h"
#include "engine/model/tensor_scan.h"
#include "engine/status.h"

namespace millrace {
namespace {

constexpr int64_t kAlwaysScanCheckpointBytes = int64_t{1} << 30;
constexpr int64_t kAlwaysScanTensorBytes = int64_t{16} << 20;
constexpr int64_t kProgressBytes = int64_t{256} << 20;

std::string ShapeText(const std::vector<int64_t>& shape) { return absl::StrCat("[", absl::StrJoin(shape, ", "), "]"); }

// At most five of them: enough to see what kind of mistake it is.
std::string FirstFive(std::vector<std::string> names) {
  std::sort(names.begin(), names.end());
  const size_t count = names.size();
  if (count > 5) names.resize(5);
  return absl::StrCat(absl::StrJoin(names, ", "), count > 5 ? absl::StrCat(" and ", count - 5, " more") : "");
}

// A tensor found in the shards: which file and where.
struct Found {
  const HostTensor* tensor;
  size_t shard;
};
using FoundTensors = absl::flat_hash_map<std::string, Found>;

absl::Status CheckAgainstIndex(const ShardIndex& index, const FoundTensors& found, int64_t total_bytes) {
  if (index.weight_map.empty()) return absl::OkStatus();
  const auto error = [](auto... parts) { return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": ", parts...)); };
  std::vector<std::string> names;
  for (const auto& [name, where] : found) names.push_back(name);
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) {
    const std::string& file = index.files[found.at(name).shard];
    const auto listed = index.weight_map.find(name);
    if (listed == index.weight_map.end()) {
      return error("weight_map: tensor ", name, ": found nothing, expected ", file, ", which holds it");
    }
    if (listed->second != file) {
      return error("weight_map: tensor ", name, ": found ", listed->second, ", expected ", file, ", which holds it");
    }
  }
  std::vector<std::string> lacking;
  for (const auto& [name, file] : index.weight_map) {
    if (!found.contains(name)) lacking.push_back(name);
  }
  if (!lacking.empty()) {
    const std::string& first = *std::min_element(lacking.begin(), lacking.end());
    return error("weight_map: tensor ", first, ": found in no shard, expected in ", index.weight_map.at(first), " (",
                 lacking.size(), " tensors are missing)");
  }
  if (index.total_size.has_value() && *index.total_size != total_bytes) {
    return error("metadata.total_size: found ", *index.total_size, ", expected ", total_bytes,
                 ", the bytes of all tensors");
  }
  return absl::OkStatus();
}

bool DTypeAllowed(const TensorSpec& spec, DType dtype, WeightFormat format) {
  // Unquantised checkpoints come from many tools, which keep or widen BF16 as they please. Integers are never
  // converted.
  if (format == WeightFormat::kPlain && spec.dtype != DType::kI64) return dtype == DType::kBF16 || dtype == DType::kF32;
  return dtype == spec.dtype;
}

std::string AllowedDTypes(const TensorSpec& spec, WeightFormat format) {
  if (format == WeightFormat::kPlain && spec.dtype != DType::kI64)
    return "BF16 or F32 (config.json has no quantization_config)";
  return std::string(DTypeName(spec.dtype));
}

absl::Status CheckTensor(const std::string& file, const TensorSpec& spec, const HostTensor& tensor,
                         WeightFormat format) {
  if (!DTypeAllowed(spec, tensor.dtype, format)) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": tensor ", spec.name, ": dtype: found ",
                                                   AbslView(DTypeName(tensor.dtype)), ", expected ",
                                                   AllowedDTypes(spec, format)));
  }
  if (tensor.shape != spec.shape) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": tensor ", spec.name, ": shape: found ",
                                                   ShapeText(tensor.shape), ", expected ", ShapeText(spec.shape)));
  }
  return absl::OkStatus();
}

// MTP and DSpark modules beyond the one we know may lie in a checkpoint unused.
bool KnownOptional(const std::string& name) { return absl::StartsWith(name, "mtp."); }

absl::Status AddShard(const SafetensorsFile& shard, const std::string& file, size_t shard_number,
                      const ShardIndex& index, FoundTensors& found, int64_t& total_bytes) {
  for (const std::string& name : shard.names()) {
    const HostTensor* tensor = shard.Find(name);
    const auto [it, added] = found.emplace(name, Found{tensor, shard_number});
    if (!added) {
      return absl::InvalidArgumentError(absl::StrCat(file, ": duplicate tensor ", name, ": found here and in ",
                                                     index.files[it->second.shard], ", expected in one file"));
    }
    if (tensor->bytes == 0) {
      return absl::InvalidArgumentError(absl::StrCat(file, ": tensor ", name, ": shape: found ",
                                                     ShapeText(tensor->shape), ", expected no size of 0"));
    }
    total_bytes += tensor->bytes;
  }
  return absl::OkStatus();
}

// Everything the architecture has is there, as it should be, and nothing else is.
absl::Status CheckCoverage(const ModelConfig& config, const std::vector<TensorSpec>& inventory, const ShardIndex& index,
                           const FoundTensors& found) {
  const std::string where = index.weight_map.empty() ? kSingleFile : kIndexFile;
  std::vector<std::string> missing;
  absl::flat_hash_set<std::string> known;
  for (const TensorSpec& spec : inventory) {
    known.insert(spec.name);
    if (!found.contains(spec.name)) missing.push_back(spec.name);
  }
  // Shapes first: a wrong vocabulary or layer count says more than the list of what is missing because of it.
  for (const TensorSpec& spec : inventory) {
    const auto it = found.find(spec.name);
    if (it == found.end()) continue;
    RETURN_IF_ERROR(CheckTensor(index.files[it->second.shard], spec, *it->second.tensor, config.weight_format));
  }
  if (!missing.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": missing tensors: found ", missing.size(), " missing (",
                                                   FirstFive(missing), "), expected none"));
  }
  std::vector<std::string> extra;
  for (const auto& [name, at] : found) {
    if (!known.contains(name) && !KnownOptional(name)) extra.push_back(name);
  }
  if (!extra.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": unexpected tensors: found ", extra.size(), " (", FirstFive(extra), "), expected none"));
  }
  return absl::OkStatus();
}

absl::Status CheckManifestNames(const TensorHashes& manifest, const std::vector<TensorSpec>& inventory) {
  for (const TensorSpec& spec : inventory) {
    if (!manifest.contains(spec.name)) {
      return absl::InvalidArgumentError(
          absl::StrCat(kManifestFile, ": tensor ", spec.name, ": found no hash, expected one"));
    }
  }
  return absl::OkStatus();
}

// One pass over the data, in inventory order: hashes if there is a manifest, values that are not numbers, expert ids.
absl::Status CheckValues(const Checkpoint& checkpoint, const std::vector<TensorSpec>& inventory,
                         const ShardIndex& index, const FoundTensors& found,
                         const std::optional<TensorHashes>& manifest, const CheckpointOptions& options,
                         TensorHashes& hashes) {
  const bool scan_all = options.verify_finite || checkpoint.total_bytes() < kAlwaysScanCheckpointBytes;
  const auto to_scan = [&](const TensorSpec& spec, const HostTensor& tensor) {
    return scan_all || (spec.expert < 0 && tensor.bytes <= kAlwaysScanTensorBytes);
  };
  int64_t all = 0, done = 0, reported = 0;
  for (const TensorSpec& spec : inventory) {
    const HostTensor& tensor = *found.at(spec.name).tensor;
    if (manifest.has_value() || to_scan(spec, tensor)) all += tensor.bytes;
  }
  for (const TensorSpec& spec : inventory) {
    const Found& at = found.at(spec.name);
    const HostTensor& tensor = *at.tensor;
    const std::string& file = index.files[at.shard];
    if (manifest.has_value()) {
      std::string hash = TensorHash(tensor);
      if (const std::string& expected = manifest->at(spec.name); hash != expected) {
        return absl::DataLossError(absl::StrCat(file, ": tensor ", spec.name, ": hash mismatch: found ", hash,
                                                ", expected ", expected, " (damaged, or of another revision than ",
                                                kManifestFile, ")"));
      }
      hashes.emplace(spec.name, std::move(hash));
    }
    if (spec.dtype == DType::kI64) {
      RETURN_IF_ERROR(CheckExpertIds(file, spec.name, tensor, checkpoint.config().n_routed_experts));
    } else if (to_scan(spec, tensor)) {
      RETURN_IF_ERROR(CheckFinite(file, spec.name, tensor));
    }
    if (manifest.has_value() || to_scan(spec, tensor)) done += tensor.bytes;
    if (options.progress && (done - reported >= kProgressBytes || done == all) && done > reported) {
      options.progress(done, all);
      reported = done;
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& model_dir, CheckpointOptions options) {
  RETURN_IF_ERROR(RefuseOtherFormat(model_dir));
  ASSIGN_OR_RETURN(const ScopedFd dir, OpenDirectory(model_dir));
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  ASSIGN_OR_RETURN(checkpoint->config_, ModelConfig::Load(model_dir));
  ASSIGN_OR_RETURN(const ShardIndex index, FindShards(model_dir, dir));
  FoundTensors found;
  for (const std::string& file : index.files) {
    ASSIGN_OR_RETURN(ScopedFd fd, OpenRegularFileBeneath(dir, file));
    ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> shard,
                     SafetensorsFile::OpenFd(std::move(fd), file, absl::StrCat(model_dir, "/", file)));
    RETURN_IF_ERROR(AddShard(*shard, file, checkpoint->shards_.size(), index, found, checkpoint->total_bytes_));
    checkpoint->shards_.push_back(std::move(shard));
  }
  RETURN_IF_ERROR(CheckAgainstIndex(index, found, checkpoint->total_bytes_));
  const std::vector<TensorSpec> inventory = TensorInventory(checkpoint->config_);
  RETURN_IF_ERROR(CheckCoverage(checkpoint->config_, inventory, index, found));
  for (const TensorSpec& spec : inventory) checkpoint->tensors_.emplace(spec.name, found.at(spec.name).tensor);

  std::optional<TensorHashes> manifest;
  if (options.verify_manifest) {
    ASSIGN_OR_RETURN(manifest, LoadManifest(dir));
  }
  if (manifest.has_value()) RETURN_IF_ERROR(CheckManifestNames(*manifest, inventory));
  RETURN_IF_ERROR(CheckValues(*checkpoint, inventory, index, found, manifest, options, checkpoint->tensor_hashes_));
  return checkpoint;
}

std::unique_ptr<Checkpoint> Checkpoint::FromMemory(ModelConfig config, std::vector<OwnedTensor> tensors) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->config_ = std::move(config);
  checkpoint->owned_ = std::move(tensors);
  for (const OwnedTensor& t : checkpoint->owned_) {
    checkpoint->tensors_.emplace(t.name, &t.tensor);
    checkpoint->total_bytes_ += t.tensor.bytes;
  }
  const std::vector<TensorSpec> inventory = TensorInventory(checkpoint->config_);
  CHECK(checkpoint->tensors_.size() == inventory.size(), "a tensor too many, or one twice");
  for (const TensorSpec& spec : inventory) {
    const absl::Status right =
        CheckTensor("memory", spec, checkpoint->Get(spec.name), checkpoint->config_.weight_format);
    CHECK(right.ok(), std::string(right.message()));
  }
  return checkpoint;
}

bool Checkpoint::Has(std::string_view name) const { return tensors_.contains(AbslView(name)); }

const HostTensor& Checkpoint::Get(std::string_view name) const {
  const auto it = tensors_.find(AbslView(name));
  CHECK(it != tensors_.end(), absl::StrCat("no tensor ", AbslView(name), " in the inventory"));
  return *it->second;
}

const std::string& Checkpoint::ContentHash() const {
  std::call_once(content_hash_once_, [this] {
    std::vector<std::string> names;
    for (const auto& [name, tensor] : tensors_) names.push_back(name);
    std::sort(names.begin(), names.end());
    std::string table;
    for (const std::string& name : names) {
      const HostTensor& tensor = *tensors_.at(name);
      const auto known = tensor_hashes_.find(name);
      absl::StrAppend(&table, name, " ", AbslView(DTypeName(tensor.dtype)), " ", ShapeText(tensor.shape), " ",
                      known != tensor_hashes_.end() ? known->second : TensorHash(tensor), "\n");
    }
    content_hash_ = TensorHash(
        {.data = reinterpret_cast<const uint8_t*>(table.data()), .bytes = static_cast<int64_t>(table.size())});
  });
  return content_hash_;
}

}  // namespace millrace
