// SPDX-License-Identifier: Apache-2.0
// Loops over vectors that the CPU operations share, dispatched once at run time. The instruction set chosen fixes the
// bits (it decides how many partial sums a dot product has) and is part of the kernel-set id.
#pragma once

#include <cstdint>
#include <string>

namespace millrace::vec {

// Name of the instruction set in use, e.g. "avx2".
std::string TargetName();
// "cpu/avx2/3", "cpu/avx3_dl+amx/3": target and revision of the CPU kernels, the part of a compatibility hash that says
// which bits come out.
std::string KernelSet();

float SumSquares(const float* x, int64_t n);
// y = x * scale
void Scale(const float* x, float scale, int64_t n, float* y);
// y = round_bf16(y) if `round`
void RoundBf16(float* y, int64_t n);
// out = x * scale * w (w null: 1), rounded to BF16 if `round`; may alias.
void ScaleWeighted(const float* x, float scale, const float* w, int64_t n, bool round, float* out);

// 32 pairs x [64], rotated in place by the angles of cos and sin [32], or back where `sign` is -1; rounded to BF16 if
// `round`.
void RotatePairs(float* x, const float* cos, const float* sin, float sign, bool round);

// E4M3 codes of E4M3 values.
void EncodeE4m3Values(const float* x, int64_t n, uint8_t* codes);

// logits[h * ld_logits + j] = scale * (q_h · keys[j]) for `heads` queries q [heads, n]; n a multiple of 16.
void DotHeads(const float* q, int heads, const float* const* keys, int num_keys, int64_t n, float scale, float* logits,
              int64_t ld_logits);

// Per head h: max[h] of the n logits [heads, ld], which become exp(logit - max), and sum[h] of these in ascending
// order; then they are rounded to BF16 if `round`.
void Softmax(float* logits, int64_t ld, int heads, int n, bool round, float* max, float* sum);

// out = x / z, rounded to BF16 if `round`.
void Divide(const float* x, float z, int64_t n, bool round, float* out);

// o[h] += sum_j p[h * ld_p + j] * keys[j], j ascending; o [heads, dim], dim a multiple of 32.
void AccumulateValues(const float* p, int64_t ld_p, int heads, const float* const* keys, int num_keys, int64_t dim,
                      float* o);

// streams [hc, dim] -> y [dim] = sum_j pre[j] * streams[j], rounded to BF16 if `round`.
void MixStreams(const float* streams, const float* pre, int hc, int64_t dim, bool round, float* y);
// streams[k] = post[k] * out + sum_j comb[j * hc + k] * streams[j]; hc <= 8.
void RecombineStreams(const float* out, const float* post, const float* comb, int hc, int64_t dim, bool round,
                      float* streams);

// y += x
void Add(const float* x, int64_t n, float* y);

// A stored KV entry to F32: `plain` E4M3 codes with an E8M0 scale per 64 (a multiple of 64), then `rope` BF16 values.
void LoadKvEntry(const uint8_t* body, const uint8_t* scales, int64_t plain, int64_t rope, float* out);

// Score of one index key for one query: sum over heads (in order) of weight * relu(dot), where dot adds the four
// groups of 32 in order. q [heads, 128] and key [128].
float IndexScore(const float* q, const float* weights, int heads, const float* key);

// silu(min(g, limit)) * clamp(p, -limit, limit) * weight, rounded to BF16 if `round`.
void SwiGluRow(const float* g, const float* p, float weight, float limit, int64_t n, bool round, float* a);

// One step of an online softmax per channel: max, sum and weighted sum take in (score, kv).
void OnlineSoftmaxStep(const float* score, const float* kv, int64_t n, float* max, float* sum, float* weighted);

// Softmax over `rows` (<= 8) rows per channel: out[c] = sum_r exp(score_r[c] - max) kv_r[c] / sum_r exp(score_r[c] -
// max).
void PoolRows(const float* const* score, const float* const* kv, int rows, int64_t n, float* out);

}  // namespace millrace::vec
