// SPDX-License-Identifier: Apache-2.0
// kvtransfer_bench: transport_bench.cc over host memory.
#include <cstdlib>

#include "kvtransfer/transport_bench.h"

int main(int argc, char** argv) {
  using namespace millrace::kvtransfer;
  return TransportBenchMain(
      argc, argv, {MemoryKind::kHost, [](size_t bytes) { return std::calloc(bytes, 1); }, HostMemoryFunctions()});
}
