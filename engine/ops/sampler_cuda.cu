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
#include "engine/ops/sampler_arithmetic.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBlock = kSamplerBlock, kLanes = kSamplerLanes;
constexpr int kMaxBlocks = 2048;  // their sums fit a block's shared memory: vocabularies up to 2^21

// exp(x) for x <= 0, 0 below kLeastSamplerExponent and for NaN.
__device__ inline double SamplerExp(double x) {
  const bool live = x >= kLeastSamplerExponent;
  const SamplerExponential<double> e = SamplerExpSeries(live ? x : 0.0);
  const long long bits = __double_as_longlong(e.p) + (__double_as_longlong(e.shifted) << 52);
  return live ? __longlong_as_double(bits) : 0.0;
}

__device__ inline double Weight(float logit, float max, double inv_temperature) {
  return SamplerExp((static_cast<double>(logit) - static_cast<double>(max)) * inv_temperature);
}

// What passes between the three launches, per request.
constexpr int kParts = 32;
struct PartOfRow {
  float max;
  int32_t finite;
};
struct Workspace {
  PartOfRow* parts;    // [count, kParts]
  double* block_sums;  // [count, 2, blocks]: at temperature 1, then at the request's
};

Workspace LayOut(Bump& bump, int64_t count, int blocks) {
  return {bump.Take<PartOfRow>(count * kParts), bump.Take<double>(count * 2 * blocks)};
}

int BlocksOf(int64_t vocab) { return static_cast<int>((vocab + kBlock - 1) / kBlock); }

// One part of a row: its maximum, and whether all of it is below +inf and no NaN.
__global__ void __launch_bounds__(256)
    PartKernel(const float* all_logits, int64_t vocab, const DrawRequest* requests, PartOfRow* parts) {
  __shared__ PartOfRow warps[8];
  const float* logits = all_logits + requests[blockIdx.y].row * vocab;
  const int64_t each = (vocab + kParts - 1) / kParts, begin = blockIdx.x * each, end = min(begin + each, vocab);
  float max = -INFINITY;
  bool good = true;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += 256) {
    const float x = logits[i];
    good = good && x < INFINITY;
    max = fmaxf(max, x);
  }
  max = WarpMax(max);
  good = __all_sync(kFullWarp, good);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = {max, good};
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < 8; ++w) {
    max = fmaxf(max, warps[w].max);
    good = good && warps[w].finite != 0;
  }
  parts[blockIdx.y * kParts + blockIdx.x] = {max, good};
}

__device__ inline PartOfRow WholeRow(const PartOfRow* parts) {
  PartOfRow row = parts[0];
  for (int p = 1; p < kParts; ++p) {
    row.max = fmaxf(row.max, parts[p].max);
    row.finite = row.finite && parts[p].finite;
  }
  return row;
}

// One block of ids: a weight a thread, then eight lanes of 128 in order.
__global__ void __launch_bounds__(kThreads)
    BlockSumKernel(const float* all_logits, int64_t vocab, const DrawRequest* requests, int blocks, Workspace w) {
  __shared__ double weights[kBlock], lanes[kLanes];
  const DrawRequest request = requests[blockIdx.y];
  const PartOfRow row = WholeRow(w.parts + blockIdx.y * kParts);
  if (row.finite == 0 || row.max == -INFINITY) return;
  const float* logits = all_logits + request.row * vocab;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const bool second = request.greedy == 0 && request.inv_temperature != 1.0;
  for (int pass = 0; pass < (second ? 2 : 1); ++pass) {
    weights[threadIdx.x] = id < vocab ? Weight(logits[id], row.max, pass == 0 ? 1.0 : request.inv_temperature) : 0.0;
    __syncthreads();
    if (threadIdx.x < kLanes) {
      double sum = 0;
#pragma unroll 8
      for (int i = 0; i < kBlock / kLanes; ++i) sum += weights[i * kLanes + threadIdx.x];
      lanes[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      w.block_sums[(blockIdx.y * 2 + pass) * blocks + blockIdx.x] =
          ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    }
    __syncthreads();
  }
}

struct Shared {
  int64_t index[kWarps];
  double walk[kBlock];
  double total[2];
  int64_t found;
};

// The lower of the threads' indices (kNone if none), for every thread.
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
    DrawKernel(const float* all_logits, int64_t vocab, const DrawRequest* requests, int blocks, Workspace w,
               DrawResult* results) {
  extern __shared__ double sums[];  // [2, blocks]
  __shared__ Shared s;
  const DrawRequest request = requests[blockIdx.x];
  const float* logits = all_logits + request.row * vocab;
  const PartOfRow row = WholeRow(w.parts + blockIdx.x * kParts);
  if (row.finite == 0 || row.max == -INFINITY) {
    if (threadIdx.x == 0) results[blockIdx.x] = {};
    return;
  }
  const bool second = request.greedy == 0 && request.inv_temperature != 1.0;
  for (int i = threadIdx.x; i < (second ? 2 : 1) * blocks; i += kThreads) {
    sums[i] = w.block_sums[static_cast<int64_t>(blockIdx.x) * 2 * blocks + i];
  }
  __syncthreads();
  if (threadIdx.x < 2 && (threadIdx.x == 0 || second)) {
    double total = 0;
    for (int b = 0; b < blocks; ++b) total += sums[threadIdx.x * blocks + b];
    s.total[threadIdx.x] = total;
  }
  __syncthreads();
  int64_t id = kNone;
  if (request.greedy != 0) {
    for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
      if (logits[i] == row.max) {
        id = i;
        break;
      }
    }
    id = BlockMin(id, s);
  } else {
    const int pass = second ? 1 : 0;
    id = Draw(logits, vocab, row.max, request, s.total[pass], blocks, sums + pass * blocks, s);
  }
  if (threadIdx.x == 0) results[blockIdx.x] = {s.total[0], static_cast<int32_t>(id), logits[id], row.max, 1};
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
  draw.uniform = UniformDraw(request);
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

int64_t DrawWorkspaceBytes(int64_t vocab, int64_t count) {
  Bump bump;
  LayOut(bump, count, BlocksOf(vocab));
  return bump.used();
}

void DrawTokens(const float* logits, int64_t vocab, const DrawRequest* requests, int64_t count, void* workspace,
                DrawResult* results, cudaStream_t stream) {
  if (count == 0) return;
  const int blocks = BlocksOf(vocab);
  CHECK(blocks <= kMaxBlocks, "an engine checks the vocabulary when it is made");
  Bump bump(static_cast<uint8_t*>(workspace));
  const Workspace w = LayOut(bump, count, blocks);
  const auto rows = static_cast<unsigned>(count);
  PartKernel<<<dim3(kParts, rows), 256, 0, stream>>>(logits, vocab, requests, w.parts);
  CUDA_CHECK(cudaGetLastError());
  BlockSumKernel<<<dim3(static_cast<unsigned>(blocks), rows), kThreads, 0, stream>>>(logits, vocab, requests, blocks,
                                                                                     w);
  CUDA_CHECK(cudaGetLastError());
  DrawKernel<<<rows, kThreads, 2 * blocks * sizeof(double), stream>>>(logits, vocab, requests, blocks, w, results);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace millrace::cuda
