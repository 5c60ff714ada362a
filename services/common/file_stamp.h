// SPDX-License-Identifier: Apache-2.0
// Whether a file is another one than before: for files that are read again when they change.
//
// Follows links, since Kubernetes replaces a Secret by turning one. Thread: values.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <string>

namespace millrace {

struct FileStamp {
  uint64_t device = 0, inode = 0;
  int64_t size = -1, modified_ns = 0;  // size -1: not there

  static FileStamp Of(const std::string& path) {
    struct stat found {};
    if (stat(path.c_str(), &found) != 0) return {};
    return {found.st_dev, found.st_ino, found.st_size, found.st_mtim.tv_sec * 1'000'000'000 + found.st_mtim.tv_nsec};
  }
  friend bool operator==(const FileStamp&, const FileStamp&) = default;
};

}  // namespace millrace
