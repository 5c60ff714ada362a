// SPDX-License-Identifier: Apache-2.0
// cuda_transport_bench: kvtransfer's benchmark (transport_bench.cc) over the memory of a card, between two processes
// that share it. With UCX's CUDA build in LD_LIBRARY_PATH; kvtransfer/bench.sh takes turns with `ucx_perftest -m cuda`.
#include <cstdio>

#include "engine/device/cuda_device.h"
#include "engine/device/device_copy.h"
#include "kvtransfer/transport_bench.h"
#include "services/common/cache_extents.h"

int main(int argc, char** argv) {
  using namespace millrace;
  if (const absl::Status attached = AttachDevice(); !attached.ok()) {
    std::fprintf(stderr, "cuda_transport_bench: %s\n", attached.ToString().c_str());
    return 1;
  }
  const auto allocate = [](size_t bytes) -> void* {
    auto buffer = cuda::DeviceBuffer::Take(static_cast<int64_t>(bytes), "bench");
    return buffer.ok() ? (new cuda::DeviceBuffer(*std::move(buffer)))->data() : nullptr;
  };
  return kvtransfer::TransportBenchMain(argc, argv,
                                        {kvtransfer::MemoryKind::kDevice, allocate, CacheMemoryFunctions()});
}
