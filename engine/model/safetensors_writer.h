// SPDX-License-Identifier: Apache-2.0
// Writes one safetensors file tensor by tensor, for data too large to hold at once.
//
// The table is fixed at Create; Append hands over the bytes in table order; Finish makes the file appear under its
// name. Until then it has a temporary name, and every failure, or forgetting to Finish, removes it. Thread: one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/checkpoint.h"
#include "engine/model/mapped_file.h"

namespace millrace {

class SafetensorsWriter {
 public:
  // `data` of each entry is not read here. CHECK-fails on a repeated name. ResourceExhausted when the disk is full.
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(const std::string& path,
                                                                   const std::vector<TensorToWrite>& table);
  ~SafetensorsWriter();

  // The next bytes of the data, any split. CHECK-fails when it is more than the table says.
  absl::Status Append(const void* data, int64_t bytes);

  // Flushes to stable storage and renames. CHECK-fails if bytes are missing.
  absl::Status Finish();

 private:
  SafetensorsWriter() = default;
  std::string path_, temporary_;
  ScopedFd fd_;
  int64_t left_ = 0;
};

// A small file in one go, with the same guarantees.
absl::Status WriteFileAtomically(const std::string& path, std::string_view text);

}  // namespace millrace
