// SPDX-License-Identifier: Apache-2.0
// Wires config, weights, model and cache into the Engine of engine.h. Reads as a table of contents; the arithmetic is in
// ops/, the order of operations in model/.
#include "engine/engine.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "absl/strings/str_cat.h"
#include "engine/cache/cache_pool.h"
#include "engine/device/buffer.h"
#include "engine/device/thread_pool.h"
#include "engine/model/model.h"
#include "engine/moe/local_experts.h"
#include "engine/ops/cpu_ops.h"
#include "engine/ops/rounding.h"
#include "engine/ops/vector_cpu.h"
#include "engine/status.h"

namespace millrace {
namespace {

struct Sequence {
  SequenceReservation reservation;
  std::vector<uint8_t*> pages;
  uint8_t* slot = nullptr;
  int64_t length = 0;
  int64_t max_tokens = 0;
  bool poisoned = false;  // a pass failed halfway: only Release is left
};

class CpuEngine : public Engine {
 public:
  CpuEngine(std::shared_ptr<const Checkpoint> checkpoint, EngineOptions options, Rounding rounding)
      : checkpoint_(std::move(checkpoint)), options_(std::move(options)), rounding_(rounding),
        // A switched-off rounding point must not come back through the cache format.
        layout_(CacheLayout::Make(checkpoint_->config(),
                                  rounding == Rounding::All() ? Numerics::kRelease : Numerics::kExact, options_.mtp)),
        pool_(options_.num_threads), ops_(checkpoint_->config(), layout_, rounding_, pool_),
        cache_(options_.cache_pages, options_.max_sequences) {}

  absl::Status Init() {
    if (options_.exchange == nullptr) {
      ASSIGN_OR_RETURN(local_experts_,
                       LocalExperts::Create(*checkpoint_, {.numerics = options_.numerics,
                                                           .rounding = rounding_,
                                                           .mtp = options_.mtp,
                                                           .num_threads = options_.num_threads,
                                                           .progress = options_.progress}));
    }
    const int64_t experts = local_experts_ ? local_experts_->weight_bytes() : 0;
    ModelWeights weights = ModelWeights::Load(
        *checkpoint_, options_.numerics, options_.mtp, [&](int64_t done, int64_t total) {
          if (options_.progress) options_.progress(experts + done, experts + total);
        });
    weight_bytes_ = experts + weights.bytes;
    ExpertExchange& exchange = local_experts_ ? *local_experts_ : *options_.exchange;
    model_ = std::make_unique<Model>(checkpoint_->config(), std::move(weights), ops_, exchange, rounding_.streams);
    pages_ = Buffer<uint8_t>(options_.cache_pages * layout_.page_bytes);
    slots_ = Buffer<uint8_t>(options_.max_sequences * layout_.slot_bytes);
    return absl::OkStatus();
  }

  absl::StatusOr<SequenceId> NewSequence(int64_t max_tokens) override {
    if (max_tokens < 1 || max_tokens > options_.max_context_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("max_tokens: found ", max_tokens, ", allowed 1 to ", options_.max_context_tokens));
    }
    Sequence s;
    ASSIGN_OR_RETURN(s.reservation, cache_.Reserve((max_tokens + kPageTokens - 1) / kPageTokens));
    for (int32_t page : s.reservation.block_table()) {
      s.pages.push_back(pages_.data() + page * layout_.page_bytes);
      std::memset(s.pages.back(), 0, layout_.page_bytes);  // nothing of the last owner is readable or sent
    }
    s.slot = slots_.data() + s.reservation.slot() * layout_.slot_bytes;
    std::memset(s.slot, 0, layout_.slot_bytes);
    s.max_tokens = max_tokens;
    const SequenceId id{++last_id_};
    sequences_.emplace(id.value, std::move(s));
    return id;
  }

  void Release(SequenceId id) override { CHECK(sequences_.erase(id.value) == 1, absl::StrCat("sequence ", id.value)); }

  int64_t Length(SequenceId id) const override { return Get(id).length; }

  absl::StatusOr<std::vector<ChunkOutput>> Forward(absl::Span<const Chunk> chunks,
                                                   const ForwardOptions& options) override {
    RETURN_IF_ERROR(CheckChunks(chunks));
    PassStorage pass = MakePass(chunks);
    if (absl::Status status = Run(chunks, pass, options); !status.ok()) {
      for (const Chunk& chunk : chunks) Get(chunk.sequence).poisoned = true;
      return status;
    }
    std::vector<ChunkOutput> out = Outputs(chunks, pass);
    for (const Chunk& chunk : chunks) Get(chunk.sequence).length += static_cast<int64_t>(chunk.tokens.size());
    return out;
  }

