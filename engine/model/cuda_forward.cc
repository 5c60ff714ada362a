// SPDX-License-Identifier: Apache-2.0
// The layer loop on the device: one call per step of docs/model.md.
#include "engine/model/cuda_forward.h"

#include <algorithm>
#include <utility>

#include "engine/model/model.h"
#include "engine/ops/cuda_norm_rope.h"
#include "engine/ops/cuda_quantise.h"
#include "engine/ops/cuda_sparse_attention.h"
#include "engine/status.h"

namespace millrace::cuda {
namespace {

// Index scores of a tile of rows may take this much; longer contexts are scored in more tiles of fewer rows.
constexpr int64_t kScoreBytes = 256 << 20;

// Where the part after one of `n` rows starts in a stack of FP8 weights.
int64_t OnBlock(int64_t n) { return (n + 127) / 128 * 128; }

// Places of the longest list that attention of this kind can meet.
int64_t MaxPlaces(LayerKind kind, const ModelConfig& c, const ForwardLimits& limits) {
  return kWindow + (kind == LayerKind::kCsa ? c.index_topk : kind == LayerKind::kHca ? limits.max_tokens / 128 : 0);
}

RopeTable Table(const ModelConfig& config, bool compressed) {
  RopeTable table;
  std::copy_n(MakeRope(config, compressed).f, 32, table.f);
  return table;
}

}  // namespace

CudaForward::Activations CudaForward::LayOut(Bump& bump, const ModelConfig& c, const ForwardLimits& limits) {
  const int64_t t = limits.rows, hidden = c.hidden_size, heads = c.num_attention_heads, k = c.num_experts_per_tok;
  const int64_t low_rank = int64_t{c.o_groups} * c.o_lora_rank;
  const int64_t widest = std::max({hidden * (limits.mtp ? kStreams : 1), low_rank, int64_t{c.q_lora_rank}});
  const int64_t width = c.moe_intermediate_size;
  Activations a;
  a.streams = bump.Take<Bf16>(t * kStreams * hidden);
  a.sublayer = bump.Take<Bf16>(t * hidden);
  a.u.u = bump.Take<Bf16>(t * hidden);
  a.u.rounded = bump.Take<Bf16>(t * hidden);
  a.post = bump.Take<float>(t * kStreams);
  a.comb = bump.Take<float>(t * kStreams * kStreams);
  a.rounded = bump.Take<Bf16>(t * widest);
  const int64_t q_rows = OnBlock(heads * kHeadDim) + int64_t{c.index_n_heads} * kIndexDim;
  a.scratch[0] = bump.Take<uint8_t>(
      std::max({LinearScratchBytes(q_rows, c.q_lora_rank, t), LinearScratchBytes(hidden, low_rank, t),
                LinearScratchBytes(OnBlock(c.q_lora_rank) + kHeadDim, hidden, t),
                limits.mtp ? LinearScratchBytes(hidden, hidden, t * kStreams) : 0}));
  a.scratch[1] = bump.Take<uint8_t>(LinearScratchBytes(OnBlock(width) + width, hidden, t));
  a.q_kv = bump.Take<Bf16>(t * (OnBlock(c.q_lora_rank) + kHeadDim));
  a.q_index = bump.Take<Bf16>(t * q_rows);
  a.q = bump.Take<Bf16>(t * heads * kHeadDim);
  a.attn = bump.Take<Bf16>(t * heads * kHeadDim);
  a.low_rank = bump.Take<Bf16>(t * low_rank);
  a.keys = bump.Take<Bf16>((t + int64_t{limits.sequences} * (kWindow - 1)) * kHeadDim);
  a.compress = bump.Take<float>(t * (4 * kHeadDim + 4 * kIndexDim + c.index_n_heads));
  a.index.q = bump.Take<int8_t>(t * c.index_n_heads * kIndexDim);
  a.index.q_scales = bump.Take<float>(t * c.index_n_heads * 4);
  a.index.max_entries = std::max<int64_t>(limits.max_tokens / 4, 1);
  a.index.tile_rows = std::clamp<int64_t>(kScoreBytes / 2 / a.index.max_entries, 1, t);
  a.index.scores = bump.Take<uint16_t>(a.index.tile_rows * a.index.max_entries);
  a.selection.topk = c.index_topk;
  a.selection.entries = bump.Take<int32_t>(t * c.index_topk);
  a.selection.counts = bump.Take<int32_t>(t);
  const int64_t max_places = std::max(MaxPlaces(LayerKind::kCsa, c, limits), MaxPlaces(LayerKind::kHca, c, limits));
  a.attention_workspace = bump.Take<uint8_t>(SparseAttentionWorkspaceBytes(t, static_cast<int>(heads), max_places));
  a.gate_logits = bump.Take<float>(t * c.n_routed_experts);
  a.experts = bump.Take<int32_t>(t * k);
  a.expert_weights = bump.Take<float>(t * k);
  a.shared_up = bump.Take<Bf16>(t * (OnBlock(width) + width));
  a.shared_rounded = bump.Take<Bf16>(t * width);
  a.shared = bump.Take<Bf16>(t * hidden);
  a.expert_rows = bump.Take<Bf16>(t * k * hidden);
  if (limits.local_experts) {
    a.expert_workspace =
        bump.Take<uint8_t>(ExpertWorkspaceBytes(c.n_routed_experts, hidden, width, static_cast<int>(k), t));
  }
  for (int kind = 0; kind < 2; ++kind) {
    a.cos[kind] = bump.Take<float>(t * 32);
    a.sin[kind] = bump.Take<float>(t * 32);
  }
  if (limits.mtp) {
    a.e = bump.Take<Bf16>(t * hidden);
    a.h = bump.Take<Bf16>(t * kStreams * hidden);
    a.mtp_streams = bump.Take<Bf16>(t * kStreams * hidden);
  }
  a.picked = bump.Take<Bf16>(limits.logit_rows * kStreams * hidden);
  a.z = bump.Take<Bf16>(limits.logit_rows * hidden);
  a.logits = bump.Take<float>(limits.logit_rows * c.vocab_size);
  return a;
}

int64_t CudaForward::WorkspaceBytes(const ModelConfig& config, const ForwardLimits& limits) {
  Bump counting;
  LayOut(counting, config, limits);
  return counting.used();
}

CudaForward::CudaForward(const ModelConfig& config, const CacheLayout& layout, ModelWeights weights,
                         const ForwardLimits& limits, uint8_t* workspace, ExpertExchange* exchange, Stream& stream)
    : config_(config),
      layout_(layout),
      weights_(std::move(weights)),
      limits_(limits),
      exchange_(exchange),
      stream_(stream),
      hyper_{config.hc_sinkhorn_iters, static_cast<float>(config.hc_eps), static_cast<float>(config.rms_norm_eps)},
      eps_(static_cast<float>(config.rms_norm_eps)),
      rope_{Table(config, false), Table(config, true)} {
  Bump bump(workspace);
  a_ = LayOut(bump, config, limits);
}

absl::StatusOr<std::unique_ptr<CudaForward>> CudaForward::Create(const ModelConfig& config, const CacheLayout& layout,
                                                                 ModelWeights weights, const ForwardLimits& limits,
                                                                 uint8_t* workspace, ExpertExchange* exchange,
                                                                 Stream& stream) {
  std::unique_ptr<CudaForward> forward(
      new CudaForward(config, layout, std::move(weights), limits, workspace, exchange, stream));
  if (exchange != nullptr) {
    const int64_t pairs = limits.rows * config.num_experts_per_tok;
    const char* purpose = "rows of experts that run elsewhere";
    ASSIGN_OR_RETURN(forward->remote_rows_, PinnedBuffer::Take(limits.rows * config.hidden_size * 2, purpose));
    ASSIGN_OR_RETURN(forward->remote_experts_, PinnedBuffer::Take(pairs * 4, purpose));
    ASSIGN_OR_RETURN(forward->remote_weights_, PinnedBuffer::Take(pairs * 4, purpose));
    ASSIGN_OR_RETURN(forward->remote_out_, PinnedBuffer::Take(pairs * config.hidden_size * 2, purpose));
  }
  return forward;
}

RoundedRows CudaForward::Round(const Bf16* x, int64_t rows, int64_t k) {
  RoundRows({x, k}, rows, k, a_.rounded, stream_.get());
  return {a_.rounded, k};
}

absl::Status CudaForward::Forward(const PassView& pass, ForwardHooks* hooks) {
  for (int kind = 0; kind < 2; ++kind) {
    PrepareRope(rope_[kind], pass.positions, pass.num_rows, a_.cos[kind], a_.sin[kind], stream_.get());
  }
  Embed(weights_.embed, pass.token_ids, pass.num_rows, kStreams, config_.hidden_size, a_.streams, stream_.get());
  HyperUpdate update;
  for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
    RETURN_IF_ERROR(Layer(layer, weights_.layers[layer], pass, a_.streams, update, hooks));
    if (hooks == nullptr && layer + 1 < config_.num_hidden_layers) continue;
    HyperConnectionPost(update, pass.num_rows, config_.hidden_size, a_.streams, stream_.get());
    update = {};
    if (hooks != nullptr) hooks->OnLayer(layer, a_.streams, pass.num_rows);
  }
  return absl::OkStatus();
}

