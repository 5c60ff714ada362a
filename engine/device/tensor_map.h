// SPDX-License-Identifier: Apache-2.0
// Describes a matrix in device memory to the tensor copy engine: what a kernel with bulk tensor copies takes by value.
//
// The driver encodes the description; it is found at run time, never linked. Encoding is host work of well under a
// microsecond and allocates nothing, so launchers do it at each call.
// Thread: any, once a device is open.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace millrace::cuda {

enum class TensorElement { kByte, kBf16 };

// `rows` x `columns` elements, `ld` elements from one row to the next, copied in boxes of `box_rows` rows x 128 bytes,
// swizzled over 1024 bytes of shared memory. `data` and every row start on 16 bytes; box_rows 1 to 256. What a box has
// outside the matrix arrives as zeros. CHECK-fails on a description that the driver refuses.
CUtensorMap MakeTensorMap(TensorElement element, const void* data, int64_t rows, int64_t columns, int64_t ld,
                          int box_rows);

}  // namespace millrace::cuda
