// SPDX-License-Identifier: Apache-2.0
// See buffer.h.
#include "engine/device/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "engine/round_up.h"
#include "engine/status.h"

namespace millrace {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kChunk = 2 * kHugePage;
constexpr int64_t kAlignment = 128;

std::shared_ptr<uint8_t> AllocateAligned(int64_t bytes) {
  void* memory = std::aligned_alloc(kHugePage, static_cast<size_t>(RoundUp(bytes, kHugePage)));
  CHECK(memory != nullptr, absl::StrCat("cannot allocate ", bytes, " bytes"));
#ifdef MADV_HUGEPAGE
  madvise(memory, static_cast<size_t>(RoundUp(bytes, kHugePage)), MADV_HUGEPAGE);  // a wish: refused, small pages do
#endif
  std::memset(memory, 0, static_cast<size_t>(bytes));
  return {static_cast<uint8_t*>(memory), [](uint8_t* p) { std::free(p); }};
}

}  // namespace

std::shared_ptr<uint8_t> AllocateHost(int64_t bytes) {
  bytes = RoundUp(std::max<int64_t>(bytes, 1), kAlignment);
  if (bytes > kChunk / 4) return AllocateAligned(bytes);
  static std::mutex mutex;
  static std::shared_ptr<uint8_t> chunk;
  static int64_t used = kChunk;
  const std::lock_guard lock(mutex);
  if (used + bytes > kChunk) {
    chunk = AllocateAligned(kChunk);
    used = 0;
  }
  std::shared_ptr<uint8_t> part(chunk, chunk.get() + used);
  used += bytes;
  return part;
}

}  // namespace millrace