absl::Status CudaForward::Layer(int layer, const LayerWeights& w, const PassView& pass, Bf16* streams,
                                HyperUpdate& update, ForwardHooks* hooks) {
  const int64_t rows = pass.num_rows, hidden = config_.hidden_size;
  cudaStream_t s = stream_.get();

  HyperConnectionPre(streams, update, w.hc_attn, w.attn_norm, hyper_, rows, hidden, a_.u, a_.post, a_.comb, s);
  Attention(layer, w, pass, hooks);
  update = {.out = a_.sublayer, .post = a_.post, .comb = a_.comb};

  HyperConnectionPre(streams, update, w.hc_ffn, w.ffn_norm, hyper_, rows, hidden, a_.u, a_.post, a_.comb, s);
  RETURN_IF_ERROR(Moe(layer, w, pass, hooks));
  update = {a_.shared, a_.expert_rows, config_.num_experts_per_tok, a_.post, a_.comb};
  return absl::OkStatus();
}

void CudaForward::Attention(int layer, const LayerWeights& w, const PassView& pass, ForwardHooks* hooks) {
  const int64_t rows = pass.num_rows, rank = config_.q_lora_rank;
  const int heads = config_.num_attention_heads;
  const bool mtp = layer >= config_.num_hidden_layers;
  const LayerKind kind = mtp ? LayerKind::kWindow : config_.layer_kinds[layer];
  const int rope_kind = kind == LayerKind::kWindow ? 0 : 1;
  const RopeView rope{a_.cos[rope_kind], a_.sin[rope_kind]};
  const PageLayerLayout page = mtp ? PageLayerLayout{} : layout_.page_layers[layer];
  cudaStream_t s = stream_.get();

  // Entries that these rows complete become visible to the very row that completes them; nothing else needs them.
  if (kind != LayerKind::kWindow) {
    side_.Fork(s);
    Compress(layer, w, pass, side_.get());
  }

  // Queries and this token's window entry.
  const int64_t q_kv_width = w.q_kv.all.n, q_width = w.q_index.all.n;
  LinearFp8(w.q_kv.all, RoundedInput(), rows, {a_.q_kv, q_kv_width}, a_.scratch[0], s);
  side_.Fork(s);
  HyperPrefetch(w.hc_ffn, config_.hidden_size, side_.get());
  WindowAppend(pass, layout_.slot_layers[layer], layout_.window_slots, {a_.q_kv + w.q_kv.start[1], q_kv_width},
               w.kv_norm, eps_, rope, a_.keys, side_.get());
  NormRound({a_.q_kv, q_kv_width}, w.q_norm, rows, rank, eps_, a_.rounded, s);
  LinearFp8(w.q_index.all, {a_.rounded, rank}, rows, {a_.q_index, q_width}, a_.scratch[0], s);
  QueryNormRope({a_.q_index, q_width}, heads, rope, rows, eps_, a_.q, s);

  side_.Join(s);
  if (kind == LayerKind::kCsa) {
    IndexSelect(pass, page, {a_.q_index + w.q_index.start[1], q_width}, Compressed(w, 4), config_.index_n_heads, rope,
                a_.index, a_.selection, s);
    if (hooks != nullptr) hooks->OnSelection(layer, a_.selection, rows);
  }

  SparseAttention(kind, pass, page, a_.q, heads, w.attn_sink, a_.keys, a_.selection, rope,
                  MaxPlaces(kind, config_, limits_), a_.attention_workspace, a_.attn, s);

  // Output: each group of heads through its own low-rank matrix, then one linear back to the hidden size.
  const int64_t z_width = int64_t{config_.o_groups} * config_.o_lora_rank;
  LinearGrouped(w.wo_a, config_.o_groups, {a_.attn, int64_t{heads} * kHeadDim}, rows, {a_.low_rank, z_width}, s);
  LinearFp8(w.wo_b, Round(a_.low_rank, rows, z_width), rows, {a_.sublayer, config_.hidden_size}, a_.scratch[0], s);
}