  std::vector<CacheExtent> Extents(SequenceId id, int64_t num_tokens) override {
    Sequence& s = Get(id);
    const int64_t pages = (num_tokens + kPageTokens - 1) / kPageTokens;
    CHECK(pages <= static_cast<int64_t>(s.pages.size()), absl::StrCat(num_tokens, " tokens need ", pages, " pages"));
    std::vector<CacheExtent> extents;
    const std::vector<int>& cuts = layout_.layer_ranges;
    for (int64_t page = 0; page < pages; ++page) {
      for (size_t r = 0; r + 1 < cuts.size(); ++r) {
        const int64_t begin = layout_.page_layers[cuts[r]].begin;
        const int64_t end = r + 2 < cuts.size() ? layout_.page_layers[cuts[r + 1]].begin : layout_.page_bytes;
        extents.push_back({static_cast<int64_t>(extents.size()), s.pages[page] + begin, end - begin, page, cuts[r],
                           cuts[r + 1]});
      }
    }
    extents.push_back({static_cast<int64_t>(extents.size()), s.slot, layout_.slot_bytes, -1, 0,
                       config().num_hidden_layers});
    return extents;
  }

  absl::Status CommitImport(SequenceId id, int64_t num_tokens) override {
    Sequence& s = Get(id);
    if (s.length != 0 || s.poisoned) return absl::FailedPreconditionError("sequence: found one in use, expected a fresh one");
    if (num_tokens < 1 || num_tokens > s.max_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("num_tokens: found ", num_tokens, ", allowed 1 to ", s.max_tokens));
    }
    s.length = num_tokens;
    return absl::OkStatus();
  }

  const ModelConfig& config() const override { return checkpoint_->config(); }
  const EngineOptions& options() const override { return options_; }
  const CacheLayout& layout() const override { return layout_; }
  CacheUsage Usage() const override {
    return {cache_.num_pages(), cache_.free_pages(), cache_.owned_pages(), static_cast<int>(cache_.num_slots()),
            static_cast<int>(cache_.free_slots())};
  }
  int64_t weight_bytes() const override { return weight_bytes_; }
  std::string KernelSet() const override { return vec::KernelSet(); }
  std::string CompatibilityHash() const override {
    const std::string text = absl::StrCat(checkpoint_->ContentHash(), ";", NumericsName(options_.numerics), ";",
                                          layout_.Id(), ";", KernelSet(), ";", rounding_ == Rounding::All());
    return absl::StrCat(absl::Hex(XXH3_64bits(text.data(), text.size()), absl::kZeroPad16));
  }

 private:
  // A pass and the arrays it points to.
  struct PassStorage {
    std::vector<SequenceRows> sequences;
    std::vector<int64_t> positions;
    std::vector<int32_t> ids;
    Pass view() const {
      return {sequences, static_cast<int64_t>(ids.size()), positions.data(), ids.data()};
    }
  };

  Sequence& Get(SequenceId id) {
    const auto it = sequences_.find(id.value);
    CHECK(it != sequences_.end(), absl::StrCat("sequence ", id.value, " does not exist"));
    return it->second;
  }
  const Sequence& Get(SequenceId id) const { return const_cast<CpuEngine*>(this)->Get(id); }

