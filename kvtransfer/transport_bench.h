// SPDX-License-Identifier: Apache-2.0
// The transport's benchmark for a kind of memory, for the mains that know one: transport_bench_main.cc the host's,
// tests/transfer/cuda_transport_bench.cc a card's.
#pragma once

#include <cstddef>
#include <functional>

#include "kvtransfer/memory.h"

namespace millrace::kvtransfer {

struct BenchMemory {
  MemoryKind kind = MemoryKind::kHost;
  std::function<void*(size_t bytes)> allocate;  // null: none left; never freed
  MemoryFunctions functions;
};

int TransportBenchMain(int argc, char** argv, const BenchMemory& memory);

}  // namespace millrace::kvtransfer
