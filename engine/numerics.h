// SPDX-License-Identifier: Apache-2.0
// The two numerics of the engine and the rounding points that tell them apart.
//
// `exact` has none of them: weights dequantised, FP32 activations and cache, what the golden vectors were made with.
// `release` has all: what the model was trained with and what production runs (docs/model.md, "Rounding points").
// Tests switch single points off to prove that the suite notices.
#pragma once

namespace millrace {

enum class Numerics { kExact, kRelease };

inline const char* NumericsName(Numerics n) { return n == Numerics::kExact ? "exact" : "release"; }

struct Rounding {
  bool activation_quant = false;  // FP8 activations, groups of 128, before FP8 and FP4 linears
  bool linear_out = false;        // linear outputs to BF16
  bool norm_out = false;          // RMSNorm outputs to BF16
  bool rope_out = false;          // rotated dims to BF16
  bool kv_quant = false;          // FP8 simulation of the first 448 dims of every KV entry
  bool index_fp4 = false;         // Hadamard and FP4 simulation of index queries and keys
  bool index_score = false;       // index weights and scores to BF16
  bool compressed_entry = false;  // pooled entry to BF16 before its norm
  bool attention_p = false;       // attention probabilities to BF16 before PV
  bool attention_out = false;     // attention output to BF16
  bool expert_act = false;        // SwiGLU output (times routing weight) to BF16
  bool streams = false;           // mHC mix and residual streams to BF16

  static constexpr Rounding All() { return {true, true, true, true, true, true, true, true, true, true, true, true}; }
  static constexpr Rounding For(Numerics n) { return n == Numerics::kRelease ? All() : Rounding{}; }
  bool operator==(const Rounding&) const = default;
};

}  // namespace millrace
