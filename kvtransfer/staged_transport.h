// SPDX-License-Identifier: Apache-2.0
// A decorator that carries device memory over a transport that knows host memory only.
//
// What leaves is copied to a host buffer first, what arrives lands in one and is copied on before the receiver hears of
// it; the copies are the MemoryFunctions'. Host memory passes through untouched. The promises of transport.h hold: a
// destination is not touched any more once its `done` has been called, and it is written by whole payloads only.
// Buffers are bounded in all: a send that finds no room is refused as if the queue were full (the sender tries again),
// an arrival that finds none fails (the receiver asks for it again).
//
// Slower than a transport that reaches the device by itself, by one copy each way; right wherever the other one runs.
// Thread: as the transport beneath; copies run on the sending and on the transport thread.
#pragma once

#include <cstddef>
#include <memory>

#include "kvtransfer/memory.h"
#include "kvtransfer/transport.h"

namespace millrace::kvtransfer {

// `max_staging_bytes` is of both directions together; one message larger than it goes alone.
std::unique_ptr<Transport> StageDeviceMemory(std::unique_ptr<Transport> inner, MemoryFunctions memory,
                                             size_t max_staging_bytes = size_t{1} << 30);

}  // namespace millrace::kvtransfer
