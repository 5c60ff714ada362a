// SPDX-License-Identifier: Apache-2.0
// Opening, mapping and guarding model files: see mapped_file.h.
#include "engine/model/mapped_file.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/status.h"

namespace millrace {
namespace {

// O_NONBLOCK: opening a FIFO nobody writes to must not wait for ever; it means nothing for regular files.
constexpr int kOpenFlags = O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;

absl::Status EscapesDirectory(const std::string& name) {
  // Printed escaped: the name comes from a file and may hold anything.
  std::string shown;
  for (const char c : name.substr(0, 200)) {
    if (c >= 0x20 && c < 0x7f) {
      shown.push_back(c);
    } else {
      absl::StrAppend(&shown, "\\x", absl::Hex(static_cast<uint8_t>(c), absl::kZeroPad2));
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      shown, ": path escapes model directory: found a name that leads outside, expected a file inside it"));
}

// Without symlinks, ".." and absolute paths there is no way out; used where the kernel cannot enforce it.
absl::StatusOr<int> OpenWithoutSymlinks(int dir, const std::string& name) {
  std::vector<std::string> parts = absl::StrSplit(name, '/', absl::SkipEmpty());
  ScopedFd at(fcntl(dir, F_DUPFD_CLOEXEC, 0));
  for (size_t i = 0; i < parts.size() && at.get() >= 0; ++i) {
    const bool last = i + 1 == parts.size();
    at = ScopedFd(openat(at.get(), parts[i].c_str(),
                         last ? kOpenFlags | O_NOFOLLOW : O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  }
  if (at.get() >= 0) return at.release();
  if (errno == ELOOP) return EscapesDirectory(name);
  return ErrnoStatus(errno, name, "open");
}

absl::StatusOr<ScopedFd> RequireRegular(ScopedFd fd, const std::string& display) {
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return ErrnoStatus(errno, display, "stat");
  if (S_ISREG(info.st_mode)) return fd;
  const char* kind = S_ISDIR(info.st_mode)    ? "a directory"
                     : S_ISFIFO(info.st_mode) ? "a FIFO"
                     : S_ISCHR(info.st_mode)  ? "a character device"
                     : S_ISBLK(info.st_mode)  ? "a block device"
                                              : "something else";
  return absl::InvalidArgumentError(absl::StrCat(display, ": file type: found ", kind, ", expected a regular file"));
}

// ---- the table of mappings, read by the signal handler ----

struct GuardSlot {
  std::atomic<uintptr_t> begin{0};  // 0: free or being filled
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> taken{false};
  char name[512];
};
constexpr int kGuardSlots = 1024;  // Pro has 64 shards; a process holds one or two models
GuardSlot guard_slots[kGuardSlots];
struct sigaction previous_sigbus;

int AddToGuard(const uint8_t* data, int64_t bytes, const std::string& display) {
  for (int i = 0; i < kGuardSlots; ++i) {
    GuardSlot& slot = guard_slots[i];
    if (slot.taken.exchange(true)) continue;
    const size_t length = std::min(display.size(), sizeof(slot.name) - 1);
    std::memcpy(slot.name, display.data(), length);
    slot.name[length] = '\0';
    slot.end.store(reinterpret_cast<uintptr_t>(data) + bytes);
    slot.begin.store(reinterpret_cast<uintptr_t>(data), std::memory_order_release);
    return i;
  }
  return -1;  // more files than slots: those only lose the friendly message
}

void RemoveFromGuard(int index) {
  if (index < 0) return;
  guard_slots[index].begin.store(0);
  guard_slots[index].taken.store(false);
}

void WriteAll(const char* text) {
  size_t left = std::strlen(text);
  while (left > 0) {
    const ssize_t n = write(STDERR_FILENO, text, left);
    if (n <= 0) return;
    text += n;
    left -= static_cast<size_t>(n);
  }
}

// Async-signal-safe throughout: atomics, write(2), _exit(2).
void OnSigbus(int signal_number, siginfo_t* info, void*) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const GuardSlot& slot : guard_slots) {
    const uintptr_t begin = slot.begin.load(std::memory_order_acquire);
    if (begin == 0 || address < begin || address >= slot.end.load()) continue;
    WriteAll(slot.name);
    WriteAll(
        ": file size: found shorter than when it was mapped, expected unchanged (truncated or its storage failed)\n");
    _exit(kExitMappedFileLost);
  }
  // Not ours: hand it to whoever was there; returning re-executes the faulting instruction under that handler.
  sigaction(signal_number, &previous_sigbus, nullptr);
}

}  // namespace

ScopedFd& ScopedFd::operator=(ScopedFd&& other) noexcept {
  if (this != &other) {
    const int saved_errno = errno;  // callers look at errno of the open() that made `other`
    if (fd_ >= 0) close(fd_);
    fd_ = other.release();
    errno = saved_errno;
  }
  return *this;
}

ScopedFd::~ScopedFd() {
  if (fd_ >= 0) close(fd_);
}

absl::Status ErrnoStatus(int error, const std::string& display, const std::string& action) {
  const std::string message = absl::StrCat(display, ": ", action, ": found error \"", strerror(error), "\"");
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(message);
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case ENOMEM:
    case EMFILE:
    case ENFILE:
      return absl::ResourceExhaustedError(message);
    case EIO:
    case ESTALE:
    case ETIMEDOUT:
      return absl::UnavailableError(message);
    default:
      return absl::InvalidArgumentError(message);
  }
}