void CudaForward::Compress(int layer, const LayerWeights& w, const PassView& pass, cudaStream_t stream) {
  const PageLayerLayout& page = layout_.page_layers[layer];
  const SlotLayerLayout& slot = layout_.slot_layers[layer];
  LinearBf16(w.compress.all, {a_.u.u, config_.hidden_size}, pass.num_rows, {a_.compress, w.compress.all.n}, stream);
  if (config_.layer_kinds[layer] == LayerKind::kHca) {
    CompressHca(pass, page, slot, Compressed(w, 0), Compressed(w, 1), w.pool, rope_[1], eps_, stream);
    return;
  }
  CompressCsa(pass, page, slot, Compressed(w, 0), Compressed(w, 1), Compressed(w, 2), Compressed(w, 3), w.pool,
              w.index_pool, rope_[1], eps_, stream);
}

void CudaForward::SharedExpert(const LayerWeights& w, int64_t rows, cudaStream_t stream) {
  const int64_t width = config_.moe_intermediate_size, hidden = config_.hidden_size, up_width = w.shared_up.all.n;
  LinearFp8(w.shared_up.all, RoundedInput(), rows, {a_.shared_up, up_width}, a_.scratch[1], stream);
  SwiGluRound({a_.shared_up, up_width}, {a_.shared_up + w.shared_up.start[1], up_width}, rows, width,
              static_cast<float>(config_.swiglu_limit), a_.shared_rounded, stream);
  LinearFp8(w.shared_w2, {a_.shared_rounded, width}, rows, {a_.shared, hidden}, a_.scratch[1], stream);
}

