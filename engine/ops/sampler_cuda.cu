// SPDX-License-Identifier: Apache-2.0
// The sampler of sampler_cpu.cc for rows without truncation: one block a row, the same double arithmetic.
//
// Weights of 1,024 ids make a partial sum of eight lanes (id mod 8), as on the CPU; a thread here is one lane of one
// such block of ids, so that a row of the released vocabulary has 1,016 chains of 128 additions. Bound: the FP64 pipe
// of one multiprocessor, some 25 us a row. This file is built without contraction to FMA: every product and sum is
// rounded by itself, as in its twin.
#include <algorithm>
#include <cmath>

#include "engine/device/cuda_device.h"
#include "engine/ops/cuda_format.cuh"
#include "engine/ops/cuda_sampler.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBlock = 1024;  // ids per partial sum
constexpr int kLanes = 8;
constexpr float kGreedyTemperature = 1e-5f;  // as the CPU's

// exp(x) for x <= 0, 0 below -708 and for NaN: the CPU's series, operation by operation.
__device__ inline double SamplerExp(double x) {
  const bool live = x >= -708.0;
  const double clamped = live ? x : 0.0;
  const double shifted = clamped * 0x1.71547652b82fep0 + 0x1.8p52;
  const double n = shifted - 0x1.8p52;
  const double r = (clamped - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  const double q = r * r;
  double odd = q * (1.0 / 6227020800.0) + 1.0 / 39916800.0;
  double even = q * (1.0 / 479001600.0) + 1.0 / 3628800.0;
  odd = odd * q + 1.0 / 362880.0;
  even = even * q + 1.0 / 40320.0;
  odd = odd * q + 1.0 / 5040.0;
  even = even * q + 1.0 / 720.0;
  odd = odd * q + 1.0 / 120.0;
  even = even * q + 1.0 / 24.0;
  odd = odd * q + 1.0 / 6.0;
  even = even * q + 0.5;
  odd = odd * q + 1.0;
  even = even * q + 1.0;
  const double p = odd * r + even;
  const long long bits = __double_as_longlong(p) + (__double_as_longlong(shifted) << 52);
  return live ? __longlong_as_double(bits) : 0.0;
}

__device__ inline double Weight(float logit, float max, double inv_temperature) {
  return SamplerExp((static_cast<double>(logit) - static_cast<double>(max)) * inv_temperature);
}

struct Shared {
  float max[kWarps];
  int finite[kWarps];
  int64_t index[kWarps];
  double walk[kBlock];
  double total;
  int64_t found;
};

// The lower of the threads' indices (`kNone` if none), for every thread.
constexpr int64_t kNone = INT64_MAX;
__device__ inline int64_t BlockMin(int64_t index, Shared& s) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) index = min(index, __shfl_xor_sync(kFullWarp, index, offset));
  if (threadIdx.x % 32 == 0) s.index[threadIdx.x / 32] = index;
  __syncthreads();
  int64_t best = kNone;
  for (int w = 0; w < kWarps; ++w) best = min(best, s.index[w]);
  __syncthreads();
  return best;
}

// Fills block_sums and returns their sum, in ascending order.
__device__ inline double Weigh(const float* logits, int64_t vocab, float max, double inv_temperature, int blocks,
                               double* lane_sums, double* block_sums, Shared& s) {
  for (int chain = threadIdx.x; chain < blocks * kLanes; chain += kThreads) {
    const int64_t begin = static_cast<int64_t>(chain / kLanes) * kBlock, end = min(begin + kBlock, vocab);
    double sum = 0;
    for (int64_t i = begin + chain % kLanes; i < end; i += kLanes) sum += Weight(logits[i], max, inv_temperature);
    lane_sums[chain] = sum;
  }
  __syncthreads();
  for (int b = threadIdx.x; b < blocks; b += kThreads) {
    const double* l = lane_sums + b * kLanes;
    block_sums[b] = ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int b = 0; b < blocks; ++b) total += block_sums[b];
    s.total = total;
  }
  __syncthreads();
  return s.total;
}

