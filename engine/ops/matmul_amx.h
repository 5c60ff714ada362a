// SPDX-License-Identifier: Apache-2.0
// The product of packed_linear.h on Intel's AMX tiles, for inputs that are BF16 values.
//
// Weights and inputs go into the tiles as BF16, exactly (E4M3, E2M1 and BF16 all fit, scales are powers of two),
// products are summed in FP32 in the order that the tile instruction fixes: 32 inputs at a time, added to the sum so
// far. One row alone is summed on vectors in that same order, so a row's bits do not depend on how many rows there are
// (matmul_test.cc). They do differ from matmul_cpu.cc's, which is why the kernel-set id names AMX. F32 weights, and K
// not a multiple of 32, stay with matmul_cpu.cc. Weights and inputs below 2^-126, scales included, count as zero.
//
// Thread: any; tiles are configured and released inside the call.
#pragma once

#include <cstdint>

#include "engine/ops/amx.h"
#include "engine/ops/packed_linear.h"

namespace millrace {

inline bool AmxTakes(const PackedLinear& w) { return w.kind() != WeightKind::kF32 && w.k() % 32 == 0; }

// Rows, times their scales, to BF16 bits [m, k]. CHECKs that nothing is lost but payloads of NaNs. AmxAvailable() must
// hold.
void NarrowRows(const ActivationRows& x, int64_t m, int64_t k, uint16_t* out);

// All m rows of BF16 bits x [m, k] times panels `begin` to `end`. AmxAvailable() and AmxTakes(w) must hold.
void AmxProduct(const PackedLinear& w, int64_t begin, int64_t end, const uint16_t* x, int64_t m, float* out,
                int64_t out_ld);

}  // namespace millrace