absl::StatusOr<ScopedFd> OpenDirectory(const std::string& path) {
  ScopedFd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) return ErrnoStatus(errno, path, "open model directory");
  return fd;
}

absl::StatusOr<ScopedFd> OpenRegularFileBeneath(const ScopedFd& dir, const std::string& name) {
  if (name.empty() || name.size() > 4096 || name.front() == '/' || name.find('\0') != std::string::npos) {
    return EscapesDirectory(name);
  }
  // "a/../b" stays inside for the kernel, yet no honest index contains it.
  for (absl::string_view part : absl::StrSplit(name, '/')) {
    if (part == "..") return EscapesDirectory(name);
  }
  open_how how = {};
  how.flags = kOpenFlags;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
  int fd = static_cast<int>(syscall(SYS_openat2, dir.get(), name.c_str(), &how, sizeof(how)));
  if (fd < 0 && (errno == ENOSYS || errno == EPERM)) {  // old kernel, or a sandbox that does not know the call
    ASSIGN_OR_RETURN(fd, OpenWithoutSymlinks(dir.get(), name));
  } else if (fd < 0) {
    if (errno == EXDEV || errno == ELOOP) return EscapesDirectory(name);
    return ErrnoStatus(errno, name, "open");
  }
  return RequireRegular(ScopedFd(fd), name);
}

absl::StatusOr<ScopedFd> OpenRegularFile(const std::string& path) {
  ScopedFd fd(open(path.c_str(), kOpenFlags));
  if (fd.get() < 0) return ErrnoStatus(errno, path, "open");
  return RequireRegular(std::move(fd), path);
}

absl::StatusOr<int64_t> FileSize(const ScopedFd& fd, const std::string& display) {
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return ErrnoStatus(errno, display, "stat");
  return static_cast<int64_t>(info.st_size);
}

absl::StatusOr<std::string> ReadWholeFile(const ScopedFd& fd, const std::string& display, int64_t max_bytes) {
  ASSIGN_OR_RETURN(const int64_t size, FileSize(fd, display));
  if (size > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(display, ": file size: found ", size, " bytes, expected at most ", max_bytes));
  }
  std::string text(static_cast<size_t>(size), '\0');
  int64_t done = 0;
  while (done < size) {
    const ssize_t n = pread(fd.get(), text.data() + done, static_cast<size_t>(size - done), done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(errno, display, "read");
    if (n == 0) {
      return absl::DataLossError(absl::StrCat(display, ": file size: found ", done, " bytes, expected ", size));
    }
    done += n;
  }
  return text;
}

absl::StatusOr<std::unique_ptr<MappedFile>> MappedFile::Map(const ScopedFd& fd, int64_t bytes,
                                                            const std::string& display) {
  CHECK(bytes > 0, absl::StrCat(display, " has ", bytes, " bytes"));
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED) return ErrnoStatus(errno, display, "mmap");
  std::unique_ptr<MappedFile> file(new MappedFile);
  file->data_ = static_cast<const uint8_t*>(data);
  file->bytes_ = bytes;
  file->guard_slot_ = AddToGuard(file->data_, bytes, display);
  return file;
}

MappedFile::~MappedFile() {
  if (data_ == nullptr) return;
  RemoveFromGuard(guard_slot_);
  munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(bytes_));
}

void InstallMappedFileGuard() {
  static std::atomic<bool> installed{false};
  if (installed.exchange(true)) return;
  struct sigaction action = {};
  action.sa_sigaction = OnSigbus;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  CHECK(sigaction(SIGBUS, &action, &previous_sigbus) == 0, strerror(errno));
}

}  // namespace millrace
