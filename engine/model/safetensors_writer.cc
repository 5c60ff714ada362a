// SPDX-License-Identifier: Apache-2.0
// Writing safetensors: see safetensors_writer.h.
#include "engine/model/safetensors_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "engine/absl_view.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"

namespace millrace {
namespace {

absl::Status WriteAll(const ScopedFd& fd, const std::string& path, const void* data, int64_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    // Linux writes at most 2 GiB - 4 KiB a call.
    const ssize_t n = write(fd.get(), at, static_cast<size_t>(std::min<int64_t>(bytes, 1 << 30)));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(errno, path, "write");
    at += n;
    bytes -= n;
  }
  return absl::OkStatus();
}

absl::StatusOr<ScopedFd> CreateTemporary(const std::string& path, std::string& temporary) {
  temporary = absl::StrCat(path, ".tmp-", getpid());
  ScopedFd fd(open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (fd.get() < 0) {
    const int error = errno;
    temporary.clear();
    return ErrnoStatus(error, path, "create");
  }
  return fd;
}

// fsync before the rename, or a crash could leave the final name on an empty file; the directory after it, or the name
// itself could be lost.
absl::Status SyncAndRename(ScopedFd& fd, std::string& temporary, const std::string& path) {
  if (fsync(fd.get()) != 0) return ErrnoStatus(errno, path, "fsync");
  if (close(fd.release()) != 0) return ErrnoStatus(errno, path, "close");
  if (rename(temporary.c_str(), path.c_str()) != 0) return ErrnoStatus(errno, path, "rename");
  temporary.clear();
  const size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  ScopedFd dir(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (dir.get() >= 0) (void)fsync(dir.get());
  return absl::OkStatus();
}

std::string HeaderText(const std::vector<TensorToWrite>& table, int64_t& data_bytes) {
  absl::flat_hash_set<std::string> seen;
  std::string text = "{\"__metadata__\":{\"format\":\"pt\"}";
  int64_t at = 0;
  for (const TensorToWrite& tensor : table) {
    CHECK(seen.insert(tensor.name).second, absl::StrCat("tensor ", tensor.name, " written twice"));
    int64_t bytes = DTypeSize(tensor.dtype);
    for (const int64_t dim : tensor.shape) {
      CHECK(dim >= 0 && !__builtin_mul_overflow(bytes, dim, &bytes), absl::StrCat("shape of ", tensor.name));
    }
    absl::StrAppend(&text, ",", nlohmann::json(tensor.name).dump(), ":{\"dtype\":\"", AbslView(DTypeName(tensor.dtype)),
                    "\",\"shape\":", nlohmann::json(tensor.shape).dump(), ",\"data_offsets\":[", at, ",", at + bytes,
                    "]}");
    at += bytes;
  }
  text.push_back('}');
  while (text.size() % 8 != 0) text.push_back(' ');
  data_bytes = at;
  return text;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(const std::string& path,
                                                                             const std::vector<TensorToWrite>& table) {
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter);
  writer->path_ = path;
  ASSIGN_OR_RETURN(writer->fd_, CreateTemporary(path, writer->temporary_));
  const std::string header = HeaderText(table, writer->left_);
  const uint64_t length = header.size();
  RETURN_IF_ERROR(WriteAll(writer->fd_, path, &length, sizeof(length)));
  RETURN_IF_ERROR(WriteAll(writer->fd_, path, header.data(), static_cast<int64_t>(header.size())));
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

absl::Status SafetensorsWriter::Append(const void* data, int64_t bytes) {
  CHECK(bytes <= left_, absl::StrCat(path_, ": ", bytes, " bytes appended, ", left_, " left"));
  RETURN_IF_ERROR(WriteAll(fd_, path_, data, bytes));
  left_ -= bytes;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  CHECK(left_ == 0, absl::StrCat(path_, ": ", left_, " bytes missing"));
  return SyncAndRename(fd_, temporary_, path_);
}

absl::Status WriteSafetensors(const std::string& path, const std::vector<TensorToWrite>& tensors) {
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsWriter> writer, SafetensorsWriter::Create(path, tensors));
  for (const TensorToWrite& tensor : tensors) {
    int64_t bytes = DTypeSize(tensor.dtype);
    for (const int64_t dim : tensor.shape) bytes *= dim;
    RETURN_IF_ERROR(writer->Append(tensor.data, bytes));
  }
  return writer->Finish();
}

absl::Status WriteFileAtomically(const std::string& path, std::string_view text) {
  std::string temporary;
  ASSIGN_OR_RETURN(ScopedFd fd, CreateTemporary(path, temporary));
  absl::Status status = WriteAll(fd, path, text.data(), static_cast<int64_t>(text.size()));
  if (status.ok()) status = SyncAndRename(fd, temporary, path);
  if (!temporary.empty()) unlink(temporary.c_str());
  return status;
}

}  // namespace millrace
