// SPDX-License-Identifier: Apache-2.0
// The optional table of tensor hashes: see checkpoint_manifest.h.
#include "engine/model/checkpoint_manifest.h"

#include <xxhash.h>

#include "absl/strings/str_cat.h"
#include "engine/model/safetensors_writer.h"
#include "engine/status.h"
#include "engine/strict_json.h"

namespace millrace {
namespace {

constexpr int64_t kMaxManifestBytes = 64 << 20;
constexpr char kFormat[] = "millrace-manifest-1";
constexpr char kHash[] = "xxh3-128";

bool IsHash(const nlohmann::json& value) {
  if (!value.is_string()) return false;
  const auto& text = value.get_ref<const std::string&>();
  return text.size() == 32 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

}  // namespace

std::string TensorHash(const HostTensor& tensor) {
  const XXH128_hash_t hash = XXH3_128bits(tensor.data, static_cast<size_t>(tensor.bytes));
  return absl::StrCat(absl::Hex(hash.high64, absl::kZeroPad16), absl::Hex(hash.low64, absl::kZeroPad16));
}

absl::StatusOr<std::optional<TensorHashes>> LoadManifest(const ScopedFd& model_dir) {
  absl::StatusOr<ScopedFd> fd = OpenRegularFileBeneath(model_dir, kManifestFile);
  if (absl::IsNotFound(fd.status())) return std::optional<TensorHashes>();
  if (!fd.ok()) return fd.status();
  ASSIGN_OR_RETURN(const std::string text, ReadWholeFile(*fd, kManifestFile, kMaxManifestBytes));
  ASSIGN_OR_RETURN(
      const nlohmann::json root,
      ParseJsonObject(text, kManifestFile, {.max_depth = 2, .max_values = 1 << 20, .max_string_bytes = 256}));
  const auto error = [](auto... parts) {
    return absl::InvalidArgumentError(absl::StrCat(kManifestFile, ": ", parts...));
  };
  for (const auto& [key, allowed] : {std::pair{"format", kFormat}, std::pair{"hash", kHash}}) {
    const nlohmann::json found = root.value(key, nlohmann::json());
    if (found != allowed) return error(key, ": found ", JsonForError(found), ", expected \"", allowed, "\"");
  }
  if (!root.contains("tensors") || !root["tensors"].is_object()) return error("tensors: found no object, expected one");
  TensorHashes hashes;
  for (const auto& item : root["tensors"].items()) {
    if (!IsHash(item.value())) {
      return error("tensors: ", JsonForError(item.key()), ": found ", JsonForError(item.value()),
                   ", expected 32 hex digits");
    }
    hashes.emplace(item.key(), item.value().get<std::string>());
  }
  return std::optional<TensorHashes>(std::move(hashes));
}

absl::Status WriteManifest(const Checkpoint& checkpoint, const std::string& model_dir) {
  nlohmann::json tensors = nlohmann::json::object();
  for (const TensorSpec& spec : TensorInventory(checkpoint.config())) {
    tensors[spec.name] = TensorHash(checkpoint.Get(spec.name));
  }
  const nlohmann::json root = {{"format", kFormat}, {"hash", kHash}, {"tensors", std::move(tensors)}};
  return WriteFileAtomically(absl::StrCat(model_dir, "/", kManifestFile), root.dump(1) + "\n");
}

}  // namespace millrace
