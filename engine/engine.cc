// SPDX-License-Identifier: Apache-2.0
// Engine::Create and the CPU backend: wires config, weights, model and cache into the Engine of engine.h. Reads as a
// table of contents; the arithmetic is in ops/, the order of operations in model/, what the backends share in
// paged_engine.h. The CUDA backend is cuda_engine.cc.
#include "engine/engine.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/cuda_engine.h"
#include "engine/device/buffer.h"
#include "engine/device/thread_pool.h"
#include "engine/model/model.h"
#include "engine/moe/local_experts.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/rounding.h"
#include "engine/ops/vector_cpu.h"
#include "engine/paged_engine.h"
#include "engine/status.h"

namespace millrace {
namespace {

class CpuEngine : public PagedEngine {
 public:
  CpuEngine(std::shared_ptr<const Checkpoint> checkpoint, EngineOptions options, Rounding rounding)
      // A switched-off rounding point must not come back through the cache format.
      : PagedEngine(
            checkpoint, options,
            CacheLayout::Make(checkpoint->config(), rounding == Rounding::All() ? Numerics::kRelease : Numerics::kExact,
                              options.mtp)),
        rounding_(rounding),
        pool_(options_.num_threads),
        ops_(checkpoint_->config(), layout_, rounding_, pool_) {}