  absl::Status CheckChunks(absl::Span<const Chunk> chunks) const {
    int64_t rows = 0;
    for (const Chunk& chunk : chunks) {
      const Sequence& s = Get(chunk.sequence);
      if (s.poisoned) return absl::FailedPreconditionError("sequence: an earlier pass of it failed");
      if (chunk.tokens.empty()) return absl::InvalidArgumentError("tokens: found none, expected at least one");
      rows += static_cast<int64_t>(chunk.tokens.size());
      if (s.length + static_cast<int64_t>(chunk.tokens.size()) > s.max_tokens) {
        return absl::InvalidArgumentError(absl::StrCat("tokens: found ", s.length + chunk.tokens.size(),
                                                       " in all, the sequence was reserved for ", s.max_tokens));
      }
      for (size_t i = 0; i < chunk.tokens.size(); ++i) {
        if (chunk.tokens[i] < 0 || chunk.tokens[i] >= config().vocab_size) {
          return absl::InvalidArgumentError(absl::StrCat("tokens[", i, "]: found ", chunk.tokens[i],
                                                         ", allowed 0 to ", config().vocab_size - 1));
        }
      }
    }
    if (rows > options_.max_batch_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("rows: found ", rows, ", allowed ", options_.max_batch_tokens, " a pass"));
    }
    return absl::OkStatus();
  }

  PassStorage MakePass(absl::Span<const Chunk> chunks) {
    PassStorage pass;
    for (const Chunk& chunk : chunks) {
      Sequence& s = Get(chunk.sequence);
      pass.sequences.push_back({static_cast<int64_t>(pass.ids.size()), static_cast<int64_t>(chunk.tokens.size()),
                                s.length, s.slot, &s.pages});
      for (size_t i = 0; i < chunk.tokens.size(); ++i) {
        pass.ids.push_back(chunk.tokens[i]);
        pass.positions.push_back(s.length + static_cast<int64_t>(i));
      }
    }
    return pass;
  }

  absl::Status Run(absl::Span<const Chunk> chunks, const PassStorage& pass, const ForwardOptions& options) {
    RETURN_IF_ERROR(model_->Forward(pass.view(), options));
    if (options_.mtp) RETURN_IF_ERROR(RunMtp(chunks, pass, options));
    for (const SequenceRows& s : pass.sequences) StoreLastStreams(s, model_->streams(s.row + s.count - 1));
    return absl::OkStatus();
  }

  // Position i of the draft module needs token i + 1, so its rows lag the backbone's by one: the first of them takes the
  // streams that the last pass left in the slot.
  absl::Status RunMtp(absl::Span<const Chunk> chunks, const PassStorage& backbone, const ForwardOptions& options) {
    PassStorage pass;
    std::vector<float> streams;
    std::vector<SequenceId> owners;
    const int64_t width = model_->stream_width();
    for (size_t i = 0; i < backbone.sequences.size(); ++i) {
      const SequenceRows& s = backbone.sequences[i];
      const int64_t lag = s.start > 0 ? 1 : 0;
      if (s.count - 1 + lag == 0) continue;
      pass.sequences.push_back({static_cast<int64_t>(pass.ids.size()), s.count - 1 + lag, s.start - lag, s.slot, s.pages});
      for (int64_t r = -lag; r + 1 < s.count; ++r) {
        streams.resize(streams.size() + width);
        float* row = streams.data() + streams.size() - width;
        if (r < 0) {
          LoadLastStreams(s, row);
        } else {
          std::copy_n(model_->streams(s.row + r), width, row);
        }
        pass.ids.push_back(backbone.ids[s.row + r + 1]);
        pass.positions.push_back(s.start + r);
        owners.push_back(chunks[i].sequence);
      }
    }
    if (pass.ids.empty()) return absl::OkStatus();
    std::vector<float> logits(options.tap != nullptr ? pass.ids.size() * config().vocab_size : 0);
    RETURN_IF_ERROR(model_->ForwardMtp(pass.view(), streams.data(), logits.empty() ? nullptr : logits.data()));
    for (size_t r = 0; options.tap != nullptr && r < pass.ids.size(); ++r) {
      options.tap->OnMtpLogits(owners[r], pass.positions[r], logits.data() + r * config().vocab_size);
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

  std::vector<ChunkOutput> Outputs(absl::Span<const Chunk> chunks, const PassStorage& pass) {
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

  const std::shared_ptr<const Checkpoint> checkpoint_;
  const EngineOptions options_;
  const Rounding rounding_;
  const CacheLayout layout_;
  ThreadPool pool_;
  CpuOps ops_;
  CachePool cache_;
  std::unique_ptr<LocalExperts> local_experts_;
  std::unique_ptr<Model> model_;
  Buffer<uint8_t> pages_, slots_;
  std::map<uint64_t, Sequence> sequences_;  // after cache_: reservations give back to it
  uint64_t last_id_ = 0;
  int64_t weight_bytes_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::shared_ptr<const Checkpoint> checkpoint,
                                                       EngineOptions options) {
  const ModelConfig& config = checkpoint->config();
  if (options.device != DeviceKind::kCpu) return absl::UnimplementedError("device: this build has no CUDA backend");
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
  const Rounding rounding = options.rounding.value_or(Rounding::For(options.numerics));
  auto engine = std::make_unique<CpuEngine>(std::move(checkpoint), std::move(options), rounding);
  RETURN_IF_ERROR(engine->Init());
  return std::unique_ptr<Engine>(std::move(engine));
}

}  // namespace millrace
