// SPDX-License-Identifier: Apache-2.0
// A file mapped read-only, opened without ever leaving its directory, and the guard for when it shrinks under us.
//
// Weights stay mapped for the life of a process, so a file truncated by somebody else turns a plain read into SIGBUS.
// The guard makes that an understandable end: it names the file and exits with status 72 instead of dying of a bare
// signal. Thread: any; the table of mappings is lock-free because a signal handler reads it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace millrace {

// A file descriptor that closes itself.
class ScopedFd {
 public:
  explicit ScopedFd(int fd = -1) : fd_(fd) {}
  ScopedFd(ScopedFd&& other) noexcept : fd_(other.release()) {}
  ScopedFd& operator=(ScopedFd&& other) noexcept;
  ~ScopedFd();
  int get() const { return fd_; }
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }

 private:
  int fd_;
};

// Opens a directory for OpenRegularFileBeneath. The path itself may contain symlinks: the user chose it.
absl::StatusOr<ScopedFd> OpenDirectory(const std::string& path);

// Opens regular file `name` below `dir` for reading. InvalidArgument "path escapes model directory" for absolute paths,
// "..", NUL bytes and symlinks that lead out (openat2 RESOLVE_BENEATH; kernels without it get no symlinks at all);
// InvalidArgument for anything that is not a regular file (a FIFO is not waited for); NotFound, or the errno's text.
absl::StatusOr<ScopedFd> OpenRegularFileBeneath(const ScopedFd& dir, const std::string& name);

// Opens regular file `path`, following symlinks: for files the user named, not files that a file named.
absl::StatusOr<ScopedFd> OpenRegularFile(const std::string& path);

// All of a file of at most `max_bytes`. `display` names it in errors.
absl::StatusOr<std::string> ReadWholeFile(const ScopedFd& fd, const std::string& display, int64_t max_bytes);

absl::StatusOr<int64_t> FileSize(const ScopedFd& fd, const std::string& display);

// "display: action: found errno text", with the code that fits (NotFound, PermissionDenied, ResourceExhausted ...).
absl::Status ErrnoStatus(int error, const std::string& display, const std::string& action);

// The whole of an open file, mapped. The descriptor may be closed afterwards. `display` must name the file for a
// person.
class MappedFile {
 public:
  static absl::StatusOr<std::unique_ptr<MappedFile>> Map(const ScopedFd& fd, int64_t bytes, const std::string& display);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  MappedFile() = default;
  const uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
  int guard_slot_ = -1;
};

inline constexpr int kExitMappedFileLost = 72;

// Installs the SIGBUS handler for the process: a fault inside a MappedFile prints one line naming the file and exits
// with kExitMappedFileLost; any other fault goes to the handler that was there before. Call once, early in main.
void InstallMappedFileGuard();

}  // namespace millrace