  absl::Status Init() {
    if (options_.exchange == nullptr) {
      ASSIGN_OR_RETURN(local_experts_, LocalExperts::Create(*checkpoint_, {.numerics = options_.numerics,
                                                                           .rounding = rounding_,
                                                                           .mtp = options_.mtp,
                                                                           .num_threads = options_.num_threads,
                                                                           .progress = options_.progress}));
    }
    const int64_t experts = local_experts_ ? local_experts_->weight_bytes() : 0;
    ModelWeights weights =
        ModelWeights::Load(*checkpoint_, options_.numerics, options_.mtp, [&](int64_t done, int64_t total) {
          if (options_.progress) options_.progress(experts + done, experts + total);
        });
    weight_bytes_ = experts + weights.bytes;
    ExpertExchange& exchange = local_experts_ ? *local_experts_ : *options_.exchange;
    model_ = std::make_unique<Model>(checkpoint_->config(), std::move(weights), ops_, exchange, rounding_.streams);
    pages_ = Buffer<uint8_t>(options_.cache_pages * layout_.page_bytes);
    slots_ = Buffer<uint8_t>(options_.max_sequences * layout_.slot_bytes);
    pages_base_ = pages_.data();
    slots_base_ = slots_.data();
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<ChunkOutput>> Forward(absl::Span<const Chunk> chunks,
                                                   const ForwardOptions& options) override {
    RETURN_IF_ERROR(CheckChunks(chunks));
    const PassRows pass = MakePass(chunks);
    if (absl::Status status = Run(chunks, pass, options); !status.ok()) {
      Finish(chunks, false);
      return status;
    }
    std::vector<ChunkOutput> out = Outputs(chunks, pass);
    Finish(chunks, true);
    return out;
  }

  std::string KernelSet() const override { return vec::KernelSet(); }

 private:
  void Prepare(const Sequence& s) override {
    for (uint8_t* page : s.pages) std::memset(page, 0, layout_.page_bytes);
    std::memset(s.slot, 0, layout_.slot_bytes);
  }
  std::string HashDetail() const override { return absl::StrCat(rounding_ == Rounding::All()); }

  static Pass View(const PassRows& pass) {
    return {pass.sequences, static_cast<int64_t>(pass.ids.size()), pass.positions.data(), pass.ids.data()};
  }

  absl::Status Run(absl::Span<const Chunk> chunks, const PassRows& pass, const ForwardOptions& options) {
    RETURN_IF_ERROR(model_->Forward(View(pass), options));
    if (options_.mtp) RETURN_IF_ERROR(RunMtp(chunks, pass, options));
    for (const SequenceRows& s : pass.sequences) StoreLastStreams(s, model_->streams(s.row + s.count - 1));
    return absl::OkStatus();
  }

  // The first row of a sequence takes the streams that the last pass left in the slot.
  absl::Status RunMtp(absl::Span<const Chunk> chunks, const PassRows& backbone, const ForwardOptions& options) {
    std::vector<int32_t> owners;
    const PassRows pass = MakeMtpPass(backbone, owners);
    if (pass.ids.empty()) return absl::OkStatus();
    const int64_t width = model_->stream_width(), rows = static_cast<int64_t>(pass.ids.size());
    std::vector<float> streams(rows * width);
    for (int64_t r = 0; r < rows; ++r) {
      const SequenceRows& s = backbone.sequences[owners[r]];
      const int64_t source = pass.positions[r] - s.start;
      if (source < 0) {
        LoadLastStreams(s, streams.data() + r * width);
      } else {
        std::copy_n(model_->streams(s.row + source), width, streams.data() + r * width);
      }
    }
    std::vector<float> logits(options.tap != nullptr ? rows * config().vocab_size : 0);
    RETURN_IF_ERROR(model_->ForwardMtp(View(pass), streams.data(), logits.empty() ? nullptr : logits.data()));
    for (int64_t r = 0; options.tap != nullptr && r < rows; ++r) {
      options.tap->OnMtpLogits(chunks[owners[r]].sequence, pass.positions[r], logits.data() + r * config().vocab_size);
    }
    return absl::OkStatus();
  }

  void StoreLastStreams(const SequenceRows& s, const float* streams) {
    uint8_t* at = s.slot + layout_.last_streams;
    for (int64_t i = 0; i < model_->stream_width(); ++i) {
      if (layout_.numerics == Numerics::kRelease) {
        const uint16_t bits = EncodeBf16(streams[i]);
        std::memcpy(at + 2 * i, &bits, 2);
      } else {
        std::memcpy(at + 4 * i, &streams[i], 4);
      }
    }
  }

  void LoadLastStreams(const SequenceRows& s, float* streams) const {
    const uint8_t* at = s.slot + layout_.last_streams;
    for (int64_t i = 0; i < model_->stream_width(); ++i) {
      if (layout_.numerics == Numerics::kRelease) {
        uint16_t bits;
        std::memcpy(&bits, at + 2 * i, 2);
        streams[i] = DecodeBf16(bits);
      } else {
        std::memcpy(&streams[i], at + 4 * i, 4);
      }
    }
  }

  std::vector<ChunkOutput> Outputs(absl::Span<const Chunk> chunks, const PassRows& pass) {
    std::vector<int32_t> rows;
    for (size_t i = 0; i < chunks.size(); ++i) {
      for (int32_t r : chunks[i].logit_rows) rows.push_back(static_cast<int32_t>(pass.sequences[i].row) + r);
      if (chunks[i].sampling != nullptr) {
        rows.push_back(static_cast<int32_t>(pass.sequences[i].row + pass.sequences[i].count - 1));
      }
    }
    const int64_t vocab = config().vocab_size;
    std::vector<float> logits(rows.size() * vocab);
    model_->Logits(rows, logits.data());
    std::vector<ChunkOutput> out(chunks.size());
    const float* at = logits.data();
    for (size_t i = 0; i < chunks.size(); ++i) {
      const int64_t n = static_cast<int64_t>(chunks[i].logit_rows.size()) * vocab;
      out[i].logits.assign(at, at + n);
      at += n;
      if (chunks[i].sampling != nullptr) {
        out[i].sampled = Sample({at, static_cast<size_t>(vocab)}, *chunks[i].sampling);
        at += vocab;
      }
    }
    return out;
  }

  const Rounding rounding_;
  ThreadPool pool_;
  CpuOps ops_;
  std::unique_ptr<LocalExperts> local_experts_;
  std::unique_ptr<Model> model_;
  Buffer<uint8_t> pages_, slots_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::shared_ptr<const Checkpoint> checkpoint,
                                                       EngineOptions options) {
  const ModelConfig& config = checkpoint->config();
  if (options.numerics == Numerics::kRelease && config.weight_format == WeightFormat::kPlain) {
    return absl::FailedPreconditionError(
        "numerics: `release` needs a quantised checkpoint and this one has no quantization_config; use `exact`");
  }
  if (options.max_context_tokens == 0) options.max_context_tokens = config.max_position_embeddings;
  if (options.max_context_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("max_context_tokens: found ", options.max_context_tokens,
                                                   ", the model allows ", config.max_position_embeddings));
  }
  if (options.cache_pages < 1 || options.max_sequences < 1 || options.max_batch_tokens < 1 || options.num_threads < 1) {
    return absl::InvalidArgumentError("cache_pages, max_sequences, max_batch_tokens, num_threads: allowed 1 and up");
  }
  options.mtp = options.mtp && config.has_mtp();
  if (options.device == DeviceKind::kCuda) return CreateCudaEngine(std::move(checkpoint), std::move(options));
  const Rounding rounding = options.rounding.value_or(Rounding::For(options.numerics));
  auto engine = std::make_unique<CpuEngine>(std::move(checkpoint), std::move(options), rounding);
  RETURN_IF_ERROR(engine->Init());
  return std::unique_ptr<Engine>(std::move(engine));
}

}  // namespace millrace