// Leaves the shared expert's and the routed experts' rows, whose sum is the next update of the streams.
absl::Status CudaForward::Moe(int layer, const LayerWeights& w, const PassView& pass, ForwardHooks* hooks) {
  const int64_t rows = pass.num_rows, hidden = config_.hidden_size;
  const int k = config_.num_experts_per_tok;
  cudaStream_t s = stream_.get();
  if (exchange_ == nullptr) {
    side_.Fork(s);
    if (layer + 1 < config_.num_hidden_layers) {
      HyperPrefetch(weights_.layers[layer + 1].hc_attn, hidden, side_.get());
    }
    SharedExpert(w, rows, side_.get());
  }
  LinearBf16(w.gate, {a_.u.u, hidden}, rows, {a_.gate_logits, w.gate.n}, s);
  Gate(a_.gate_logits, config_.n_routed_experts, w.gate_bias, w.tid2eid, pass.token_ids, rows, k,
       static_cast<float>(config_.routed_scaling_factor), a_.experts, a_.expert_weights, s);
  if (hooks != nullptr) hooks->OnExperts(layer, a_.experts, rows);
  if (exchange_ != nullptr) {
    return RemoteExperts(layer, rows, [&] { SharedExpert(w, rows, s); });
  }
  RoutedExperts(w.experts, RoundedInput(), a_.experts, a_.expert_weights, rows, k,
                static_cast<float>(config_.swiglu_limit), a_.expert_workspace, a_.expert_rows, s);
  side_.Join(s);
  return absl::OkStatus();
}

