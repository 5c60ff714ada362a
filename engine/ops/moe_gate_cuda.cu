// SPDX-License-Identifier: Apache-2.0
// Routing and combining: which experts a token goes to, with what weight, and the sum that comes back. One warp a row
// for the gate; the rest is bound by bytes.
#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_moe.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 128;

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

// Eight consecutive values of a row in a thread, so that one row fills a few blocks rather than a loop of one.
struct Eight {
  float v[8];
};
__device__ inline Eight LoadEight(const Bf16* at) {
  const uint4 raw = *reinterpret_cast<const uint4*>(at);
  return {{LowBf16(raw.x), HighBf16(raw.x), LowBf16(raw.y), HighBf16(raw.y), LowBf16(raw.z), HighBf16(raw.z),
           LowBf16(raw.w), HighBf16(raw.w)}};
}
__device__ inline void StoreEight(const Eight& e, Bf16* at) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = static_cast<uint32_t>(__bfloat16_as_ushort(ToBf16(e.v[2 * i]))) |
               static_cast<uint32_t>(__bfloat16_as_ushort(ToBf16(e.v[2 * i + 1]))) << 16;
  }
  *reinterpret_cast<uint4*>(at) = {pairs[0], pairs[1], pairs[2], pairs[3]};
}

__global__ void SwiGluKernel(const Bf16* g, const Bf16* p, const float* weights, const int32_t* pair_order,
                             int64_t rows, int64_t width, float limit, Bf16* a) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (i >= rows * width) return;
  const int64_t row = i / width;
  const float weight = weights == nullptr ? 1.0f : weights[pair_order == nullptr ? row : pair_order[row]];
  Eight gate = LoadEight(g + i);
  const Eight up = LoadEight(p + i);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float x = fminf(gate.v[j], limit), y = fminf(fmaxf(up.v[j], -limit), limit);
    gate.v[j] = __fmul_rn(__fmul_rn(x / (1.0f + expf(fminf(-x, 87.0f))), y), weight);
  }
  StoreEight(gate, a + i);
}

__global__ void CombineKernel(const Bf16* expert_rows, const Bf16* shared, int64_t rows, int k, int64_t dim,
                              Bf16* out) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (i >= rows * dim) return;
  const int64_t row = i / dim, at = i % dim;
  Eight y = {};
#pragma unroll 4
  for (int j = 0; j < k; ++j) {
    const Eight x = LoadEight(expert_rows + (row * k + j) * dim + at);
#pragma unroll
    for (int n = 0; n < 8; ++n) y.v[n] += x.v[n];
  }
  const Eight x = LoadEight(shared + i);
#pragma unroll
  for (int n = 0; n < 8; ++n) y.v[n] += x.v[n];
  StoreEight(y, out + i);
}

unsigned EightsBlocks(int64_t values, int threads) {
  return static_cast<unsigned>((values / 8 + threads - 1) / threads);
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

void SwiGlu(const Bf16* g, const Bf16* p, const float* weights, const int32_t* pair_order, int64_t rows, int64_t width,
            float limit, Bf16* a, cudaStream_t stream) {
  if (rows == 0) return;
  SwiGluKernel<<<EightsBlocks(rows * width, kThreads), kThreads, 0, stream>>>(g, p, weights, pair_order, rows, width,
                                                                              limit, a);
  CUDA_CHECK(cudaGetLastError());
}

void CombineExperts(const Bf16* expert_rows, const Bf16* shared, int64_t rows, int k, int64_t dim, Bf16* out,
                    cudaStream_t stream) {
  if (rows == 0) return;
  CombineKernel<<<EightsBlocks(rows * dim, kThreads), kThreads, 0, stream>>>(expert_rows, shared, rows, k, dim, out);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
