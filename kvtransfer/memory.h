// SPDX-License-Identifier: Apache-2.0
// What kvtransfer knows about memory: where it starts, how long it is and of which kind.
//
// Nothing here can touch device memory. Whoever owns a kind of memory other than the host's gives MemoryFunctions: how
// to copy it and how to digest it. The transports move bytes of a kind only if they support it (Transport::Supports).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace millrace::kvtransfer {

enum class MemoryKind : uint8_t { kHost = 0, kDevice = 1 };

// Borrowed, writable. The owner keeps it alive until the transfer that got it says that it is done.
struct Memory {
  void* data = nullptr;
  size_t bytes = 0;
  MemoryKind kind = MemoryKind::kHost;
};

// Borrowed, read only. Same rule.
struct ConstMemory {
  const void* data = nullptr;
  size_t bytes = 0;
  MemoryKind kind = MemoryKind::kHost;

  ConstMemory() = default;
  ConstMemory(const void* d, size_t n, MemoryKind k = MemoryKind::kHost) : data(d), bytes(n), kind(k) {}
  ConstMemory(const Memory& m) : data(m.data), bytes(m.bytes), kind(m.kind) {}  // NOLINT: reading is always allowed
};

using DigestDone = absl::AnyInvocable<void(absl::StatusOr<uint64_t>)>;

// How to copy and digest memory. Both are called from any thread, transport threads included, and must not block for
// longer than the work takes. `digest` may answer before it returns or later, once, from any thread; the memory is held
// until then. Every party of a hand-off must use the same digest for the same bytes: the algorithm travels in messages
// and manifest and a difference is refused.
struct MemoryFunctions {
  std::function<absl::Status(Memory destination, ConstMemory source)> copy;  // equal sizes
  std::function<void(ConstMemory content, DigestDone done)> digest;  // of the bytes alone; binding is digest.h's
  uint32_t digest_algorithm = 0;                                     // DigestAlgorithm of digest.h
  // What a thread needs before a transport may touch memory of this kind on it by itself; called once on each such
  // thread, and again where another transport has been there meanwhile. Null: nothing.
  std::function<absl::Status()> attach = nullptr;
};

// memcpy and XXH3-64, answering before they return. Any other kind is InvalidArgument.
MemoryFunctions HostMemoryFunctions();

}  // namespace millrace::kvtransfer
