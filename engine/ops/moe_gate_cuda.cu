// SPDX-License-Identifier: Apache-2.0
// Routing: which experts a token goes to, and with what weight. One warp a row.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_moe.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

// Best first, ties to the lower expert.
__device__ inline bool Better(float a, int a_index, float b, int b_index) { return a != b ? a > b : a_index < b_index; }

__global__ void GateKernel(float* logits, int num_experts, const float* bias, const int32_t* tid2eid,
                           const int32_t* ids, int64_t rows, int k, float route_scale, int32_t* experts,
                           float* weights) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  float* scores = logits + row * num_experts;
  float biased[kMaxExperts / 32];
#pragma unroll
  for (int i = 0; i < kMaxExperts / 32; ++i) {
    const int e = i * 32 + lane;
    biased[i] = -INFINITY;
    if (e >= num_experts) continue;
    const float x = scores[e];
    const float score = sqrtf(x > 20 ? x : log1pf(expf(x)));
    scores[e] = score;
    // A NaN compares with nothing: it must lose, or the choice would run past the last expert.
    if (bias != nullptr && score + bias[e] > -INFINITY) biased[i] = score + bias[e];
  }
  int chosen = num_experts;  // lane j < k holds the j-th
  if (tid2eid != nullptr) {
    if (lane < k) chosen = tid2eid[static_cast<int64_t>(ids[row]) * k + lane];
  } else {
    for (int j = 0; j < k; ++j) {
      float best = -INFINITY;
      int best_index = kMaxExperts;
#pragma unroll
      for (int i = 0; i < kMaxExperts / 32; ++i) {
        if (Better(biased[i], i * 32 + lane, best, best_index)) {
          best = biased[i];
          best_index = i * 32 + lane;
        }
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(kFullWarp, best, offset);
        const int other_index = __shfl_xor_sync(kFullWarp, best_index, offset);
        if (Better(other, other_index, best, best_index)) {
          best = other;
          best_index = other_index;
        }
      }
      if (lane == j) chosen = best_index;
#pragma unroll
      for (int i = 0; i < kMaxExperts / 32; ++i) {
        if (i * 32 + lane == best_index) biased[i] = -INFINITY;
      }
    }
  }
  // Ascending: a lane's place is how many are smaller (a table may name an expert twice; the lower lane goes first).
  int place = 0;
  for (int j = 0; j < k; ++j) {
    const int other = __shfl_sync(kFullWarp, chosen, j);
    if (other < chosen || (other == chosen && j < lane)) ++place;
  }
  __syncwarp();  // scores of all lanes are written
  if (lane < k) experts[row * k + place] = chosen;
  __syncwarp();
  float sum = 0;
  for (int j = 0; j < k; ++j) sum += scores[experts[row * k + j]];
  if (lane < k) weights[row * k + lane] = scores[experts[row * k + lane]] / sum * route_scale;
}

}  // namespace

void Gate(float* logits, int num_experts, const float* bias, const int32_t* tid2eid, const int32_t* ids, int64_t rows,
          int k, float route_scale, int32_t* experts, float* weights, cudaStream_t stream) {
  if (rows == 0) return;
  CHECK(num_experts <= kMaxExperts && k <= kMaxTopK, "an engine checks these when it is made");
  GateKernel<<<static_cast<unsigned>((rows + 3) / 4), 128, 0, stream>>>(logits, num_experts, bias, tid2eid, ids, rows,
                                                                        k, route_scale, experts, weights);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