// First id whose cumulative weight passes uniform * total; if rounding has let none pass, the last with any weight.
__device__ inline int64_t Draw(const float* logits, int64_t vocab, float max, const DrawRequest& request, double total,
                               int blocks, const double* block_sums, Shared& s) {
  const double target = request.uniform * total;
  __shared__ int chosen;
  __shared__ double before;
  if (threadIdx.x == 0) {
    double cumulative = 0;
    int b = 0;
    for (; b + 1 < blocks; ++b) {
      const double after = cumulative + block_sums[b];
      if (after > target) break;
      cumulative = after;
    }
    chosen = b;
    before = cumulative;
  }
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(chosen) * kBlock, end = min(begin + kBlock, vocab);
  if (begin + threadIdx.x < end) {
    s.walk[threadIdx.x] = Weight(logits[begin + threadIdx.x], max, request.inv_temperature);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double cumulative = before;
    s.found = kNone;
    for (int64_t i = 0; i < end - begin; ++i) {
      if (s.walk[i] == 0) continue;
      cumulative += s.walk[i];
      s.found = begin + i;
      if (cumulative > target) break;
    }
  }
  __syncthreads();
  if (s.found != kNone) return s.found;
  // The trailing block weighs nothing and rounding ate the rest: the last id that weighs anything.
  int64_t last = kNone;
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
    if (Weight(logits[i], max, request.inv_temperature) > 0) last = -i;
  }
  return -BlockMin(last, s);
}

__global__ void __launch_bounds__(kThreads)
    DrawKernel(const float* all_logits, int64_t vocab, const DrawRequest* requests, int blocks, DrawResult* results) {
  extern __shared__ double sums[];  // lanes, then blocks
  __shared__ Shared s;
  double* block_sums = sums + blocks * kLanes;
  const DrawRequest request = requests[blockIdx.x];
  const float* logits = all_logits + request.row * vocab;

  float max = -INFINITY;
  bool good = true;
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
    const float x = logits[i];
    good = good && x < INFINITY;  // false for NaN and +inf
    max = fmaxf(max, x);
  }
  max = WarpMax(max);
  good = __all_sync(kFullWarp, good);
  if (threadIdx.x % 32 == 0) {
    s.max[threadIdx.x / 32] = max;
    s.finite[threadIdx.x / 32] = good;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    max = fmaxf(max, s.max[w]);
    good = good && s.finite[w] != 0;
  }
  if (!good || max == -INFINITY) {
    if (threadIdx.x == 0) results[blockIdx.x] = {};
    return;
  }

  const double total = Weigh(logits, vocab, max, 1.0, blocks, sums, block_sums, s);
  int64_t id = kNone;
  if (request.greedy != 0) {
    for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
      if (logits[i] == max) {
        id = i;
        break;
      }
    }
    id = BlockMin(id, s);
  } else {
    double drawn_from = total;
    if (request.inv_temperature != 1.0) {
      __syncthreads();  // s.total has been read
      drawn_from = Weigh(logits, vocab, max, request.inv_temperature, blocks, sums, block_sums, s);
    }
    id = Draw(logits, vocab, max, request, drawn_from, blocks, block_sums, s);
  }
  if (threadIdx.x == 0) results[blockIdx.x] = {total, static_cast<int32_t>(id), logits[id], max, 1};
}

}  // namespace

bool DrawsOnDevice(const SamplingRequest& request) {
  const SamplingParams& p = request.params;
  return p.top_p >= 1.0f && p.top_k == 0 && p.min_p <= 0.0f && p.presence_penalty == 0.0f &&
         p.frequency_penalty == 0.0f && p.repetition_penalty == 1.0f && p.logit_bias.empty() && p.banned.empty() &&
         p.top_logprobs == 0;
}

DrawRequest MakeDrawRequest(const SamplingRequest& request, int32_t row) {
  const SamplingParams& p = request.params;
  DrawRequest draw;
  draw.row = row;
  draw.greedy = p.temperature >= kGreedyTemperature ? 0 : 1;
  if (draw.greedy != 0) return draw;
  if (p.temperature != 1.0f) draw.inv_temperature = 1.0 / static_cast<double>(p.temperature);
  const PhiloxWords words = Philox4x32(p.seed, request.token_index, request.choice);
  draw.uniform = static_cast<double>((static_cast<uint64_t>(words.v[1]) << 32 | words.v[0]) >> 11) * 0x1p-53;
  return draw;
}

SampledToken FinishDraw(const DrawResult& result) {
  SampledToken token;
  token.finite = result.finite != 0;
  if (!token.finite) return token;
  token.id = result.id;
  token.logprob = static_cast<float>((static_cast<double>(result.logit) - static_cast<double>(result.max)) -
                                     std::log(result.total));
  return token;
}

void DrawTokens(const float* logits, int64_t vocab, const DrawRequest* requests, int64_t count, DrawResult* results,
                cudaStream_t stream) {
  if (count == 0) return;
  const int blocks = static_cast<int>((vocab + kBlock - 1) / kBlock);
  const size_t smem = static_cast<size_t>(blocks) * (kLanes + 1) * sizeof(double);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(DrawKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 160 << 10);
  CUDA_CHECK(allowed);
  CHECK(smem <= (160 << 10), "an engine checks the vocabulary when it is made");
  DrawKernel<<<static_cast<unsigned>(count), kThreads, smem, stream>>>(logits, vocab, requests, blocks, results);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
