// SPDX-License-Identifier: Apache-2.0
// What a pass sends up to the device, as one block of memory that is laid out twice: in page-locked memory, where it is
// filled, and on the device, where kernels read it. Sizes are the engine's limits, so the layout never changes and a
// captured step finds every array where it was. Thread: engine thread.
#pragma once

#include <cstdint>

#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_pass.h"
#include "engine/ops/cuda_sampler.h"

namespace millrace::cuda {

// The rows of a pass as they lie in one block of memory; laid out twice, over the host's copy and the device's.
struct PassBlock {
  int32_t *token_ids = nullptr, *positions = nullptr, *row_sequence = nullptr;
  SequenceView* sequences = nullptr;

  static PassBlock LayOut(Bump& bump, int64_t rows, int sequences) {
    return {bump.Take<int32_t>(rows), bump.Take<int32_t>(rows), bump.Take<int32_t>(rows),
            bump.Take<SequenceView>(sequences)};
  }
};

struct UploadBlock {
  PassBlock backbone, mtp;
  int32_t* backbone_sequence = nullptr;  // of the MTP pass's sequences
  int32_t* logit_rows = nullptr;
  DrawRequest* draws = nullptr;  // of the rows that are sampled, in the order of logit_rows
  int64_t bytes = 0;

  // At most two wanted rows a row: a logit row that is sampled too is asked for twice.
  static UploadBlock LayOut(uint8_t* base, int64_t rows, int sequences) {
    Bump bump(base);
    UploadBlock b;
    b.backbone = PassBlock::LayOut(bump, rows, sequences);
    b.mtp = PassBlock::LayOut(bump, rows, sequences);
    b.backbone_sequence = bump.Take<int32_t>(sequences);
    b.logit_rows = bump.Take<int32_t>(2 * rows);
    b.draws = bump.Take<DrawRequest>(sequences);
    b.bytes = bump.used();
    return b;
  }
};

}  // namespace millrace::cuda
