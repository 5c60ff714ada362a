// SPDX-License-Identifier: Apache-2.0
// Finding the weights of a model directory: see shard_index.h.
#include "engine/model/shard_index.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "engine/strict_json.h"

namespace millrace {
namespace {

constexpr int64_t kMaxIndexBytes = 64 << 20;  // Pro's is 13 MB
constexpr size_t kMaxShards = 1000;

constexpr const char* kOtherFormats[] = {".bin",    ".pt",   ".pth",  ".ckpt", ".pkl",
                                         ".pickle", ".gguf", ".ggml", ".h5",   ".onnx"};

bool IsOtherFormat(absl::string_view name) {
  return std::any_of(std::begin(kOtherFormats), std::end(kOtherFormats),
                     [&](const char* suffix) { return absl::EndsWithIgnoreCase(name, suffix); });
}

absl::Status UnsupportedFormat(const std::string& name) {
  return absl::UnimplementedError(absl::StrCat(name, ": unsupported format: found ", name.substr(name.rfind('.') + 1),
                                               ", expected safetensors in DeepSeek's released layout"));
}

absl::StatusOr<std::vector<std::string>> ListDirectory(const std::string& path, const ScopedFd& dir) {
  const int fd = openat(dir.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return ErrnoStatus(errno, path, "list model directory");
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(fdopendir(fd), closedir);
  if (stream == nullptr) return ErrnoStatus(errno, path, "list model directory");
  std::vector<std::string> names;
  while (const dirent* entry = readdir(stream.get())) names.push_back(entry->d_name);
  std::sort(names.begin(), names.end());  // errors must not depend on the file system's order
  return names;
}

// "model-00001-of-00046.safetensors"
bool LooksLikeShard(absl::string_view name) {
  if (!absl::StartsWith(name, "model-") || !absl::EndsWith(name, ".safetensors")) return false;
  return name.find("-of-") != absl::string_view::npos;
}

}  // namespace

absl::StatusOr<ShardIndex> ParseShardIndex(std::string_view json_text) {
  const auto error = [](auto... parts) { return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": ", parts...)); };
  ASSIGN_OR_RETURN(
      const nlohmann::json root,
      ParseJsonObject(json_text, kIndexFile, {.max_depth = 4, .max_values = 1 << 20, .max_string_bytes = 4096}));
  ShardIndex index;
  if (root.contains("metadata") && root["metadata"].is_object() && root["metadata"].contains("total_size")) {
    const nlohmann::json& total = root["metadata"]["total_size"];
    if (!total.is_number_unsigned() || total.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
      return error("metadata.total_size: found ", JsonForError(total), ", expected a number of bytes below 2^63");
    }
    index.total_size = total.get<int64_t>();
  }
  if (!root.contains("weight_map") || !root["weight_map"].is_object() || root["weight_map"].empty()) {
    return error("weight_map: found ", root.contains("weight_map") ? JsonForError(root["weight_map"]) : "nothing",
                 ", expected an object of tensor names and their files");
  }
  absl::flat_hash_set<std::string> files;
  for (const auto& item : root["weight_map"].items()) {
    if (!item.value().is_string()) {
      return error("weight_map: tensor ", JsonForError(item.key()), ": found ", JsonForError(item.value()),
                   ", expected a file name");
    }
    const std::string& file = item.value().get_ref<const std::string&>();
    if (IsOtherFormat(file)) return UnsupportedFormat(file);
    files.insert(file);
    if (files.size() > kMaxShards) return error("weight_map: found more than ", kMaxShards, " files");
    index.weight_map.emplace(item.key(), file);
  }
  index.files.assign(files.begin(), files.end());
  std::sort(index.files.begin(), index.files.end());
  return index;
}

absl::StatusOr<ShardIndex> FindShards(const std::string& model_dir, const ScopedFd& dir) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(model_dir, dir));
  const auto has = [&](const char* name) { return std::binary_search(names.begin(), names.end(), name); };
  if (has(kSingleFile) && has(kIndexFile)) {
    return absl::InvalidArgumentError(
        absl::StrCat(kIndexFile, ": found beside ", kSingleFile, ", expected only one of them"));
  }
  if (has(kSingleFile)) return ShardIndex{.files = {kSingleFile}};
  if (!has(kIndexFile)) {
    for (const std::string& name : names) {
      if (IsOtherFormat(name)) return UnsupportedFormat(name);
    }
    return absl::NotFoundError(
        absl::StrCat(model_dir, ": weights: found neither ", kSingleFile, " nor ", kIndexFile, ", expected one"));
  }
  ASSIGN_OR_RETURN(const ScopedFd fd, OpenRegularFileBeneath(dir, kIndexFile));
  ASSIGN_OR_RETURN(const std::string text, ReadWholeFile(fd, kIndexFile, kMaxIndexBytes));
  ASSIGN_OR_RETURN(ShardIndex index, ParseShardIndex(text));
  for (const std::string& name : names) {
    if (LooksLikeShard(name) && !std::binary_search(index.files.begin(), index.files.end(), name)) {
      return absl::InvalidArgumentError(absl::StrCat(kIndexFile, ": weight_map: found no tensor in ", name,
                                                     ", expected every shard of the directory to be listed"));
    }
  }
  return index;
}

absl::Status RefuseOtherFormat(const std::string& path) {
  struct stat info;
  if (IsOtherFormat(path) && stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode)) return UnsupportedFormat(path);
  return absl::OkStatus();
}

}  // namespace millrace