// The exchange speaks host memory: the step leaves the device here. Rows stay in BF16 and where copies put them.
absl::Status CudaForward::RemoteExperts(int layer, int64_t rows, const std::function<void()>& meanwhile) {
  const int64_t hidden = config_.hidden_size, pairs = rows * config_.num_experts_per_tok;
  cudaStream_t s = stream_.get();
  CUDA_CHECK(cudaMemcpyAsync(remote_rows_.data(), a_.u.u, rows * hidden * 2, cudaMemcpyDeviceToHost, s));
  CUDA_CHECK(cudaMemcpyAsync(remote_experts_.data(), a_.experts, pairs * 4, cudaMemcpyDeviceToHost, s));
  CUDA_CHECK(cudaMemcpyAsync(remote_weights_.data(), a_.expert_weights, pairs * 4, cudaMemcpyDeviceToHost, s));
  stream_.Wait();
  RETURN_IF_ERROR(exchange_->Dispatch({layer, rows, hidden, config_.num_experts_per_tok, remote_rows_.data(),
                                       reinterpret_cast<const int32_t*>(remote_experts_.data()),
                                       reinterpret_cast<const float*>(remote_weights_.data()), RowFormat::kBf16}));
  meanwhile();
  RETURN_IF_ERROR(exchange_->Combine(remote_out_.data()));
  CUDA_CHECK(cudaMemcpyAsync(a_.expert_rows, remote_out_.data(), pairs * hidden * 2, cudaMemcpyHostToDevice, s));
  return absl::OkStatus();
}

absl::Status CudaForward::ForwardMtp(const PassView& pass, const PassView& backbone, const int32_t* backbone_sequence) {
  const MtpWeights& w = weights_.mtp[0];
  const int64_t rows = pass.num_rows, hidden = config_.hidden_size;
  cudaStream_t s = stream_.get();
  PrepareRope(rope_[0], pass.positions, rows, a_.cos[0], a_.sin[0], s);
  Embed(weights_.embed, pass.token_ids, rows, 1, hidden, a_.e, s);
  RmsNorm(a_.e, w.enorm, rows, hidden, eps_, a_.e, s);
  GatherLastStreams(pass, backbone, backbone_sequence, a_.streams, kStreams * hidden, layout_.last_streams, a_.h, s);
  RmsNorm(a_.h, w.hnorm, rows * kStreams, hidden, eps_, a_.h, s);  // each stream by itself, one weight
  LinearFp8(w.e_proj, Round(a_.e, rows, hidden), rows, {a_.u.u, hidden}, a_.scratch[0], s);
  LinearFp8(w.h_proj, Round(a_.h, rows * kStreams, hidden), rows * kStreams, {a_.mtp_streams, hidden}, a_.scratch[0],
            s);
  AddToStreams(a_.u.u, a_.mtp_streams, rows, kStreams, hidden, a_.mtp_streams, s);
  HyperUpdate update;
  RETURN_IF_ERROR(Layer(config_.num_hidden_layers, w.block, pass, a_.mtp_streams, update, nullptr));
  HyperConnectionPost(update, rows, hidden, a_.mtp_streams, s);
  return absl::OkStatus();
}

void CudaForward::StoreStreams(const PassView& pass) {
  StoreLastStreams(pass, a_.streams, kStreams * config_.hidden_size, layout_.last_streams, stream_.get());
}

const float* CudaForward::LogitsOf(const Bf16* streams, const HyperWeights& hc_head, const float* norm,
                                   const int32_t* rows, int64_t num) {
  CHECK(num <= limits_.logit_rows, "the caller cuts rows into tiles");
  const int64_t hidden = config_.hidden_size;
  cudaStream_t s = stream_.get();
  Embed(streams, rows, num, 1, kStreams * hidden, a_.picked, s);  // a gather of rows is an embedding
  HyperHead(a_.picked, hc_head, norm, hyper_, num, hidden, a_.z, s);
  LinearBf16(weights_.head, {a_.z, hidden}, num, {a_.logits, weights_.head.n}, s);
  return a_.logits;
}

const float* CudaForward::Logits(const int32_t* rows, int64_t num) {
  return LogitsOf(a_.streams, weights_.hc_head, weights_.norm, rows, num);
}

const float* CudaForward::MtpLogits(const int32_t* rows, int64_t num) {
  return LogitsOf(a_.mtp_streams, weights_.mtp[0].hc_head, weights_.mtp[0].norm, rows, num);
}

}  // namespace millrace::cuda
