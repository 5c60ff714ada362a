// SPDX-License-Identifier: Apache-2.0
// See tensor_map.h.
#include "engine/device/tensor_map.h"

#include "absl/strings/str_cat.h"
#include "engine/device/cuda_device.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
  CHECK(result == cudaDriverEntryPointSuccess, "the driver lacks cuTensorMapEncodeTiled, which CUDA 12 brought");
  return reinterpret_cast<Encode>(function);
}

}  // namespace

CUtensorMap MakeTensorMap(TensorElement element, const void* data, int64_t rows, int64_t columns, int64_t ld,
                          int box_rows) {
  static const Encode encode = FindEncode();
  const int64_t element_bytes = element == TensorElement::kByte ? 1 : 2;
  const CUtensorMapDataType type =
      element == TensorElement::kByte ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(ld * element_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / element_bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(result == CUDA_SUCCESS,
        absl::StrCat("tensor map refused (", static_cast<int>(result), "): ", rows, " x ", columns, " elements of ",
                     element_bytes, " bytes, ", ld, " a row, boxes of ", box_rows, " rows"));
  return map;
}

}  // namespace millrace::cuda
