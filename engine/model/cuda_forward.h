// SPDX-License-Identifier: Apache-2.0
// DeepSeek-V4 on the device: the layer loop as launches on one stream.
//
// Reads beside model.h, whose steps it takes in the same order over device memory; it is apart because ops.h speaks of
// host vectors. One description for both backends is the aim, and until then docs/model.md is what both follow. It
// allocates nothing after construction and waits for nothing, with two exceptions that its caller asks for: a hook
// after each layer, and experts that run elsewhere, whose rows pass through page-locked host memory.
// Thread: engine thread.
#pragma once

#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "engine/cache/cache_layout.h"
#include "engine/device/cuda_device.h"
#include "engine/model/cuda_weights.h"
#include "engine/moe/expert_exchange.h"
#include "engine/ops/cuda_indexer.h"
#include "engine/ops/cuda_pass.h"

namespace millrace::cuda {

// The largest pass there can be; everything is laid out for it.
struct ForwardLimits {
  int64_t rows = 0;
  int sequences = 0;       // of a pass, padding included
  int64_t max_tokens = 0;  // of a sequence
  int64_t logit_rows = 0;  // logits computed at a time
  bool mtp = false;
  bool local_experts = true;
};

// Called after launches, when somebody watches. Pointers are device memory, valid until the next launch.
class ForwardHooks {
 public:
  virtual ~ForwardHooks() = default;
  virtual void OnExperts(int /*layer*/, const int32_t* /*experts*/, int64_t /*rows*/) {}
  virtual void OnSelection(int /*layer*/, SelectionView /*selection*/, int64_t /*rows*/) {}
  virtual void OnLayer(int /*layer*/, const Bf16* /*streams*/, int64_t /*rows*/) {}
};

class CudaForward {
 public:
  // Bytes of workspace for these limits.
  static int64_t WorkspaceBytes(const ModelConfig& config, const ForwardLimits& limits);
  // `workspace` holds that many bytes; all references outlive this. `exchange` null: experts are in `weights`.
  static absl::StatusOr<std::unique_ptr<CudaForward>> Create(const ModelConfig& config, const CacheLayout& layout,
                                                             ModelWeights weights, const ForwardLimits& limits,
                                                             uint8_t* workspace, ExpertExchange* exchange,
                                                             Stream& stream);

  // Enqueues every layer; streams() [T, 4, D] hold the result. Not OK: experts elsewhere failed; the pass is lost.
  absl::Status Forward(const PassView& pass, ForwardHooks* hooks);
  // Enqueues the MTP module for rows that lag `backbone`'s (cuda_compressor.h, GatherLastStreams).
  absl::Status ForwardMtp(const PassView& pass, const PassView& backbone, const int32_t* backbone_sequence);
  // Enqueues the copy of each sequence's last streams to its slot. After ForwardMtp, which reads the former ones.
  void StoreStreams(const PassView& pass);

  // Enqueues logits [num, V] F32 of rows `rows` (device memory) of the last Forward or ForwardMtp; num at most
  // limits.logit_rows. Valid until the next call.
  const float* Logits(const int32_t* rows, int64_t num);
  const float* MtpLogits(const int32_t* rows, int64_t num);
  const float* last_logits() const { return a_.logits; }  // where those calls put them

 private:
  // Activations of one pass.
  struct Activations {
    Bf16 *streams = nullptr, *sublayer = nullptr;
    HyperInput u;
    float *post = nullptr, *comb = nullptr;
    Bf16* rounded = nullptr;   // the widest rounded input of a product behind u
    uint8_t* scratch[2] = {};  // of FP8 products, on the main and the side stream
    // Outputs of stacked weights (cuda_weights.h), each row as long as all parts.
    Bf16 *q_kv = nullptr, *q_index = nullptr, *shared_up = nullptr;
    float* compress = nullptr;
    Bf16 *q = nullptr, *attn = nullptr, *low_rank = nullptr, *keys = nullptr;
    IndexWorkspace index;
    SelectionView selection;
    uint8_t* attention_workspace = nullptr;
    float* gate_logits = nullptr;
    int32_t* experts = nullptr;
    float* expert_weights = nullptr;
    Bf16 *shared = nullptr, *expert_rows = nullptr;
    Bf16* shared_rounded = nullptr;
    uint8_t* expert_workspace = nullptr;
    float* cos[2] = {};  // window layers, compressed layers
    float* sin[2] = {};
    // MTP.
    Bf16 *e = nullptr, *h = nullptr, *mtp_streams = nullptr;
    // Logits.
    Bf16 *picked = nullptr, *z = nullptr;
    float* logits = nullptr;
  };
  static Activations LayOut(Bump& bump, const ModelConfig& config, const ForwardLimits& limits);

  CudaForward(const ModelConfig& config, const CacheLayout& layout, ModelWeights weights, const ForwardLimits& limits,
              uint8_t* workspace, ExpertExchange* exchange, Stream& stream);

  // `update`: what the layer before has left to fold into the streams; then what this one leaves.
  absl::Status Layer(int layer, const LayerWeights& w, const PassView& pass, Bf16* streams, HyperUpdate& update,
                     ForwardHooks* hooks);
  void Attention(int layer, const LayerWeights& w, const PassView& pass, ForwardHooks* hooks);
  // Entries of CSA and HCA that the rows complete, on `stream`.
  void Compress(int layer, const LayerWeights& w, const PassView& pass, cudaStream_t stream);
  // `part` of the compressors' outputs.
  F32Rows Compressed(const LayerWeights& w, int part) const {
    return {a_.compress + w.compress.start[part], w.compress.all.n};
  }
  void SharedExpert(const LayerWeights& w, int64_t rows, cudaStream_t stream);
  absl::Status Moe(int layer, const LayerWeights& w, const PassView& pass, ForwardHooks* hooks);
  absl::Status RemoteExperts(int layer, int64_t rows, const std::function<void()>& meanwhile);
  // Rounds x [rows, k] into `rounded`; valid until the next call.
  RoundedRows Round(const Bf16* x, int64_t rows, int64_t k);
  RoundedRows RoundedInput() const { return {a_.u.rounded, config_.hidden_size}; }
  const float* LogitsOf(const Bf16* streams, const HyperWeights& hc_head, const float* norm, const int32_t* rows,
                        int64_t num);

  const ModelConfig& config_;
  const CacheLayout& layout_;
  const ModelWeights weights_;
  const ForwardLimits limits_;
  ExpertExchange* const exchange_;
  Stream& stream_;
  SideStream side_;  // work of a layer that need not wait for its neighbours
  const HyperParams hyper_;
  const float eps_;
  RopeTable rope_[2];
  Activations a_;
  // Rows on their way to and from experts elsewhere.
  PinnedBuffer remote_rows_, remote_experts_, remote_weights_, remote_out_;
};

}  // namespace millrace::cuda
