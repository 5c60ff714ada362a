// SPDX-License-Identifier: Apache-2.0
// Greedy and plain sampling on the device, so that a decode step brings back a few bytes a row instead of its logits.
//
// Given the same logits the token is the one that Sample (sampler.h) draws, bit for bit: the same exponential, the same
// sums in the same order, the same Philox word. What it does not do is penalties, bias, banned ids, truncation (top-k,
// top-p, min-p) and lists of best tokens: rows that ask for those are sampled on the host from their logits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/ops/sampler.h"

namespace millrace::cuda {

// One row's wish, in device memory.
struct DrawRequest {
  double inv_temperature = 1;  // of the weights that are drawn from
  double uniform = 0;          // in [0, 1): the draw, made on the host (Philox)
  int32_t row = 0;             // of the logits
  int32_t greedy = 0;
};

// What comes back. `total` is the sum of exp(logit - max): the host takes its logarithm.
struct DrawResult {
  double total = 0;
  int32_t id = -1;
  float logit = 0, max = 0;
  int32_t finite = 0;  // 0: a logit was NaN or +inf, or all are -inf
};

// Whether the device can serve this request.
bool DrawsOnDevice(const SamplingRequest& request);
DrawRequest MakeDrawRequest(const SamplingRequest& request, int32_t row);
SampledToken FinishDraw(const DrawResult& result);

int64_t DrawWorkspaceBytes(int64_t vocab, int64_t count);

// logits F32 [rows there are, vocab]; requests and results [count] in device memory; `workspace` on 256 bytes. vocab up
// to 2^21.
void DrawTokens(const float* logits, int64_t vocab, const DrawRequest* requests, int64_t count, void* workspace,
                DrawResult* results, cudaStream_t stream);

}  // namespace millrace::cuda
