// SPDX-License-Identifier: Apache-2.0
// A checkpoint on disk: safetensors shards, mapped read-only, and a table name -> tensor.
//
// Open() proves once that the files hold exactly the tensors this model has, with the shapes and dtypes it needs; after
// that a lookup cannot fail. It does not dequantise, copy or interpret weights (engine/model/weights does). It never
// follows a path out of the model directory and never executes anything. Thread: immutable after Open.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "engine/model/config.h"

namespace millrace {

enum class DType : uint8_t { kF32, kBF16, kF16, kI64, kI32, kI8, kU8, kF8E4M3, kF8E8M0 };

// Bytes of one element, and the name safetensors gives the type ("F8_E4M3").
int DTypeSize(DType dtype);
std::string_view DTypeName(DType dtype);

// A view of one tensor in the mapping. `data` is valid while its Checkpoint or SafetensorsFile lives; it may be
// unaligned for its dtype, so read it with memcpy.
struct HostTensor {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;
  int64_t bytes = 0;
  int64_t elements() const;
};

class MappedFile;  // engine/model/mapped_file.h
class ScopedFd;

// One safetensors file, every rule of the format checked (offsets tile the buffer, sizes multiply without overflow
// ...).
class SafetensorsFile {
 public:
  // Symlinks are followed: the user named this file. Zero-size tensors are allowed here, never in a Checkpoint.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::vector<std::string>& names() const { return names_; }  // in file order
  const HostTensor* Find(std::string_view name) const;              // null if absent

 private:
  SafetensorsFile();
  // `name` is what errors call the file, `path` what a person needs if it is damaged while mapped.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> OpenFd(ScopedFd fd, const std::string& name,
                                                                 const std::string& path);

  std::string name_;
  std::unique_ptr<MappedFile> map_;
  std::vector<std::string> names_;
  absl::flat_hash_map<std::string, HostTensor> tensors_;
  friend class Checkpoint;
};

// One tensor the architecture has: what the inventory test and the loader check against.
struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;
  DType dtype;      // of the released layout; kPlain checkpoints may hold BF16 or F32 instead
  bool quantised;   // kPlain checkpoints have it as BF16/F32 with the unpacked shape and without `.scale`
  int layer = -1;   // backbone layer, -1 top level, L for MTP
  int expert = -1;  // routed expert id or -1
};

// Every tensor a checkpoint of this configuration must hold (spec: docs/model.md, "Checkpoint"), in a fixed order.
std::vector<TensorSpec> TensorInventory(const ModelConfig& config);

struct CheckpointOptions {
  // Scan every tensor for NaN and Inf. Without it: everything in checkpoints below 1 GiB, in larger ones the tensors
  // outside the routed experts of at most 16 MiB (norms, gates, scales), so that a start reads no weights twice.
  bool verify_finite = false;
  // If the directory has a manifest.json (checkpoint_manifest.h), hash every tensor and compare. Reads all bytes.
  bool verify_manifest = true;
  // Called now and then while shards are opened and scanned: bytes done, bytes in all.
  std::function<void(int64_t, int64_t)> progress;
};

class Checkpoint {
 public:
  // Errors are one line: "file: field: found X, expected Y"; InvalidArgument for a bad checkpoint, NotFound for a
  // missing file, Unimplemented for a format we do not read (pickle, GGUF).
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& model_dir, CheckpointOptions options = {});

  // One that never was a file (random_checkpoint.h). CHECK-fails unless the tensors are the inventory's.
  struct OwnedTensor {
    std::string name;
    std::unique_ptr<uint8_t[]> memory;
    HostTensor tensor;  // of `memory`
  };
  static std::unique_ptr<Checkpoint> FromMemory(ModelConfig config, std::vector<OwnedTensor> tensors);

  const ModelConfig& config() const { return config_; }
  bool Has(std::string_view name) const;
  // CHECK-fails on a name that TensorInventory(config()) does not list.
  const HostTensor& Get(std::string_view name) const;
  int64_t total_bytes() const { return total_bytes_; }
  // Hex XXH3-128 over names, dtypes, shapes and data of the inventory's tensors: reads every byte on the first call (or
  // at Open if a manifest was verified), then cached; part of the compatibility hash.
  const std::string& ContentHash() const;

 private:
  ModelConfig config_;
  std::vector<std::unique_ptr<SafetensorsFile>> shards_;
  std::vector<OwnedTensor> owned_;  // of a checkpoint that has no shards
  absl::flat_hash_map<std::string, const HostTensor*> tensors_;
  // Tensor -> hex XXH3-128 of its bytes, filled if Open had to compute them.
  absl::flat_hash_map<std::string, std::string> tensor_hashes_;
  int64_t total_bytes_ = 0;
  mutable std::once_flag content_hash_once_;
  mutable std::string content_hash_;
};

// Writes one safetensors file (used by `score` and by `inspect --make-random`): header padded to 8 bytes, tensors in
// the order given. Written to a temporary name and renamed, so a full disk leaves no half file.
struct TensorToWrite {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  const void* data;  // elements * DTypeSize bytes
};
absl::Status WriteSafetensors(const std::string& path, const std::vector<TensorToWrite>& tensors);

}  // namespace millrace
